//! One decode step on plain slices: no tensors, no graph.
//!
//! The same arithmetic as [`Model::forward`] with one token a sequence, where a head's rows need no transposing.

use still_attention::vector;

use crate::decoder::ops::{rms_norm_into, swiglu_in_place, with_values};
use crate::decoder::{Decoder, DecoderLayer, Linear, Lora, Rotation};
use crate::error::Result;
use crate::model::{Cache, LayerCache};
use crate::student::{Student, StudentLayer};

/// Activations of a step, kept from one to the next.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffers {
    x: Vec<f32>,
    normed: Vec<f32>,
    /// Before rotation.
    flat: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attention: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    out: Vec<f32>,
    low: Vec<f32>,
    lengths: Vec<usize>,
}

/// `length` values, whatever they are: each is written before it is read.
fn take(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.resize(length, f32::NAN);
    buffer
}

/// Feeds one token to each sequence; `x` are their embeddings `[B, E]`, and become the final-normed hidden states.
pub(crate) fn step(
    decoder: &Decoder,
    student: Option<&Student>,
    x: &mut [f32],
    rotation: &Rotation,
    cache: &mut Cache,
) -> Result<()> {
    let width = decoder.config.hidden_size;
    let batch = x.len() / width;
    let mut buffers = std::mem::take(&mut cache.buffers);
    buffers.lengths.resize(batch, 1);
    buffers.x.clear();
    buffers.x.extend_from_slice(x);
    for (n, (layer, cache)) in decoder.layers.iter().zip(&mut cache.layers).enumerate() {
        let student = student.map(|student| &student.layers[n]);
        one_layer(layer, student, rotation, cache, &mut buffers)?;
    }
    with_values(&decoder.norm, |weight| {
        rms_norm_into(&buffers.x, weight, decoder.config.rms_norm_eps, x);
    })?;
    cache.buffers = buffers;
    Ok(())
}

fn one_layer(
    layer: &DecoderLayer,
    student: Option<&StudentLayer>,
    rotation: &Rotation,
    cache: &mut LayerCache,
    buffers: &mut Buffers,
) -> Result<()> {
    let Buffers { x, normed, flat, q, k, v, attention, gate, up, out, low, lengths } = buffers;
    let (batch, d) = (lengths.len(), layer.head_dim);
    let lora = student.and_then(|student| student.lora.as_ref());
    let normed = take(normed, x.len());
    with_values(&layer.input_layernorm, |weight| {
        rms_norm_into(x, weight, layer.rms_norm_eps, normed);
    })?;

    for (linear, lora, rotated) in [
        (&layer.q_proj, lora.and_then(|lora| lora.q.as_ref()), &mut *q),
        (&layer.k_proj, lora.and_then(|lora| lora.k.as_ref()), &mut *k),
    ] {
        project(linear, lora, normed, batch, flat, low)?;
        let heads = flat.len() / batch / d;
        let rows = flat.chunks_exact(d).zip(take(rotated, flat.len()).chunks_exact_mut(d));
        for (row, (from, to)) in rows.enumerate() {
            rotation.apply((row / heads, 0), from, to, false);
        }
    }
    project(&layer.v_proj, lora.and_then(|lora| lora.v.as_ref()), normed, batch, v, low)?;

    let attention = take(attention, q.len());
    match (cache, student) {
        (LayerCache::Hybrid(state), Some(student)) => {
            let gate = student.gate_values(normed)?;
            state.advance_values(q, k, v, gate.as_deref(), lengths, attention);
        }
        (LayerCache::Dense(cache), _) => cache.advance_values(q, k, v, lengths, attention),
        (LayerCache::Hybrid(_), None) => {
            unreachable!("the model checked that its cache was made for it")
        }
    }
    project(&layer.o_proj, lora.and_then(|lora| lora.o.as_ref()), attention, batch, out, low)?;
    vector::axpy(x, 1.0, out);

    let mlp = &layer.mlp;
    with_values(&mlp.norm, |weight| rms_norm_into(x, weight, mlp.rms_norm_eps, normed))?;
    let inner = mlp.gate.dims2()?.0;
    let (gate, up) = (take(gate, batch * inner), take(up, batch * inner));
    mlp.gate.multiply_into(0..inner, normed, gate)?;
    mlp.up.multiply_into(0..inner, normed, up)?;
    swiglu_in_place(gate, up);
    let out = take(out, x.len());
    mlp.down.multiply_into(0..out.len() / batch, gate, out)?;
    vector::axpy(x, 1.0, out);
    Ok(())
}

/// A projection of `batch` rows with its bias and low-rank update.
fn project(
    linear: &Linear,
    lora: Option<&Lora>,
    x: &[f32],
    batch: usize,
    y: &mut Vec<f32>,
    low: &mut Vec<f32>,
) -> Result<()> {
    let (out, inner) = linear.weight.dims2()?;
    let y = take(y, batch * out);
    linear.weight.multiply_into(0..out, x, y)?;
    if let Some(bias) = &linear.bias {
        with_values(bias, |bias| y.chunks_exact_mut(out).for_each(|y| vector::axpy(y, 1.0, bias)))?;
    }
    let Some(lora) = lora else { return Ok(()) };
    let (rank, scale) = (lora.a.dims()[0], lora.scale as f32);
    let low = take(low, batch * rank);
    with_values(&lora.a, |a| {
        with_values(&lora.b, |b| {
            vector::vectorize(
                #[inline(always)]
                || {
                    for (x, low) in x.chunks_exact(inner).zip(low.chunks_exact_mut(rank)) {
                        for (row, low) in a.chunks_exact(inner).zip(low) {
                            *low = scale * vector::dot(row, x);
                        }
                    }
                    for (low, y) in low.chunks_exact(rank).zip(y.chunks_exact_mut(out)) {
                        for (row, y) in b.chunks_exact(rank).zip(y) {
                            *y += vector::dot(row, low);
                        }
                    }
                },
            );
        })
    })??;
    Ok(())
}
