//! KVzip's scores: the model reads its context again, as if it were to repeat it, and a row's score is the largest attention
//! that it gets meanwhile.
//!
//! As in the authors' code, the context is repeated in pieces of 2,000 tokens. In a piece's softmax are the piece's rows, the
//! rows that are never dropped, and the repetition's own. They never drop the rows of the system prompt; prompts without one
//! have their first four tokens in its place. They put the chat template's header of an answer between the request and the
//! repetition; there is none here.

use candle_core::Tensor;
use still_model::Model;

use super::attention::{Rows, Softmax, attend, blocks, later};
use super::context::scale_of;
use super::scores::Scores;
use super::select::SINKS;
use crate::error::{EvalError, Result};

/// Tokens of a piece (`chunk_size`).
const PIECE: usize = 2000;
/// Tokens of the piece before that a repetition is told to begin after (`prev_postfix_size`).
const REMINDER: usize = 8;

const REPEAT: &str = "\n\nRepeat the previous context exactly.";
const REPEAT_PART: &str = "\n\nRepeat the part of the previous context exactly, starting with ";

/// What is read to score rows `from..to` of a context: a request, and those tokens again.
pub(super) struct Repetition {
    pub from: usize,
    pub to: usize,
    pub ids: Vec<u32>,
}

/// Repetitions that together score every row of a context but the first [`SINKS`].
pub(super) fn repetitions(model: &Model, context: &[u32]) -> Result<Vec<Repetition>> {
    let sinks = SINKS.min(context.len());
    let starts = (sinks..context.len()).step_by(PIECE);
    starts
        .map(|from| {
            let to = (from + PIECE).min(context.len());
            let mut ids;
            if from == sinks {
                ids = model.tokenizer.encode(REPEAT, false)?;
            } else {
                ids = model.tokenizer.encode(REPEAT_PART, false)?;
                ids.extend(&context[from - REMINDER..from]);
            }
            ids.extend(&context[from..to]);
            Ok(Repetition { from, to, ids })
        })
        .collect()
}

/// Scores of rows of a context, `[layer][K][N]`; those of rows that no repetition covers are infinite. `layers`: the context's
/// rows, of one sequence.
pub(super) fn kvzip(model: &Model, context: &[u32], layers: &[Rows]) -> Result<Vec<Scores>> {
    let kv_heads = model.config().num_key_value_heads;
    let mut scores = vec![vec![vec![f32::INFINITY; context.len()]; kv_heads]; layers.len()];
    for repetition in repetitions(model, context)? {
        let Repetition { from, to, ids } = &repetition;
        let rotation = model.decoder.rotation(context.len(), ids.len())?;
        let later = later(ids.len(), model.device())?;
        model.decoder.visit_layers::<EvalError>(
            model.decoder.embed(ids)?,
            &rotation,
            None,
            |n, layer, inputs| {
                let scale = scale_of(layer);
                let rows = &layers[n];
                let found = largest(&inputs.q, &rows.k, &inputs.k, (*from, *to), scale, &later)?;
                for (scores, found) in scores[n].iter_mut().zip(found) {
                    scores[*from..*to].copy_from_slice(&found);
                }
                attend(&inputs.q, &[rows, &Rows::new(&inputs.k, &inputs.v)?], scale, &later)
            },
        )?;
    }
    Ok(scores)
}

/// The largest weight that each of the rows `from..to` of `k` `[1, K, N, D]` gets from queries `[1, H, T, D]` and any query head
/// of its KV head, in a softmax over the first [`SINKS`] rows, these rows and the queries' own keys `[1, K, T, D]`.
pub(super) fn largest(
    q: &Tensor,
    k: &Tensor,
    own: &Tensor,
    (from, to): (usize, usize),
    scale: f64,
    later: &Tensor,
) -> Result<Scores> {
    let own = own.to_dtype(k.dtype())?;
    let sinks = SINKS.min(from);
    let scored = k.narrow(2, from, to - from)?;
    let before = Tensor::cat(&[&k.narrow(2, 0, sinks)?, &scored], 2)?;
    let mut largest: Option<Tensor> = None;
    for (start, length) in blocks(q.dim(2)?) {
        let keys = Tensor::cat(&[&before, &own.narrow(2, 0, start + length)?], 2)?;
        let q = q.narrow(2, start, length)?;
        let softmax = Softmax::causal(&q, &keys, scale, later)?;
        let of_block = softmax.largest_of_queries(&q, &scored, scale)?;
        largest = Some(match largest {
            Some(largest) => largest.maximum(&of_block)?,
            None => of_block,
        });
    }
    match largest {
        Some(largest) => Ok(largest.squeeze(0)?.to_vec2()?),
        None => Ok(vec![vec![0.0; to - from]; k.dim(1)?]),
    }
}
