//! Repeated text as items of a task.

use super::LongOptions;
use crate::error::{EvalError, Result};
use crate::repeated_text::random_tokens;
use crate::task::{Item, Question, Window};

/// Half of `length` random tokens twice; the second copy is scored, but for its first token: nothing tells that it begins.
pub(super) fn items(vocab_size: usize, options: LongOptions) -> Result<Vec<Item>> {
    let tokens = options.length / 2;
    if tokens < 2 {
        let (what, got) = ("repeated_text", options.length);
        return Err(EvalError::TooShort { what, needed: 4, got });
    }
    let item = |index: usize| {
        let once = random_tokens(vocab_size, tokens, options.seed.wrapping_add(index as u64));
        let window = Window { ids: once.repeat(2), scored_from: tokens + 1, bytes: None };
        Item {
            id: format!("repeated_text-{index}"),
            group: None,
            question: Question::Window(window),
        }
    };
    Ok((0..options.items).map(item).collect())
}
