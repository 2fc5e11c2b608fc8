//! Dropout whose mask can be drawn again: the backward pass and a recomputed layer need the same one.

use candle_core::{Device, Result, Tensor};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use still_compute::Real;

/// Values whose mask one thread draws at a time; a whole number of ChaCha's words.
const BLOCK: usize = 16_384;
/// Every value takes 16 bits of randomness.
const RANGE: f64 = 65_536.0;

/// The inputs of a low-rank update that a training step leaves out: a function of seed and stream alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Share left out, 0 … 1 (below 1), taken in steps of 2⁻¹⁶.
    pub rate: f64,
    /// ChaCha's seed.
    pub seed: u64,
    /// ChaCha's stream: one for each mask of a seed.
    pub stream: u64,
}

impl Dropout {
    /// What each of `values` values is multiplied by, f32: drawn on the host, so that every device has the same.
    pub(super) fn mask(&self, values: usize, device: &Device) -> Result<Tensor> {
        let mut mask = vec![1.0_f32; values];
        self.apply(&mut mask);
        Tensor::from_vec(mask, values, device)
    }

    /// Sets the values left out to 0 and scales the others up by what that takes from their mean.
    pub(super) fn apply<T: Real>(&self, values: &mut [T]) {
        let threshold = (self.rate * RANGE).round();
        let scale = T::of(RANGE / (RANGE - threshold));
        values.par_chunks_mut(BLOCK).enumerate().for_each(|(n, values)| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(self.stream);
            rng.set_word_pos((n * BLOCK / 2) as u128);
            let mut noise = vec![0; 2 * values.len()];
            rng.fill_bytes(&mut noise);
            for (value, noise) in values.iter_mut().zip(noise.chunks_exact(2)) {
                let kept = f64::from(u16::from_le_bytes([noise[0], noise[1]])) >= threshold;
                *value = if kept { *value * scale } else { T::zero() };
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(rate: f64, stream: u64, count: usize) -> Vec<f64> {
        let mut values = vec![1.0; count];
        Dropout { rate, seed: 3, stream }.apply(&mut values);
        values
    }

    #[test]
    fn the_share_is_left_out_and_the_mean_stays() {
        let values = mask(0.25, 1, 100_000);
        let left_out = values.iter().filter(|&&x| x == 0.0).count();
        assert!((left_out as f64 / 1e5 - 0.25).abs() < 0.01, "{left_out}");
        assert!((values.iter().sum::<f64>() / 1e5 - 1.0).abs() < 0.01);
        assert!(mask(0.0, 1, 100).iter().all(|&x| x == 1.0));
    }

    #[test]
    fn a_mask_is_drawn_again_whatever_its_length_and_differs_by_stream() {
        let long = mask(0.5, 1, 3 * BLOCK);
        assert_eq!(long[..BLOCK + 7], mask(0.5, 1, BLOCK + 7));
        assert_ne!(long[..BLOCK], long[BLOCK..2 * BLOCK]);
        assert_ne!(long, mask(0.5, 2, 3 * BLOCK));
    }
}
