//! Negative log-likelihood per token, in windows, without ever holding all logits.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{D, Tensor};
use rayon::prelude::*;
use still_attention::RowDtype;
use still_compute::vector::{self, vectorize};
use still_model::Model;

use crate::error::{EvalError, Result};

/// Part of the vocabulary whose logits are held at a time.
const VOCAB_TILE: usize = 4096;

/// Logits that are held at a time on a device.
const DEVICE_LOGITS: usize = 1 << 26;

/// Negative log-likelihood of each predicted token, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct Nll {
    /// `[windows][window − 1]`: entry `i` is `−ln p(token i+1 | tokens 0 … i)`.
    pub per_token: Vec<Vec<f32>>,
}

impl Nll {
    /// Tokens predicted.
    pub fn tokens(&self) -> usize {
        self.per_token.iter().map(Vec::len).sum()
    }

    /// Mean over all predicted tokens, nats.
    pub fn mean(&self) -> f64 {
        let sum: f64 = self.per_token.iter().flatten().map(|&x| f64::from(x)).sum();
        sum / self.tokens() as f64
    }

    /// `exp(mean)`.
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }

    /// The same windows cut to their first `positions` tokens.
    ///
    /// Attention is causal, so this equals evaluating separate windows of `positions` tokens.
    pub fn prefix(&self, positions: usize) -> Nll {
        let predicted = positions.saturating_sub(1);
        let cut = |window: &Vec<f32>| window[..predicted.min(window.len())].to_vec();
        Nll { per_token: self.per_token.iter().map(cut).collect() }
    }
}

/// Evaluates `windows` consecutive, non-overlapping windows of `window` tokens, each from an empty state.
///
/// Exact rows are kept as `rows`. `progress` is told the tokens done since it was last called.
///
/// # Errors
/// If `tokens` is too short, a likelihood is not finite, or the model fails.
pub fn evaluate_windows(
    model: &Model,
    tokens: &[u32],
    window: usize,
    windows: usize,
    rows: RowDtype,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Nll> {
    if window < 2 || windows == 0 {
        return Err(EvalError::Argument(format!(
            "perplexity needs windows of at least 2 tokens, got {windows} of {window}"
        )));
    }
    let needed = window * windows;
    if tokens.len() < needed {
        return Err(EvalError::TooShort { what: "perplexity", needed, got: tokens.len() });
    }
    let per_token = tokens[..needed]
        .chunks_exact(window)
        .map(|window| one_window(model, window, rows, progress))
        .collect::<Result<Vec<_>>>()?;
    for (index, nll) in per_token.iter().enumerate() {
        if let Some(token) = nll.iter().position(|x| !x.is_finite()) {
            return Err(EvalError::NotFinite { what: "the likelihood", window: index, token });
        }
    }
    Ok(Nll { per_token })
}

/// Of each token but the first.
fn one_window(
    model: &Model,
    window: &[u32],
    rows: RowDtype,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Vec<f32>> {
    let mut cache = model.new_cache(1, rows)?;
    let blocks = Mutex::new(BTreeMap::new());
    model.read(window, &mut cache, |start, hidden| {
        let read = hidden.dim(0)?;
        let targets = &window[start + 1..window.len().min(start + 1 + read)];
        // The last token of a window predicts nothing that is in it.
        let nll = nll_of_hidden(model, &hidden.narrow(0, 0, targets.len())?, targets)?;
        blocks.lock().unwrap_or_else(PoisonError::into_inner).insert(start, nll);
        progress(read);
        Ok::<_, EvalError>(())
    })?;
    Ok(blocks
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .into_values()
        .flatten()
        .collect())
}

/// `−ln p(target)` of each row of final-normed hidden states `[T, E]`; logits exist for a part of the vocabulary
/// at a time.
///
/// # Errors
/// If there is not one target per row, a target is no token, or the model fails.
pub fn nll_of_hidden(model: &Model, hidden: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
    let targets: Vec<&[u32]> = targets.chunks(1).collect();
    let guesses = guesses_of_hidden(model, hidden, &targets)?;
    Ok(guesses.iter().flatten().map(|guess| guess.nll).collect())
}

/// How a token fared as the next one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Guess {
    /// `−ln p`, nats.
    pub nll: f32,
    /// Greedy decoding takes this token: of equal logits, the first.
    pub greedy: bool,
}

/// Of each row of final-normed hidden states `[T, E]`, how each of its targets fares.
///
/// # Errors
/// As [`nll_of_hidden`].
pub(crate) fn guesses_of_hidden(
    model: &Model,
    hidden: &Tensor,
    targets: &[&[u32]],
) -> Result<Vec<Vec<Guess>>> {
    let rows = hidden.dim(0)?;
    if rows != targets.len() {
        return Err(EvalError::Argument(format!("{rows} hidden rows, {} targets", targets.len())));
    }
    let vocab = model.config().vocab_size;
    if let Some(id) = targets.iter().copied().flatten().find(|&&id| id as usize >= vocab) {
        return Err(EvalError::Argument(format!(
            "token {id} is outside the vocabulary of {vocab}"
        )));
    }
    if !hidden.device().is_cpu() {
        return guesses_on_device(model, hidden, targets);
    }
    let mut surprises: Vec<Surprise> =
        targets.iter().map(|targets| Surprise::new(targets.len())).collect();
    let mut logits = Vec::new();
    for start in (0..vocab).step_by(VOCAB_TILE) {
        let tile = VOCAB_TILE.min(vocab - start);
        model.decoder.logits_into(hidden, start..start + tile, &mut logits)?;
        logits.par_chunks_exact_mut(tile).zip(&mut surprises).zip(targets).for_each(
            |((logits, surprise), targets)| {
                vectorize(
                    #[inline(always)]
                    || surprise.add(logits, start, targets),
                );
            },
        );
    }
    Ok(surprises.iter().zip(targets).map(|(surprise, targets)| surprise.guesses(targets)).collect())
}

/// [`guesses_of_hidden`] where the hidden states are: what comes to the host is two numbers a target. A target is greedy if
/// no logit is larger.
fn guesses_on_device(
    model: &Model,
    hidden: &Tensor,
    targets: &[&[u32]],
) -> Result<Vec<Vec<Guess>>> {
    let device = hidden.device();
    let block = (DEVICE_LOGITS / model.config().vocab_size).max(1);
    let mut guesses = Vec::with_capacity(targets.len());
    for (start, targets) in (0..targets.len()).step_by(block).zip(targets.chunks(block)) {
        let widest = targets.iter().map(|targets| targets.len()).max().unwrap_or(0);
        if widest == 0 {
            guesses.extend(targets.iter().map(|_| Vec::new()));
            continue;
        }
        let padded = |targets: &&[u32]| -> Vec<u32> {
            targets.iter().copied().chain(std::iter::repeat(0)).take(widest).collect()
        };
        let ids: Vec<u32> = targets.iter().flat_map(padded).collect();
        let ids = Tensor::from_vec(ids, (targets.len(), widest), device)?;
        let logits = model.logits(&hidden.narrow(0, start, targets.len())?.contiguous()?)?;
        let largest = logits.max_keepdim(D::Minus1)?;
        let wanted = logits.gather(&ids, 1)?.broadcast_sub(&largest)?;
        let sum = logits.broadcast_sub(&largest)?.exp()?.sum_keepdim(D::Minus1)?;
        let surprise = sum.log()?.broadcast_sub(&wanted)?;
        let [surprise, wanted] = [surprise, wanted].map(|tensor| tensor.to_vec2::<f32>());
        for ((targets, surprise), wanted) in targets.iter().zip(surprise?).zip(wanted?) {
            let guess = |(nll, wanted)| Guess { nll, greedy: wanted == 0.0_f32 };
            guesses.push(surprise.into_iter().zip(wanted).take(targets.len()).map(guess).collect());
        }
    }
    Ok(guesses)
}

/// `ln Σ e^x − x[target]` of some targets, over logits that come in parts.
#[derive(Clone, Debug)]
struct Surprise {
    max: f32,
    /// Index of the first logit that is as large as `max`.
    likeliest: usize,
    /// `Σ e^{x − max}`
    sum: f32,
    /// By target.
    logits: Vec<f32>,
}

impl Surprise {
    fn new(targets: usize) -> Self {
        Self { max: f32::NEG_INFINITY, likeliest: 0, sum: 0.0, logits: vec![f32::NAN; targets] }
    }

    /// Adds the part that begins with logit `start`; it is overwritten.
    #[inline(always)]
    fn add(&mut self, logits: &mut [f32], start: usize, targets: &[u32]) {
        for (logit, &target) in self.logits.iter_mut().zip(targets) {
            let in_part = (target as usize).checked_sub(start);
            if let Some(&wanted) = in_part.and_then(|target| logits.get(target)) {
                *logit = wanted;
            }
        }
        let max = vector::max(logits);
        if max > self.max || max.is_nan() {
            self.sum *= (self.max - max).exp();
            self.max = max;
            self.likeliest = start + logits.iter().position(|&x| x == max).unwrap_or(0);
        }
        self.sum += vector::exp_sub_sum(logits, self.max);
    }

    fn guesses(&self, targets: &[u32]) -> Vec<Guess> {
        let guess = |(&logit, &target): (&f32, &u32)| Guess {
            nll: self.sum.ln() - (logit - self.max),
            greedy: target as usize == self.likeliest,
        };
        self.logits.iter().zip(targets).map(guess).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprise_is_the_log_softmax() {
        let logits = [1.0_f32, -2.0, 0.5, 3.0, 1000.0_f32.ln()];
        let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let targets = [4, 0, 1, 2, 3, 0];
        for parts in 1..=logits.len() {
            let mut surprise = Surprise::new(targets.len());
            for (part, logits) in logits.chunks(parts).enumerate() {
                surprise.add(&mut logits.to_vec(), part * parts, &targets);
            }
            for (guess, target) in surprise.guesses(&targets).iter().zip(targets) {
                let expected = total.ln() - f64::from(logits[target as usize]);
                assert!((f64::from(guess.nll) - expected).abs() < 1e-5, "{guess:?} {expected}");
                assert_eq!(guess.greedy, target == 4);
            }
        }
    }

    #[test]
    fn of_equal_logits_greedy_decoding_takes_the_first() {
        for parts in 1..=4 {
            let mut surprise = Surprise::new(4);
            for (part, logits) in [0.0_f32, 2.0, 2.0, 1.0].chunks(parts).enumerate() {
                surprise.add(&mut logits.to_vec(), part * parts, &[0, 1, 2, 3]);
            }
            let greedy: Vec<bool> =
                surprise.guesses(&[0, 1, 2, 3]).iter().map(|g| g.greedy).collect();
            assert_eq!(greedy, [false, true, false, false]);
        }
    }

    #[test]
    fn a_likelihood_that_is_not_a_number_stays_one() {
        let mut surprise = Surprise::new(1);
        surprise.add(&mut [1.0, f32::NAN], 0, &[0]);
        surprise.add(&mut [1.0, 2.0], 2, &[0]);
        assert!(surprise.guesses(&[0])[0].nll.is_nan());
    }

    #[test]
    fn a_prefix_counts_only_its_own_predictions() {
        let nll = Nll { per_token: vec![vec![1.0, 2.0, 9.0], vec![3.0, 4.0, 9.0]] };
        assert_eq!(nll.prefix(3).per_token, [[1.0, 2.0], [3.0, 4.0]]);
        assert!((nll.prefix(3).mean() - 2.5).abs() < 1e-12);
        assert_eq!(nll.prefix(99), nll);
    }
}
