//! Recall without language: a random sequence is read twice, and the second copy can only be known from the first.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use still_attention::RowDtype;
use still_model::Model;

use crate::error::{EvalError, Result};
use crate::nll::evaluate_windows;

/// Random token ids of a vocabulary, the same for a seed.
pub fn random_tokens(vocab: usize, tokens: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..tokens).map(|_| rng.random_range(0..vocab as u32)).collect()
}

/// Mean negative log-likelihood, nats, of the second copy of `tokens` random tokens that are fed twice.
///
/// The copy's first token is left out: nothing tells that the copy begins. Exact rows are kept as `rows`.
///
/// # Errors
/// Fewer than two tokens; a likelihood that is not finite; an error of the model.
pub fn repeated_text_nll(model: &Model, tokens: usize, seed: u64, rows: RowDtype) -> Result<f64> {
    if tokens < 2 {
        return Err(EvalError::Argument(format!(
            "repeated text needs at least 2 tokens, got {tokens}"
        )));
    }
    let once = random_tokens(model.config().vocab_size, tokens, seed);
    let nll = evaluate_windows(model, &once.repeat(2), 2 * tokens, 1, rows, &|_| {})?;
    // Entry i is of token i + 1; the copy begins with token `tokens`.
    let second = &nll.per_token[0][tokens..];
    Ok(second.iter().map(|&x| f64::from(x)).sum::<f64>() / second.len() as f64)
}
