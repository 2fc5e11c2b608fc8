//! How large the channels of a model's keys are, for the exponents by which coded keys are scaled.

use candle_core::{D, DType, Tensor};
use still_attention::KeyExponents;
use still_model::ModelConfig;

use crate::error::Result;

/// The largest absolute value of each channel, `[layer][KV head][channel]`. A pair of channels that RoPE rotates together has the
/// largest norm of the pair, which no position changes.
#[derive(Clone, Debug)]
pub(super) struct KeyRanges {
    rotary: usize,
    layers: Vec<Vec<Vec<f64>>>,
}

impl KeyRanges {
    /// Nothing seen.
    pub fn new(model: &ModelConfig) -> Self {
        Self { rotary: model.rotary_dim(), layers: vec![Vec::new(); model.num_hidden_layers] }
    }

    /// Takes a layer's keys in, `[1, K, N, D]`.
    pub fn add(&mut self, layer: usize, k: &Tensor) -> Result<()> {
        let squares = k.detach().to_dtype(DType::F32)?.sqr()?.max(2)?.squeeze(0)?;
        let found = match self.rotary / 2 {
            0 => squares,
            half => {
                let (rotated, rest) = (2 * half, squares.dim(D::Minus1)? - 2 * half);
                let k = k.detach().to_dtype(DType::F32)?;
                let [a, b] = [0, half].map(|at| k.narrow(D::Minus1, at, half)?.sqr());
                let pairs = (a? + b?)?.max(2)?.squeeze(0)?;
                let rest = squares.narrow(D::Minus1, rotated, rest)?;
                Tensor::cat(&[&pairs, &pairs, &rest], D::Minus1)?
            }
        };
        let heads = found.sqrt()?.to_vec2::<f32>()?;
        let own = &mut self.layers[layer];
        own.resize_with(heads.len(), || vec![0.0; heads[0].len()]);
        for (own, found) in own.iter_mut().flatten().zip(heads.iter().flatten()) {
            *own = own.max(f64::from(*found));
        }
        Ok(())
    }

    /// The exponents that make the channels of each head alike: none of a layer whose keys were not seen.
    pub fn exponents(&self) -> Vec<Vec<KeyExponents>> {
        let of_heads = |heads: &Vec<Vec<f64>>| {
            heads.iter().map(|ranges| KeyExponents::of_ranges(ranges)).collect()
        };
        self.layers.iter().map(of_heads).collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use still_model::random::tiny_config;

    use super::*;

    #[test]
    fn pairs_that_rotate_together_have_one_exponent() {
        // Channels 1 and 5 are a pair of eight, of norm 50 in one token; 3 and 7 of 0.4, and the others of 1.35.
        let mut rows = [1.0, 1.0, 1.0, 0.24, 0.9, 1.0, 0.9, 0.32_f32].repeat(2 * 3);
        (rows[8 + 1], rows[8 + 5]) = (30.0, -40.0);
        let k = Tensor::from_vec(rows, (1, 2, 3, 8), &Device::Cpu).unwrap();
        let mut ranges = KeyRanges::new(&tiny_config());
        ranges.add(1, &(&k * 0.1).unwrap()).unwrap();
        ranges.add(1, &k).unwrap();
        let exponents = ranges.exponents();
        assert!(exponents[0].is_empty());
        assert_eq!(exponents[1][0].values(), [0, 5, 0, -2, 0, 5, 0, -2]);
        assert_eq!(exponents[1][1].values(), [0, 0, 0, -2, 0, 0, 0, -2]);

        // Of eight channels four are rotated: the others stand alone.
        let mut ranges = KeyRanges { rotary: 4, ..KeyRanges::new(&tiny_config()) };
        ranges.add(0, &k).unwrap();
        assert_eq!(ranges.exponents()[0][0].values(), [0, 4, 0, 4, -1, 5, -1, -2]);
    }
}
