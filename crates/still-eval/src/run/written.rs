//! Written answers, one after another; what a prompt and the next one begin with is read once.

use std::ops::ControlFlow;

use still_model::{Cache, GenerateOptions, Model, generate};

use super::sample::{Answer, Cost};
use super::shared::{WORTH_SHARING, equal};
use crate::error::Result;
use crate::task::Generative;

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
    /// `empty` is a cache of one sequence that nothing was fed to.
    pub fn new(model: &'a Model, empty: &'a Cache) -> Self {
        Self { model, empty, beginning: None, tokens: 0 }
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
        let answer = Answer::Generation {
            text: generation.text,
            new_tokens: generation.ids.len(),
            targets: question.targets().to_vec(),
        };
        let cache_bytes = Some(cache.size_bytes());
        Ok((answer, Cost { tokens: prompt.len(), cache_bytes, truncated: false }))
    }
}
