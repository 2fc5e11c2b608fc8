//! A decode step of few sequences. Its weights are read once and little else is done, so that launches count: a layer's are
//! four products beside its attention and rotation, each with the norm before it, its activation and the sum after it.

use candle_core::{DType, Tensor};

use super::few_products::{Factor, MOST, Normed, UNIT};
use crate::decoder::ops::{Rotation, merge_heads, rms_norm_heads, split_heads};
use crate::decoder::{DecoderLayer, Lora, LoraLayer};
use crate::error::{ModelError, Result};
use crate::model::Model;

/// Whether so many sequences are few for this model: its widths fit the kernel, and nothing is in its layers that is not here.
pub(super) fn fits(model: &Model, batch: usize) -> bool {
    let config = model.config();
    let heads = config.num_attention_heads * config.head_dim;
    let widths = [config.hidden_size, heads, config.intermediate_size];
    let layers = model.student.iter().flat_map(|student| &student.layers);
    // The gated product has no place for biases before its activation.
    batch <= MOST
        && !config.mlp_bias
        && widths.iter().all(|width| width.is_multiple_of(UNIT))
        && layers.into_iter().all(|layer| layer.gate_proj.is_none())
}

/// Logits `[B, vocab]` f32 after one token of each sequence, of which `x` `[B, E]` is embedded; `attend(layer, [q, k, v])` gives a
/// layer's attention, all `[B, heads, 1, D]`.
pub(super) fn step(
    model: &Model,
    mut x: Tensor,
    rotation: &Rotation,
    mut attend: impl FnMut(usize, [&Tensor; 3]) -> Result<Tensor>,
) -> Result<Tensor> {
    let decoder = &model.decoder;
    let none = LoraLayer::default();
    for (n, layer) in decoder.layers.iter().enumerate() {
        let student = model.student.as_ref().map(|student| &student.layers[n]);
        let lora = student.and_then(|student| student.lora.as_ref()).unwrap_or(&none);
        let [q, k, v] = heads(layer, &x, rotation, lora)?;
        let attention = attend(n, [&q, &k, &v])?;
        x = finish(layer, &x, &attention, lora)?;
    }
    let normed = Normed { x: &x, norm: Some((&decoder.norm, decoder.config.rms_norm_eps)) };
    Ok(normed.products(&[Factor::new(decoder.lm_head.dense()?)], DType::F32)?.remove(0))
}

/// Rotated queries and keys, and values, of `x` `[B, E]`.
fn heads(
    layer: &DecoderLayer,
    x: &Tensor,
    rotation: &Rotation,
    lora: &LoraLayer,
) -> Result<[Tensor; 3]> {
    let normed = Normed { x, norm: Some((&layer.input_layernorm, layer.rms_norm_eps)) };
    let updates = [&lora.q, &lora.k, &lora.v].map(Option::as_ref);
    let mut low = low(normed, updates)?.into_iter();
    let mut factors = Vec::with_capacity(3);
    for (linear, update) in [&layer.q_proj, &layer.k_proj, &layer.v_proj].into_iter().zip(updates) {
        let update = update.zip(low.next().flatten());
        let bias = linear.bias.as_ref();
        factors.push(Factor { bias, update, ..Factor::new(linear.weight.dense()?) });
    }
    let norms = [&layer.q_norm, &layer.k_norm, &None];
    let rotations = [Some(rotation), Some(rotation), None];
    let mut heads = Vec::with_capacity(3);
    for (n, rows) in normed.products(&factors, x.dtype())?.into_iter().enumerate() {
        let rows = rows.unsqueeze(1)?;
        let rows = match norms[n] {
            Some(weight) => rms_norm_heads(&rows, weight, layer.rms_norm_eps)?,
            None => rows,
        };
        heads.push(split_heads(&rows, layer.head_dim, rotations[n])?);
    }
    let lost = |_| ModelError::Invalid("a product of a step was lost".into());
    <[Tensor; 3]>::try_from(heads).map_err(lost)
}

/// The layer's output `[B, E]`.
fn finish(
    layer: &DecoderLayer,
    x: &Tensor,
    attention: &Tensor,
    lora: &LoraLayer,
) -> Result<Tensor> {
    let (mlp, dtype) = (&layer.mlp, x.dtype());
    let merged = merge_heads(attention)?.squeeze(1)?;
    let merged = Normed { x: &merged, norm: None };
    let update = lora.o.as_ref().zip(low(merged, [lora.o.as_ref()])?.remove(0));
    let weight = layer.o_proj.weight.dense()?;
    let bias = layer.o_proj.bias.as_ref();
    let output = Factor { bias, add: Some(x), update, ..Factor::new(weight) };
    let x = merged.products(&[output], dtype)?.remove(0);

    let normed = Normed { x: &x, norm: Some((&mlp.norm, mlp.rms_norm_eps)) };
    let hidden = normed.gated(mlp.gate.weight.dense()?, mlp.up.weight.dense()?)?;
    let down = Factor { add: Some(&x), ..Factor::new(mlp.down.weight.dense()?) };
    Ok(Normed { x: &hidden, norm: None }.products(&[down], dtype)?.remove(0))
}

/// `x Aᵀ` of each update that is there.
fn low<const N: usize>(
    normed: Normed<'_>,
    updates: [Option<&Lora>; N],
) -> Result<Vec<Option<Tensor>>> {
    let factors: Vec<_> = updates.iter().flatten().map(|update| Factor::new(&update.a)).collect();
    let mut made = match factors.is_empty() {
        true => Vec::new(),
        false => normed.products(&factors, DType::F32)?,
    }
    .into_iter();
    Ok(updates.iter().map(|update| update.and_then(|_| made.next())).collect())
}
