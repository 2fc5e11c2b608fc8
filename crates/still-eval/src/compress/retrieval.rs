//! Which heads look back: a score of every KV head, for DuoAttention's form.
//!
//! DuoAttention trains a gate a head on pass keys, and the gate is the score. Nothing is trained here. A head's score is the
//! attention that its query heads pay, while the second of two copies of random tokens is read, to the token that comes next:
//! the row after the token's own first copy (an induction head's; arXiv 2209.11895). It is measured once a model.

use candle_core::Tensor;
use still_model::Model;

use super::attention::{Softmax, later};
use super::context::scale_of;
use crate::error::{EvalError, Result};
use crate::long::random_tokens;

/// Random tokens of a copy: no more than a block of queries.
const COPY: usize = 256;

/// Scores of KV heads, `[layer][K]`.
pub(super) fn retrieval(model: &Model) -> Result<Vec<Vec<f32>>> {
    let ids = random_tokens(model.config().vocab_size, COPY, 0).repeat(2);
    let rotation = model.decoder.rotation(0, ids.len())?;
    let mut scores = Vec::new();
    model.decoder.visit_layers::<EvalError>(
        model.decoder.embed(&ids)?,
        &rotation,
        None,
        |_, layer, inputs| {
            scores.push(induction(&inputs.q, &inputs.k, scale_of(layer))?);
            Ok(layer.softmax_attention(inputs)?)
        },
    )?;
    Ok(scores)
}

/// Mean weight that query `N/2 + t` gives to row `t + 1`, over the second half of `N` queries and the query heads of a KV
/// head. `q` `[1, H, N, D]`, `k` `[1, K, N, D]`.
pub(super) fn induction(q: &Tensor, k: &Tensor, scale: f64) -> Result<Vec<f32>> {
    let copy = q.dim(2)? / 2;
    let later = later(copy, q.device())?;
    let softmax = Softmax::causal(&q.narrow(2, copy, copy)?, k, scale, &later)?;
    let (kv_heads, rows) = (k.dim(1)?, k.dim(2)?);
    let weights = softmax.weights()?.reshape((kv_heads, q.dim(1)? / kv_heads, copy, rows))?;
    let heads = weights.mean(1)?;
    let head = |head: usize| -> Result<f32> {
        let weights = heads.get(head)?.to_vec2::<f32>()?;
        let sum: f32 = weights.iter().enumerate().map(|(t, weights)| weights[t + 1]).sum();
        Ok(sum / copy as f32)
    };
    (0..k.dim(1)?).map(head).collect()
}
