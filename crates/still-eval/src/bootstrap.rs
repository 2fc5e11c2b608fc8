//! Paired bootstrap of the difference of two models on the same text or the same items.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::{EvalError, Result};
use crate::perplexity::Nll;
use crate::quantile::quantile;

/// A mean with its percentile interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The mean of the data itself, in its unit (of likelihoods, nats per token).
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// How to resample: whole blocks of neighboring tokens, because their errors are correlated.
#[derive(Clone, Copy, Debug)]
pub struct PairedBootstrap {
    /// Tokens of a block.
    pub block: usize,
    /// Resamples drawn.
    pub resamples: usize,
    /// Probability that the interval covers, such as 0.95.
    pub confidence: f64,
    /// Seed of the resampling.
    pub seed: u64,
}

impl Default for PairedBootstrap {
    fn default() -> Self {
        Self { block: 256, resamples: 10_000, confidence: 0.95, seed: 0 }
    }
}

impl PairedBootstrap {
    /// The interval of `mean(a − b)` over tokens: wholly below 0 means that `a` predicts better.
    ///
    /// Blocks never span two windows; the last block of a window may be shorter.
    ///
    /// # Errors
    /// If the two were not measured on the same windows, or options are out of range.
    pub fn difference(&self, a: &Nll, b: &Nll) -> Result<Interval> {
        self.check()?;
        let same = a.per_token.len() == b.per_token.len()
            && a.per_token.iter().zip(&b.per_token).all(|(a, b)| a.len() == b.len());
        if !same {
            return Err(EvalError::Argument(
                "bootstrap: the two models were not measured on the same windows".into(),
            ));
        }
        let windows = a.per_token.iter().zip(&b.per_token);
        let of_window = |(a, b): (&Vec<f32>, &Vec<f32>)| {
            differences(blocks(a, self.block), blocks(b, self.block))
        };
        self.of_blocks(&windows.flat_map(of_window).collect::<Vec<_>>())
    }

    /// The interval of `Σ sum / Σ weight` over blocks `(sum, weight)`, which are resampled whole.
    ///
    /// # Errors
    /// If there are no blocks, or options are out of range.
    pub fn of_blocks(&self, blocks: &[(f64, f64)]) -> Result<Interval> {
        self.check()?;
        if blocks.is_empty() {
            return Err(EvalError::TooShort { what: "the paired bootstrap", needed: 1, got: 0 });
        }
        let mean = ratio(blocks.iter());
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut means: Vec<f64> = (0..self.resamples)
            .map(|_| ratio((0..blocks.len()).map(|_| &blocks[rng.random_range(0..blocks.len())])))
            .collect();
        means.sort_unstable_by(f64::total_cmp);
        let tail = (1.0 - self.confidence) / 2.0;
        Ok(Interval { mean, low: quantile(&means, tail), high: quantile(&means, 1.0 - tail) })
    }

    fn check(&self) -> Result<()> {
        if self.block == 0 || self.resamples == 0 || !(0.0..1.0).contains(&self.confidence) {
            return Err(EvalError::Argument(format!(
                "bootstrap: block {}, {} resamples and confidence {} must be positive, the last below 1",
                self.block, self.resamples, self.confidence
            )));
        }
        Ok(())
    }
}

/// `(sum, tokens)` of each block of a window's losses; the last may be shorter.
pub(crate) fn blocks(window: &[f32], block: usize) -> Vec<(f64, f64)> {
    let sum = |block: &[f32]| block.iter().map(|&nll| f64::from(nll)).sum();
    window.chunks(block).map(|block| (sum(block), block.len() as f64)).collect()
}

/// The parts of `a` less those of `b`, which are of the same weights.
pub(crate) fn differences(
    a: Vec<(f64, f64)>,
    b: Vec<(f64, f64)>,
) -> impl Iterator<Item = (f64, f64)> {
    a.into_iter().zip(b).map(|(a, b)| (a.0 - b.0, a.1))
}

/// Mean over tokens of a collection of blocks.
fn ratio<'a>(blocks: impl Iterator<Item = &'a (f64, f64)>) -> f64 {
    let (sum, tokens) = blocks.fold((0.0, 0.0), |(s, n), block| (s + block.0, n + block.1));
    sum / tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nll(values: impl Fn(usize) -> f32) -> Nll {
        Nll { per_token: (0..4).map(|w| (0..100).map(|t| values(w * 100 + t)).collect()).collect() }
    }

    fn options() -> PairedBootstrap {
        PairedBootstrap { block: 16, resamples: 500, ..PairedBootstrap::default() }
    }

    #[test]
    fn a_constant_difference_has_no_width() {
        let interval = options().difference(&nll(|_| 2.5), &nll(|_| 3.0)).unwrap();
        assert!((interval.mean + 0.5).abs() < 1e-9);
        assert!((interval.low + 0.5).abs() < 1e-9 && (interval.high + 0.5).abs() < 1e-9);
    }

    #[test]
    fn noise_covers_zero_and_a_seed_repeats_it() {
        let noise = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 1000.0;
        let (a, b) = (nll(noise), nll(|i| noise(i + 7919)));
        let interval = options().difference(&a, &b).unwrap();
        assert!(interval.low < 0.0 && 0.0 < interval.high, "{interval:?}");
        assert!(interval.low <= interval.mean && interval.mean <= interval.high);
        assert_eq!(interval, options().difference(&a, &b).unwrap());
    }

    #[test]
    fn other_windows_are_refused() {
        let short = Nll { per_token: vec![vec![1.0; 100]; 3] };
        let error = options().difference(&short, &nll(|_| 1.0)).unwrap_err();
        assert!(error.to_string().contains("same windows"), "{error}");
    }
}
