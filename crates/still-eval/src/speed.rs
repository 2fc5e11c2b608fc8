//! Decode speed from a filled cache.

use std::time::Instant;

use candle_core::Tensor;
use serde::Serialize;
use still_model::{Cache, Model, likeliest};

use crate::error::{EvalError, Result};
use crate::quantile::median;

/// Speed of decoding one token at a time after a context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct DecodeSpeed {
    /// From the median step.
    pub tokens_per_s: f64,
    /// Steps timed, without the one that warms up.
    pub steps: usize,
}

/// Decodes greedily from a copy of `cache`, whose last token's final-normed hidden state `[1, E]` is given.
///
/// A step is the forward pass of one token, its logits and their arg-max. One step warms up.
///
/// # Errors
/// If `steps` is 0 or the model fails.
pub fn decode_speed(
    model: &Model,
    cache: &Cache,
    hidden: &Tensor,
    steps: usize,
) -> Result<DecodeSpeed> {
    if steps == 0 {
        return Err(EvalError::Argument("decode speed needs at least one step".into()));
    }
    let mut cache = cache.clone();
    let mut id = greedy(model, hidden)?;
    let mut seconds = Vec::with_capacity(steps);
    for step in 0..=steps {
        let started = Instant::now();
        id = likeliest(model.decode(&[id], &mut cache)?);
        if step > 0 {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    Ok(DecodeSpeed { tokens_per_s: 1.0 / median(&mut seconds), steps })
}

/// Arg-max of the logits of one hidden state `[1, E]`.
pub(crate) fn greedy(model: &Model, hidden: &Tensor) -> Result<u32> {
    Ok(likeliest(&model.logits(hidden)?.flatten_all()?.to_vec1::<f32>()?))
}
