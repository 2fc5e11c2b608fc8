//! A layer for a small batch of single tokens on CUDA. Its weights are read once and little else is done, so that launches count: a
//! layer's are four products besides its attention and rotation, each with the norm before it, its activation and the sum after it.

use candle_core::{DType, Tensor};
use still_attention::AttentionRows;
use still_compute::cuda::{StepMemory, StepTensor};

use super::small_batch_products::{Factor, MOST, Normed, UNIT};
use crate::config::Activation;
use crate::decoder::ops::{Rotation, merge_heads, rms_norm_heads, split_heads};
use crate::decoder::{
    LayerOps, Norm, Projected, Projection, QuantizedMatrix, Role, RopeBase, Weight,
};
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::student::Student;

/// Whether so many sequences are a small batch for this model: its widths fit the kernel, and nothing is in its layers that is not here.
pub(super) fn fits(model: &Model, batch: usize) -> bool {
    let config = model.config();
    let most = match all_quantized(model) {
        true => QuantizedMatrix::most_rows(model.decoder.dtype()),
        false => MOST,
    };
    let heads = config.num_attention_heads * config.head_dim;
    let widths = [config.hidden_size, heads, config.intermediate_size];
    let layers = model.student.iter().flat_map(|student| &student.layers);
    // The gated product has no place for biases before its activation.
    batch <= most
        && !config.mlp_bias
        && widths.iter().all(|width| width.is_multiple_of(UNIT))
        && layers.into_iter().all(|layer| layer.gate_proj.is_none())
}

/// Whether every product of the model's layers and head reads codes, which tensor cores multiply with more rows at no more cost.
fn all_quantized(model: &Model) -> bool {
    let quantized = |weight: &Weight| matches!(weight, Weight::Quantized(_));
    let no_updates = |student: &Student| student.layers.iter().all(|layer| layer.lora.is_none());
    quantized(&model.decoder.lm_head)
        && model.student.as_ref().is_none_or(no_updates)
        && model.decoder.layers.iter().all(|layer| {
            let attention = [&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj];
            let mlp = [&layer.mlp.gate, &layer.mlp.up, &layer.mlp.down];
            attention.into_iter().chain(mlp).all(|linear| quantized(&linear.weight))
        })
}

/// Logits `[B, vocab]` f32 after one token of each sequence, of which `x` `[B, E]` is embedded; `attend(layer, rows)` gives a
/// layer's attention, all `[B, heads, 1, D]`. Without a `rotation` attention has to rotate. What the products write is in `memory`.
pub(super) fn step(
    model: &Model,
    mut x: Tensor,
    rotation: Option<&Rotation>,
    memory: &StepMemory,
    mut attend: impl FnMut(usize, AttentionRows<'_>) -> Result<Tensor>,
) -> Result<Tensor> {
    let decoder = &model.decoder;
    let mut ops = SmallBatchOps { head_dim: decoder.config.head_dim, rotation, memory };
    for (n, layer) in decoder.layers.iter().enumerate() {
        let student = model.student.as_ref().and_then(|student| student.layer(n));
        let inputs = layer.before_attention(&mut ops, &x, student)?;
        let attention = attend(n, inputs.rows())?;
        let attention = merge_heads(&attention)?.squeeze(1)?;
        x = layer.after_attention(&mut ops, x, &attention, student)?;
    }
    let norm = Some((&decoder.norm.scale, decoder.config.rms_norm_eps));
    let head = Factor::of(("logits", 0), &decoder.lm_head)?;
    Ok(Normed { x: &x, norm, memory }.products(&[head], DType::F32)?.remove(0))
}

/// [`LayerOps`] on rows `[B, width]`; heads are `[B, H, 1, D]`.
struct SmallBatchOps<'r> {
    head_dim: usize,
    /// None: attention rotates.
    rotation: Option<&'r Rotation>,
    memory: &'r StepMemory,
}

/// What a projection gives, in the step's memory. The residual after the attention is not that after the MLP, which the next layer
/// begins with.
fn projected(role: Role) -> StepTensor {
    ("projection", role as usize)
}

/// Rows, perhaps still to be normed: the kernel of their products does that.
struct Input<'w> {
    rows: Tensor,
    norm: Option<Norm<'w>>,
}

impl Input<'_> {
    fn normed<'a>(&'a self, memory: &'a StepMemory) -> Normed<'a> {
        let norm = self.norm.map(|Norm { weight, eps }| (weight, eps));
        Normed { x: &self.rows, norm, memory }
    }

    /// `x Aᵀ` of each update that is there.
    fn low(
        &self,
        projections: &[Projection<'_>],
        memory: &StepMemory,
    ) -> Result<Vec<Option<Tensor>>> {
        let updates = projections.iter().filter_map(|projection| {
            let name = ("low-rank update", projection.role as usize);
            projection.lora.map(|update| (name, update))
        });
        let factors: Vec<_> = updates.map(|(name, update)| Factor::new(name, &update.a)).collect();
        let mut made = match factors.is_empty() {
            true => Vec::new(),
            false => self.normed(memory).products(&factors, DType::F32)?,
        }
        .into_iter();
        Ok(projections.iter().map(|projection| projection.lora.and_then(|_| made.next())).collect())
    }

    fn products(
        &self,
        projections: &[Projection<'_>],
        add: Option<&Tensor>,
        memory: &StepMemory,
    ) -> Result<Vec<Tensor>> {
        let mut factors = Vec::with_capacity(projections.len());
        for (projection, low) in projections.iter().zip(self.low(projections, memory)?) {
            let Projection { role, linear, lora, .. } = projection;
            let (bias, update) = (linear.bias.as_ref(), lora.zip(low));
            let matrix = Factor::of(projected(*role), &linear.weight)?;
            factors.push(Factor { bias, add, update, ..matrix });
        }
        Ok(self.normed(memory).products(&factors, self.rows.dtype())?)
    }
}

impl<'w> LayerOps<'w> for SmallBatchOps<'_> {
    type Rows = Tensor;
    type Input = Input<'w>;
    type Heads = Tensor;

    fn norm(&mut self, x: &Tensor, norm: Norm<'w>) -> Result<Input<'w>> {
        Ok(Input { rows: x.clone(), norm: Some(norm) })
    }

    fn input(&mut self, x: &Tensor) -> Input<'w> {
        Input { rows: x.clone(), norm: None }
    }

    fn project(
        &mut self,
        x: &Input<'w>,
        projections: &[Projection<'w>],
    ) -> Result<Projected<Tensor>> {
        Ok(x.products(projections, None, self.memory)?.into())
    }

    fn project_onto(
        &mut self,
        onto: Tensor,
        x: &Input<'w>,
        projection: Projection<'w>,
        norm: Option<Norm<'w>>,
    ) -> Result<Tensor> {
        if norm.is_some() {
            return Err(missing("norm after a projection"));
        }
        Ok(x.products(&[projection], Some(&onto), self.memory)?.remove(0))
    }

    fn gated(
        &mut self,
        x: &Input<'w>,
        gate: Projection<'w>,
        up: Projection<'w>,
        activation: Activation,
    ) -> Result<Input<'w>> {
        if activation != Activation::Silu {
            return Err(missing("activation but SiLU"));
        }
        let of = |projection: &'_ Projection<'w>| projected(projection.role);
        let (gate, up) = ((of(&gate), &gate.linear.weight), (of(&up), &up.linear.weight));
        let hidden = x.normed(self.memory).gated(gate, up)?;
        Ok(Input { rows: hidden, norm: None })
    }

    fn heads(
        &mut self,
        rows: Tensor,
        norm: Option<Norm<'w>>,
        rope: Option<RopeBase>,
    ) -> Result<Tensor> {
        let rows = rows.unsqueeze(1)?;
        let rows = match norm {
            Some(Norm { weight, eps }) => rms_norm_heads(&rows, weight, eps)?,
            None => rows,
        };
        let rotation = rope.zip(self.rotation).map(|(base, rotation)| rotation.of(base));
        let rotation = rotation.transpose()?;
        Ok(split_heads(&rows, self.head_dim, rotation)?)
    }

    fn output_gate(&mut self, _: Tensor) -> Result<Tensor> {
        Err(missing("output gate"))
    }
}

/// [`fits`] leaves out models with such layers.
fn missing(what: &str) -> ModelError {
    ModelError::Invalid(format!("a small batch on CUDA has no {what}"))
}
