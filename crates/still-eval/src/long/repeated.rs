//! Recall without language: a random sequence twice. Only the first copy tells what the second is.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::LongOptions;
use crate::error::{EvalError, Result};
use crate::task::{Item, Window};

/// Random token ids of a vocabulary, the same for a seed.
pub fn random_tokens(vocab: usize, tokens: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..tokens).map(|_| rng.random_range(0..vocab as u32)).collect()
}

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
        window.item(format!("repeated_text-{index}"))
    };
    Ok((0..options.items).map(item).collect())
}
