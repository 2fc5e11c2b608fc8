//! One decoder layer, cut where the attention goes: teacher and student differ only there.

use candle_core::Tensor;

use super::linear::{Linear, LoraLayer};
use super::ops::{
    MlpWeights, Rotation, merge_heads, mlp, residual, rms_norm, rms_norm_heads, split_heads,
};
use crate::error::Result;
use crate::student::StudentLayer;

/// The frozen weights of one layer.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the names are Hugging Face's own")]
pub struct DecoderLayer {
    pub input_layernorm: Tensor,
    pub q_proj: Linear,
    pub k_proj: Linear,
    pub v_proj: Linear,
    pub o_proj: Linear,
    /// Of every query head before its rotation, `[D]`; only some families have it.
    pub q_norm: Option<Tensor>,
    /// Of every key head before its rotation, `[D]`.
    pub k_norm: Option<Tensor>,
    pub mlp: MlpWeights,
    pub rms_norm_eps: f64,
    pub head_dim: usize,
}

/// What the attention of a layer is computed from.
#[derive(Clone, Debug)]
pub struct AttentionInputs {
    /// The normalised hidden states, `[B, N, E]` (the output gate's input).
    pub normed: Tensor,
    /// Rotated queries, `[B, H, N, D]`.
    pub q: Tensor,
    /// Rotated keys, `[B, K, N, D]`.
    pub k: Tensor,
    /// Values, `[B, K, N, D]`.
    pub v: Tensor,
}

impl DecoderLayer {
    /// Norm, projections (with the student's low-rank updates), the heads' own norms and rotation of `x` `[B, N, E]`.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn attention_inputs(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        student: Option<&StudentLayer>,
    ) -> Result<AttentionInputs> {
        let none = LoraLayer::default();
        let lora = student.and_then(|student| student.lora.as_ref()).unwrap_or(&none);
        let normed = rms_norm(x, &self.input_layernorm, self.rms_norm_eps)?;
        let q = self.q_proj.forward(&normed, lora.q.as_ref())?;
        let k = self.k_proj.forward(&normed, lora.k.as_ref())?;
        let v = self.v_proj.forward(&normed, lora.v.as_ref())?;
        let head_norm = |x: Tensor, weight: &Option<Tensor>| match weight {
            Some(weight) => rms_norm_heads(&x, weight, self.rms_norm_eps),
            None => Ok(x),
        };
        let q = head_norm(q, &self.q_norm)?;
        let k = head_norm(k, &self.k_norm)?;
        Ok(AttentionInputs {
            q: split_heads(&q, self.head_dim, Some(rotation))?,
            k: split_heads(&k, self.head_dim, Some(rotation))?,
            v: split_heads(&v, self.head_dim, None)?,
            normed,
        })
    }

    /// Output projection of `attention` `[B, H, N, D]` and residual, then the MLP and residual: `[B, N, E]`.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn finish(
        &self,
        x: &Tensor,
        attention: &Tensor,
        student: Option<&StudentLayer>,
    ) -> Result<Tensor> {
        self.finish_keeping(x, attention, student, true)
    }

    /// [`DecoderLayer::finish`]. With `keep` the MLP's two wide activations are kept for a backward pass, which otherwise computes
    /// them again.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn finish_keeping(
        &self,
        x: &Tensor,
        attention: &Tensor,
        student: Option<&StudentLayer>,
        keep: bool,
    ) -> Result<Tensor> {
        let lora = student.and_then(|student| student.lora.as_ref()?.o.as_ref());
        let x = residual(x, &self.o_proj.forward(&merge_heads(attention)?, lora)?)?;
        Ok(mlp(&x, &self.mlp, keep)?)
    }

    /// The layer with low-rank updates added to its weights.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn merged(&self, lora: &LoraLayer) -> Result<Self> {
        Ok(Self {
            q_proj: self.q_proj.merged(lora.q.as_ref())?,
            k_proj: self.k_proj.merged(lora.k.as_ref())?,
            v_proj: self.v_proj.merged(lora.v.as_ref())?,
            o_proj: self.o_proj.merged(lora.o.as_ref())?,
            ..self.clone()
        })
    }
}
