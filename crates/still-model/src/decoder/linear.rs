//! A frozen projection and its low-rank update.

use candle_core::{DType, Device, Tensor};
use still_compute::Real;

use super::ops::linear::rows;
use super::ops::plain::linear_backward;
use super::ops::{Dropout, frozen_linear, low_rank_linear, with_values};
use super::weight::Weight;
use crate::error::Result;

/// A frozen projection.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`
    pub weight: Weight,
    /// `[out]`
    pub bias: Option<Tensor>,
}

/// A low-rank update of a projection: `scale · (x Aᵀ) Bᵀ`.
#[derive(Clone, Debug)]
pub struct Lora {
    /// `A`, `[rank, in]`
    pub a: Tensor,
    /// `B`, `[out, rank]`
    pub b: Tensor,
    /// `α / rank`
    pub scale: f64,
    /// Of one training step; absent everywhere else.
    pub dropout: Option<Dropout>,
}

/// The updates of one attention layer; projections that are not targets have none.
#[derive(Clone, Debug, Default)]
pub struct LoraLayer {
    /// Of `q_proj`.
    pub q: Option<Lora>,
    /// Of `k_proj`.
    pub k: Option<Lora>,
    /// Of `v_proj`.
    pub v: Option<Lora>,
    /// Of `o_proj`.
    pub o: Option<Lora>,
    /// Of the output gate's `g_proj`, which is the student's own.
    pub g: Option<Lora>,
}

impl LoraLayer {
    /// The same updates for one training step: `dropout` of `q`, the streams after its own for `k`, `v`, `o` and the gate.
    #[must_use]
    pub fn with_dropout(&self, dropout: Dropout) -> Self {
        let of = |lora: &Option<Lora>, after: u64| {
            let dropout = Dropout { stream: dropout.stream + after, ..dropout };
            lora.clone().map(|lora| Lora { dropout: Some(dropout), ..lora })
        };
        Self {
            q: of(&self.q, 0),
            k: of(&self.k, 1),
            v: of(&self.v, 2),
            o: of(&self.o, 3),
            g: of(&self.g, 4),
        }
    }
}

impl Linear {
    /// `x` `[B, N, in]` → `[B, N, out]`, with the update if given. Differentiable in `x` and the update.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn forward(&self, x: &Tensor, lora: Option<&Lora>) -> Result<Tensor> {
        match (lora, &self.bias) {
            (None, bias) => Ok(frozen_linear(x, &self.weight, bias.as_ref())?),
            (Some(lora), None) => Ok(low_rank_linear(x, &self.weight, lora)?),
            (Some(lora), Some(bias)) => {
                Ok(low_rank_linear(x, &self.weight, lora)?.broadcast_add(bias)?)
            }
        }
    }

    /// The gradient of `x` in [`Linear::forward`] without an update: `dy` `[B, N, out]` → `[B, N, in]`.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = dy.dims3()?;
        let dx = linear_backward(&[(&rows(dy)?, &self.weight)], None)?;
        Ok(dx.reshape((batch, tokens, ()))?)
    }

    /// The projection alone on plain values: `x` `[n, in]` → `[n, out]`, on the CPU.
    ///
    /// # Errors
    /// As [`Weight::multiply_into`].
    pub(super) fn multiply<T: Real>(&self, x: &[T]) -> candle_core::Result<Vec<T>> {
        let mut y = self.weight.multiply(x)?;
        if let Some(bias) = &self.bias {
            with_values(bias, |bias: &[T]| {
                for row in y.chunks_exact_mut(bias.len()) {
                    T::add_row(row, bias);
                }
            })?;
        }
        Ok(y)
    }

    /// Whether it is of this shape, its bias too.
    ///
    /// # Errors
    /// A weight that is no matrix.
    pub(super) fn fits(&self, out: usize, inner: usize) -> candle_core::Result<bool> {
        let biased = self.bias.as_ref().is_none_or(|bias| bias.dims() == [out]);
        Ok(self.weight.dims2()? == (out, inner) && biased)
    }

    /// The projection with the update added to its weight, where and of the dtype that the weight was (f32 if it was packed, that of
    /// activations if it was quantized).
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn merged(&self, lora: Option<&Lora>) -> Result<Self> {
        let weight = match lora {
            Some(lora) => {
                let merged = lora.added_to(&self.weight)?;
                match &self.weight {
                    Weight::Dense(was) => merged.to_dtype(was.dtype())?.to_device(was.device())?,
                    Weight::Packed(_) => merged,
                    Weight::Quantized(was) => {
                        merged.to_dtype(was.dtype())?.to_device(was.device())?
                    }
                }
                .into()
            }
            None => self.weight.clone(),
        };
        Ok(Self { weight, bias: self.bias.clone() })
    }
}

impl Lora {
    /// The weight with the update added, on the CPU: in f32, whatever the weight's dtype (f64 if that is its own).
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn added_to(&self, weight: &Weight) -> Result<Tensor> {
        let weight = on_host(&weight.to_tensor()?)?;
        let dtype = weight.dtype();
        let [a, b] = [&self.a, &self.b].map(|part| on_host(part)?.to_dtype(dtype));
        Ok((weight + (b?.matmul(&a?)? * self.scale)?)?)
    }
}

/// A tensor on the CPU, of at least 32 bits.
pub(crate) fn on_host(tensor: &Tensor) -> candle_core::Result<Tensor> {
    // Narrow types travel narrow.
    let tensor = tensor.to_device(&Device::Cpu)?;
    match tensor.dtype() {
        DType::F64 => Ok(tensor),
        _ => tensor.to_dtype(DType::F32),
    }
}

#[cfg(test)]
mod tests {
    use still_testing::uniform;

    use super::*;

    fn values(tensor: &Tensor) -> Vec<f64> {
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// What a GPU holds in bf16 is merged with what it learned in f32: once widened, once rounded.
    #[test]
    fn a_bf16_weight_takes_an_f32_update() {
        let narrow = uniform((24, 16), 1.0, 1).to_dtype(DType::BF16).unwrap();
        let [a, b] = [uniform((4, 16), 0.3, 2), uniform((24, 4), 0.3, 3)]
            .map(|part| part.to_dtype(DType::F32).unwrap());
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap();
        let update = (wide(&b).matmul(&wide(&a)).unwrap() * 2.0).unwrap();
        let expected = values(&(wide(&narrow) + update).unwrap());

        let lora = Lora { a, b, scale: 2.0, dropout: None };
        let weight = Weight::Dense(narrow.clone());
        let merged = lora.added_to(&weight).unwrap();
        assert_eq!(merged.dtype(), DType::F32);
        for (got, expected) in values(&merged).iter().zip(&expected) {
            assert!((got - expected).abs() < 1e-6, "{got} vs {expected}");
        }
        let layer = Linear { weight, bias: None }.merged(Some(&lora)).unwrap();
        let rounded = layer.weight.to_tensor().unwrap();
        assert_eq!(rounded.dtype(), DType::BF16);
        for (got, expected) in values(&rounded).iter().zip(&expected) {
            // Half a step of bf16's eight bits.
            assert!((got - expected).abs() <= expected.abs() / 256.0 + 1e-6, "{got} vs {expected}");
        }
        assert_ne!(values(&rounded), values(&narrow), "the update counts");
    }
}
