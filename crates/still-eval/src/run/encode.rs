//! Questions as runs of tokens whose ends are scored.

use std::collections::HashMap;

use still_model::Model;

use crate::error::{EvalError, Result};
use crate::task::{Request, Window};

/// Tokens to feed, and the tokens that are to be predicted at the last of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Never empty.
    pub ids: Vec<u32>,
    /// As many of them as rows at the end are scored; not empty, at most as many as `ids`.
    pub targets: Vec<u32>,
    /// The beginning was cut off because the model is not made for so many tokens.
    pub truncated: bool,
}

impl Sequence {
    /// Index of the first token whose prediction is scored.
    pub fn first_scored(&self) -> usize {
        self.ids.len() - self.targets.len()
    }

    fn new(mut ids: Vec<u32>, continuation: usize, max_length: usize) -> Self {
        // As the harness: from the left, and the last token predicts nothing.
        let cut = ids.len().saturating_sub(max_length + 1);
        ids.drain(..cut);
        let targets = ids[ids.len() - continuation..].to_vec();
        ids.pop();
        Self { ids, targets, truncated: cut > 0 }
    }
}

/// Tokenizes requests of one item, whose contexts are often the same.
#[derive(Debug)]
pub struct Encoder<'a> {
    model: &'a Model,
    /// Tokens of a context alone.
    contexts: HashMap<&'a str, usize>,
}

impl<'a> Encoder<'a> {
    pub fn new(model: &'a Model) -> Self {
        Self { model, contexts: HashMap::new() }
    }

    /// The harness's rule (`_encode_pair`): white space at the context's end moves to the continuation, both are tokenized
    /// together, and the tokens after as many as the context has alone are the continuation. The tokenizer adds what it
    /// usually adds before a text. An empty context becomes a beginning-of-sequence token, or an end-of-sequence one.
    ///
    /// # Errors
    /// A continuation without tokens, or of more than the model can read; an error of the tokenizer.
    pub fn request(&mut self, request: &'a Request) -> Result<Sequence> {
        let Request { context, continuation } = request;
        let max_length = self.model.config().max_position_embeddings;
        let (ids, scored) = if context.is_empty() {
            self.without_context(continuation)?
        } else {
            let trimmed = context.trim_end();
            let whole = self.model.tokenizer.encode(&format!("{context}{continuation}"), true)?;
            let before = match self.contexts.get(trimmed) {
                Some(&tokens) => tokens,
                None => {
                    let tokens = self.model.tokenizer.encode(trimmed, true)?.len();
                    self.contexts.insert(trimmed, tokens);
                    tokens
                }
            };
            let scored = whole.len().saturating_sub(before);
            (whole, scored)
        };
        if scored == 0 || scored == ids.len() || scored > max_length {
            return Err(EvalError::Argument(format!(
                "the continuation {continuation:?} has {scored} tokens after {} of context; the model reads {max_length}",
                ids.len() - scored,
            )));
        }
        Ok(Sequence::new(ids, scored, max_length))
    }

    fn without_context(&self, continuation: &str) -> Result<(Vec<u32>, usize)> {
        let config = self.model.config();
        let prefix = config.bos_token_id.or(config.eos_token_ids.first().copied());
        let prefix = prefix.ok_or_else(|| {
            EvalError::Argument(
                "a question without a context needs a model with a beginning- or end-of-sequence token".into(),
            )
        })?;
        let mut ids = self.model.tokenizer.encode(continuation, false)?;
        if ids.first() != Some(&prefix) {
            ids.insert(0, prefix);
        }
        let scored = ids.len() - 1;
        Ok((ids, scored))
    }
}

/// A window as it is, however long.
///
/// # Errors
/// If nothing, or its first token, is to be scored.
pub fn window(window: &Window) -> Result<Sequence> {
    let Window { ids, scored_from, .. } = window;
    if *scored_from == 0 || *scored_from >= ids.len() {
        return Err(EvalError::Argument(format!(
            "a window of {} tokens cannot be scored from token {scored_from}",
            ids.len()
        )));
    }
    Ok(Sequence::new(ids.clone(), ids.len() - scored_from, ids.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_token_is_not_fed_and_the_first_ones_go() {
        let sequence = Sequence::new(vec![1, 2, 3, 4, 5], 2, 9);
        assert_eq!((sequence.ids.as_slice(), sequence.first_scored()), (&[1, 2, 3, 4][..], 2));
        assert_eq!(sequence.targets, [4, 5]);
        assert!(!sequence.truncated);
        let sequence = Sequence::new(vec![1, 2, 3, 4, 5], 2, 3);
        assert_eq!((sequence.ids.as_slice(), sequence.first_scored()), (&[2, 3, 4][..], 1));
        assert_eq!(sequence.targets, [4, 5]);
        assert!(sequence.truncated);
    }
}
