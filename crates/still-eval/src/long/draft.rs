//! From what a family says to an item: the chat template around it, its tokens, its judge.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use still_model::{ChatTemplate, Message, Tokenizer};

use super::LongOptions;
use super::judge::Judge;
use crate::error::{EvalError, Result};
use crate::task::Generative;

/// A prompt before it is tokens.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    /// What is said; in a chat, by the user.
    pub said: String,
    /// Byte of `said` at which the question begins: what comes before can be read without knowing it.
    pub question_from: usize,
    /// How the answer begins; the model goes on from there.
    pub answer_prefix: String,
    pub targets: Vec<String>,
    pub judge: Judge,
}

impl Draft {
    /// What is said before the question, and then the question.
    pub fn new(
        before: String,
        question: &str,
        answer_prefix: String,
        targets: Vec<String>,
        judge: Judge,
    ) -> Self {
        Self { question_from: before.len(), said: before + question, answer_prefix, targets, judge }
    }
}

/// A question over a long context.
#[derive(Clone, Debug)]
pub struct LongItem {
    /// The whole prompt.
    pub prompt_ids: Vec<u32>,
    /// Tokens of it that come before the question.
    pub context_tokens: usize,
    /// Tokens that the answer may have.
    pub max_new_tokens: usize,
    /// What would be right.
    pub targets: Vec<String>,
    /// How answers are judged.
    pub judge: Judge,
}

impl Generative for LongItem {
    fn prompt_ids(&self) -> &[u32] {
        &self.prompt_ids
    }

    fn context_tokens(&self) -> usize {
        self.context_tokens
    }

    fn max_new_tokens(&self) -> usize {
        self.max_new_tokens
    }

    fn targets(&self) -> &[String] {
        &self.targets
    }

    fn score(&self, answer: &str) -> f64 {
        self.judge.score(&self.targets, answer)
    }
}

/// Builds the items of one task.
pub(super) struct ItemBuilder<'a> {
    pub task: &'static str,
    pub new_tokens: usize,
    pub options: LongOptions,
    tokenizer: &'a Tokenizer,
    chat: Option<&'a ChatTemplate>,
}

impl<'a> ItemBuilder<'a> {
    pub fn new(
        task: &'static str,
        new_tokens: usize,
        tokenizer: &'a Tokenizer,
        options: LongOptions,
    ) -> Result<Self> {
        let chat = match (options.chat, tokenizer.chat_template()) {
            (true, None) => {
                return Err(EvalError::Argument(
                    "prompts were asked for in a chat template, and the model has none".into(),
                ));
            }
            (true, template) => template,
            (false, _) => None,
        };
        if options.items == 0 {
            return Err(EvalError::Argument(format!("{task} was asked for without any item")));
        }
        Ok(Self { task, new_tokens, options, tokenizer, chat })
    }

    /// Tokens that a prompt may have.
    pub fn prompt_tokens(&self) -> usize {
        self.options.length.saturating_sub(self.new_tokens)
    }

    /// Chance for one item, whichever others are made.
    pub fn rng(&self, index: usize) -> ChaCha8Rng {
        // FNV-1a: every task draws numbers of its own.
        let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let task = self.task.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
        let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed ^ task);
        rng.set_stream(index as u64);
        rng
    }

    pub fn encode(&self, draft: &Draft) -> Result<Vec<u32>> {
        let (said, prefix) = (&draft.said, &draft.answer_prefix);
        Ok(match self.chat {
            None => self.tokenizer.encode(&format!("{said}{prefix}"), true)?,
            Some(template) => {
                let turn = template.render(&[Message::new("user", said.as_str())], true)?;
                self.tokenizer.encode(&format!("{turn}{prefix}"), false)?
            }
        })
    }

    /// Tokens of an encoded prompt that come before the question, whatever is asked.
    fn context_tokens(&self, draft: &Draft, prompt_ids: &[u32]) -> Result<usize> {
        let (context, question) = draft.said.split_at(draft.question_from);
        let before = match self.chat {
            None => self.tokenizer.encode(context, true)?,
            Some(template) => {
                let turn = template.render(&[Message::new("user", draft.said.as_str())], true)?;
                let turn = turn.to_string();
                // Templates may trim what is said.
                let Some(at) = turn.rfind(question.trim()) else {
                    let task = self.task;
                    return Err(EvalError::Argument(format!(
                        "the model's chat template does not repeat the question of {task} as it is"
                    )));
                };
                self.tokenizer.encode(&turn[..at], false)?
            }
        };
        Ok(before.iter().zip(prompt_ids).take_while(|(a, b)| a == b).count())
    }

    /// The item of a draft and its tokens.
    pub fn item(&self, draft: Draft, prompt_ids: Vec<u32>) -> Result<LongItem> {
        let context_tokens = self.context_tokens(&draft, &prompt_ids)?;
        let Draft { targets, judge, .. } = draft;
        Ok(LongItem { prompt_ids, context_tokens, max_new_tokens: self.new_tokens, targets, judge })
    }
}
