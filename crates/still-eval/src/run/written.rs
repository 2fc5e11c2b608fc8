//! Written answers: one after another, what a prompt and the next one begin with read once; or, where a step of many sequences
//! takes little longer than that of one, many together.

use std::ops::ControlFlow;

use still_attention::RowDtype;
use still_model::{Cache, GenerateOptions, Generation, Model, generate, generate_together};

use super::sample::{Answer, Cost};
use super::shared::{WORTH_SHARING, equal};
use crate::error::Result;
use crate::task::Generative;

/// What dense caches of questions that are answered together take at most.
const TOGETHER_BYTES: usize = 16 << 30;

/// Writes answers, and keeps what the last prompt and the one to come begin with.
#[derive(Debug)]
pub struct Writer<'a> {
    model: &'a Model,
    empty: &'a Cache,
    beginning: Option<(Vec<u32>, Cache)>,
    /// Tokens of prompts fed so far: what is shared counts once.
    pub tokens: usize,
}

impl<'a> Writer<'a> {
    /// `empty` is a cache of one sequence that nothing was fed to, `beginning` what prompts may begin with and the cache that
    /// has read it.
    pub fn new(model: &'a Model, empty: &'a Cache, beginning: Option<(Vec<u32>, Cache)>) -> Self {
        Self { model, empty, beginning, tokens: 0 }
    }

    /// How many questions of up to `tokens` tokens, answers included, are answered together: `most`; with dense attention no more
    /// than [`TOGETHER_BYTES`] hold.
    pub fn together(model: &Model, most: usize, tokens: usize) -> usize {
        let config = model.config();
        let rows = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim;
        let sequence = rows * model.decoder.dtype().size_in_bytes() * tokens.max(1);
        match model.student {
            Some(_) => most,
            None => (TOGETHER_BYTES / sequence).clamp(1, most),
        }
    }

    /// The answers to several questions, written greedily, a token of each at a time. `rows`: as the empty cache's.
    ///
    /// # Errors
    /// An error of the model.
    pub fn write_together(
        &mut self,
        questions: &[&dyn Generative],
        rows: RowDtype,
    ) -> Result<Vec<(Answer, Cost)>> {
        let prompts: Vec<&[u32]> = questions.iter().map(|question| question.prompt_ids()).collect();
        let limits: Vec<usize> =
            questions.iter().map(|question| question.max_new_tokens()).collect();
        let mut cache = self.model.new_cache(questions.len(), rows)?;
        let written = generate_together(self.model, &prompts, &limits, &mut cache)?;
        self.tokens += prompts.iter().map(|prompt| prompt.len()).sum::<usize>();
        let cache_bytes = Some(cache.size_bytes() / questions.len());
        let answer =
            |((question, prompt), generation): ((&&dyn Generative, &[u32]), Generation)| {
                let answer = answer_of(*question, generation);
                (answer, Cost { tokens: prompt.len(), cache_bytes, truncated: false })
            };
        Ok(questions.iter().zip(prompts).zip(written).map(answer).collect())
    }

    /// The answer to a question, written greedily, and what it took. `next` is the prompt that comes after it.
    ///
    /// # Errors
    /// An error of the model.
    pub fn write(
        &mut self,
        question: &dyn Generative,
        next: Option<&[u32]>,
    ) -> Result<(Answer, Cost)> {
        let prompt = question.prompt_ids();
        let (mut fed, mut cache) = match self.beginning.take() {
            // Something must be left to feed: the answer begins with the last token's logits.
            Some((ids, cache)) if ids.len() < prompt.len() && prompt.starts_with(&ids) => {
                let fed = ids.len();
                self.beginning = Some((ids, cache.clone()));
                (fed, cache)
            }
            _ => (0, self.empty.clone()),
        };
        self.tokens += prompt.len() - fed;
        // At least one token of either prompt is its own.
        let shared = next.map_or(0, |next| {
            equal(prompt, next).min(prompt.len() - 1).min(next.len().saturating_sub(1))
        });
        if shared < fed || shared < WORTH_SHARING {
            self.beginning = None;
        }
        if shared >= fed + WORTH_SHARING {
            self.model.prefill(&prompt[fed..shared], &mut cache)?;
            self.beginning = Some((prompt[..shared].to_vec(), cache.clone()));
            fed = shared;
        }
        let max_new_tokens = question.max_new_tokens();
        let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
        let ignore = &mut |_: &str| ControlFlow::Continue(());
        let generation = generate(self.model, &prompt[fed..], &mut cache, &options, ignore)?;
        let answer = answer_of(question, generation);
        let cache_bytes = Some(cache.size_bytes());
        Ok((answer, Cost { tokens: prompt.len(), cache_bytes, truncated: false }))
    }
}

fn answer_of(question: &dyn Generative, generation: Generation) -> Answer {
    Answer::Generation {
        text: generation.text,
        new_tokens: generation.ids.len(),
        targets: question.targets().to_vec(),
    }
}
