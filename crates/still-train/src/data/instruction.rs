//! Instructions and their answers, in Alpaca's prompt.

use std::ops::Range;

use still_model::Tokenizer;

const WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
                          response that appropriately completes the request.";
const WITHOUT_INPUT: &str = "Below is an instruction that describes a task. Write a response that appropriately completes the request.";

/// A line of Stanford Alpaca's data, and of the many sets made like it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    pub instruction: String,
    /// What it is about; often empty.
    pub input: String,
    pub output: String,
}

impl Instruction {
    /// What the model is asked with.
    fn prompt(&self) -> String {
        let Self { instruction, input, .. } = self;
        if input.is_empty() {
            return format!(
                "{WITHOUT_INPUT}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
            );
        }
        format!(
            "{WITH_INPUT}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    }

    /// Token ids, and the span of those that answer: the output and the token that ends it. Prompt and output are tokenized apart,
    /// as they are when the model is asked.
    ///
    /// # Errors
    /// In words: a tokenizer that names no end of sequence.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Range<usize>), String> {
        let words = |error: still_model::ModelError| error.to_string();
        let end = end_of_sequence(tokenizer)?;
        let mut ids = tokenizer.encode(&self.prompt(), true).map_err(words)?;
        // Some tokenizers end every document by themselves.
        if ids.last() == Some(&end) {
            ids.pop();
        }
        let start = ids.len();
        ids.extend(tokenizer.encode(&self.output, false).map_err(words)?);
        ids.push(end);
        let answer = start..ids.len();
        Ok((ids, answer))
    }
}

fn end_of_sequence(tokenizer: &Tokenizer) -> Result<u32, String> {
    let (_, config) = tokenizer.to_json().map_err(|error| error.to_string())?;
    let token = &config["eos_token"];
    let token = token.as_str().or_else(|| token["content"].as_str());
    let id = token.and_then(|token| tokenizer.token_id(token));
    id.ok_or_else(|| "the tokenizer names no eos_token, with which an answer ends".into())
}
