//! A frozen projection and its low-rank update.

use candle_core::Tensor;

use super::ops::{Dropout, frozen_linear, low_rank_linear};
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

    /// The projection with the update added to its weight.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn merged(&self, lora: Option<&Lora>) -> Result<Self> {
        let weight = match lora {
            Some(lora) => {
                (self.weight.to_tensor()? + (lora.b.matmul(&lora.a)? * lora.scale)?)?.into()
            }
            None => self.weight.clone(),
        };
        Ok(Self { weight, bias: self.bias.clone() })
    }
}
