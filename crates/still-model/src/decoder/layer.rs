//! One decoder layer: what it computes, said once for every way to compute it ([`LayerOps`]).
//!
//! It is cut where the attention goes: teacher and student differ only there.

use candle_core::Tensor;
use smallvec::SmallVec;
use still_attention::{AttentionRows, dense_attention, sliding_attention};

use super::layer_ops::{LayerOps, Norm, Projection, Role, RopeBase, next};
use super::linear::{Linear, LoraLayer};
use super::norm::NormWeight;
use super::ops::{MlpWeights, Rotation, merge_heads};
use super::student_layer::StudentLayer;
use super::tensor_ops::TensorOps;
use crate::error::Result;

/// The frozen weights of one layer.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the names are Hugging Face's own")]
pub struct DecoderLayer {
    pub input_layernorm: NormWeight,
    pub q_proj: Linear,
    pub k_proj: Linear,
    pub v_proj: Linear,
    pub o_proj: Linear,
    /// Of every query head before its rotation, `[D]`; only some families have it.
    pub q_norm: Option<NormWeight>,
    /// Of every key head before its rotation, `[D]`.
    pub k_norm: Option<NormWeight>,
    /// Of what the attention gives, before it is added, `[E]`; only some families have it.
    pub post_attention_norm: Option<NormWeight>,
    pub mlp: MlpWeights,
    pub rms_norm_eps: f64,
    pub head_dim: usize,
    /// Tokens that are attended to, the token itself among them; all that came before without it.
    pub sliding_window: Option<usize>,
    /// What `q·k` is multiplied by in logits; `1/√D` if absent.
    pub logit_scale: Option<f64>,
}

/// What the attention of a layer is computed from: tensors, or whatever an implementation of [`LayerOps`] has for them.
#[derive(Clone, Debug)]
pub struct AttentionInputs<H = Tensor> {
    /// Rotated queries, `[B, H, N, D]`.
    pub q: H,
    /// Rotated keys, `[B, K, N, D]`.
    pub k: H,
    /// Values, `[B, K, N, D]`.
    pub v: H,
    /// The student's output gate, `[B, H, N, D]`, if it has one.
    pub gate: Option<H>,
}

impl AttentionInputs {
    /// As an attention state takes them.
    pub fn rows(&self) -> AttentionRows<'_> {
        AttentionRows { q: &self.q, k: &self.k, v: &self.v, gate: self.gate.as_ref() }
    }
}

/// A student's low-rank updates of a layer, if there is a student and it has any.
fn updates(student: Option<&StudentLayer>) -> Option<&LoraLayer> {
    student.and_then(|student| student.lora.as_ref())
}

impl DecoderLayer {
    /// The half before the attention: norm, projections with the student's updates, norms of the heads, rotation.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn before_attention<'w, O: LayerOps<'w>>(
        &'w self,
        ops: &mut O,
        x: &O::Rows,
        student: Option<&'w StudentLayer>,
    ) -> Result<AttentionInputs<O::Heads>> {
        let lora = updates(student);
        let of = |update: fn(&LoraLayer) -> Option<&super::Lora>| lora.and_then(update);
        let mut projections = SmallVec::<[_; 4]>::new();
        projections.push(Projection::new(Role::Query, &self.q_proj, of(|lora| lora.q.as_ref())));
        projections.push(Projection::new(Role::Key, &self.k_proj, of(|lora| lora.k.as_ref())));
        projections.push(Projection::new(Role::Value, &self.v_proj, of(|lora| lora.v.as_ref())));
        let gate = student.and_then(|student| student.gate_proj.as_ref());
        if let Some(weight) = gate {
            let (update, dtype) = (of(|lora| lora.g.as_ref()), self.input_layernorm.scale.dtype());
            projections.push(Projection::learned(Role::OutputGate, weight, update, dtype)?);
        }

        let normed = ops.norm(x, self.norm(&self.input_layernorm))?;
        let mut rows = ops.project(&normed, &projections)?.into_iter();
        let rope = match self.sliding_window {
            None => RopeBase::Global,
            Some(_) => RopeBase::Local,
        };
        let (q, k, v) = (next(&mut rows)?, next(&mut rows)?, next(&mut rows)?);
        Ok(AttentionInputs {
            q: ops.heads(q, self.optional_norm(&self.q_norm), Some(rope))?,
            k: ops.heads(k, self.optional_norm(&self.k_norm), Some(rope))?,
            v: ops.heads(v, None, None)?,
            gate: rows.next().map(|rows| ops.output_gate(rows)).transpose()?,
        })
    }

    /// The half after it: output projection of the attention's rows `[.., H · D]` and residual, then the MLP and residual. Some
    /// families have a norm before either is added.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn after_attention<'w, O: LayerOps<'w>>(
        &'w self,
        ops: &mut O,
        x: O::Rows,
        attention: &O::Rows,
        student: Option<&'w StudentLayer>,
    ) -> Result<O::Rows> {
        let lora = updates(student).and_then(|lora| lora.o.as_ref());
        let MlpWeights { norm, gate, up, down, activation, post_norm } = &self.mlp;
        let post_attention = self.optional_norm(&self.post_attention_norm);
        let attention = ops.input(attention);
        let output = Projection::new(Role::Output, &self.o_proj, lora);
        let x = ops.project_onto(x, &attention, output, post_attention)?;
        let normed = ops.norm(&x, self.norm(norm))?;
        let gate = Projection::new(Role::MlpGate, gate, None);
        let up = Projection::new(Role::MlpUp, up, None);
        let hidden = ops.gated(&normed, gate, up, *activation)?;
        let down = Projection::new(Role::MlpDown, down, None);
        ops.project_onto(x, &hidden, down, self.optional_norm(post_norm))
    }

    fn norm<'w>(&self, weight: &'w NormWeight) -> Norm<'w> {
        Norm { weight: &weight.scale, eps: self.rms_norm_eps }
    }

    fn optional_norm<'w>(&self, weight: &'w Option<NormWeight>) -> Option<Norm<'w>> {
        weight.as_ref().map(|weight| self.norm(weight))
    }

    /// [`DecoderLayer::before_attention`] of a tensor `x` `[B, N, E]`, differentiable.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn attention_inputs(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        student: Option<&StudentLayer>,
    ) -> Result<AttentionInputs> {
        self.before_attention(&mut TensorOps::new(self.head_dim, Some(rotation)), x, student)
    }

    /// [`DecoderLayer::after_attention`] of tensors, differentiable: `x` `[B, N, E]` and `attention` `[B, H, N, D]` give
    /// `[B, N, E]`.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn layer_output(
        &self,
        x: &Tensor,
        attention: &Tensor,
        student: Option<&StudentLayer>,
    ) -> Result<Tensor> {
        let mut ops = TensorOps::new(self.head_dim, None);
        self.after_attention(&mut ops, x.clone(), &merge_heads(attention)?, student)
    }

    /// Softmax attention `[B, H, N, D]`, as the teacher has it: to all tokens before, or to a window of them.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit; a sliding window on a device without a kernel.
    pub fn softmax_attention(&self, inputs: &AttentionInputs) -> Result<Tensor> {
        let AttentionInputs { q, k, v, .. } = inputs;
        Ok(match self.sliding_window {
            None => dense_attention(q, k, v, self.logit_scale)?,
            Some(window) => sliding_attention(q, k, v, window, self.logit_scale)?,
        })
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
