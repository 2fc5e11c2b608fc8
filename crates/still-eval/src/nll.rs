//! Negative log-likelihood of tokens, without ever holding all logits.

use candle_core::{D, Tensor};
use rayon::prelude::*;
use still_compute::losses::{exponentials, largest};
use still_model::Model;

use crate::error::{EvalError, Result};

/// Part of the vocabulary whose logits are held at a time.
const VOCAB_TILE: usize = 4096;

/// Logits that are held at a time on a device.
const DEVICE_LOGITS: usize = 1 << 26;

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
        logits
            .par_chunks_exact_mut(tile)
            .zip(&mut surprises)
            .zip(targets)
            .for_each(|((logits, surprise), targets)| surprise.add(logits, start, targets));
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
    fn add(&mut self, logits: &mut [f32], start: usize, targets: &[u32]) {
        for (logit, &target) in self.logits.iter_mut().zip(targets) {
            let in_part = (target as usize).checked_sub(start);
            if let Some(&wanted) = in_part.and_then(|target| logits.get(target)) {
                *logit = wanted;
            }
        }
        let max = largest(logits);
        if max > self.max || max.is_nan() {
            self.sum *= (self.max - max).exp();
            self.max = max;
            self.likeliest = start + logits.iter().position(|&x| x == max).unwrap_or(0);
        }
        self.sum += exponentials(logits, self.max);
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
}
