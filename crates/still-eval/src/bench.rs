//! Prefill and decode speed of one model at one context.

use std::time::Instant;

use candle_core::{IndexOp, Tensor};
use serde::{Deserialize, Serialize};
use still_attention::RowDtype;
use still_model::{Cache, Model, likeliest};

use crate::error::{EvalError, Result};
use crate::quantile::quantile;
use crate::speed::greedy;

/// What to time.
#[derive(Clone, Copy, Debug)]
pub struct BenchOptions {
    /// Sequences, all of `context` tokens.
    pub batch: usize,
    /// Tokens read before decoding.
    pub context: usize,
    /// Tokens decoded and timed.
    pub new_tokens: usize,
    /// How the cache stores exact rows.
    pub rows: RowDtype,
}

/// One measured context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchPoint {
    /// Sequences read and decoded together.
    pub batch: usize,
    /// Tokens read before decoding.
    pub context: usize,
    /// Of all prompts, their last tokens' logits included.
    pub prefill_tokens_per_s: f64,
    /// Of all sequences, over all decoded tokens.
    pub decode_tokens_per_s: f64,
    /// Median step, milliseconds.
    pub decode_p50_ms: f64,
    /// 99th percentile of the steps, milliseconds: the slowest of fewer than a hundred.
    pub decode_p99_ms: f64,
    /// Bytes of the attention cache after the last step, with what decoding prepares.
    pub cache_bytes: usize,
}

/// Steps of one context before it is another one's turn; see [`bench_in_turn`].
const TURN: usize = 16;

/// Reads a made-up prompt and decodes greedily after it; a step is a forward pass, its logits and their arg-max.
///
/// # Errors
/// If there is nothing to time or the model fails.
pub fn bench(model: &Model, options: BenchOptions) -> Result<BenchPoint> {
    let mut run = Run::read(model, options)?;
    run.decode(options.new_tokens)?;
    Ok(run.point())
}

/// [`bench()`] of several contexts, all of them read before any decodes, and then 16 tokens of each in turn: a machine whose
/// speed drifts does so for all of them alike, so that their steps can be compared. Their caches are in memory together.
///
/// # Errors
/// As [`bench()`].
pub fn bench_in_turn(model: &Model, options: &[BenchOptions]) -> Result<Vec<BenchPoint>> {
    let mut runs: Vec<Run<'_>> =
        options.iter().map(|&options| Run::read(model, options)).collect::<Result<_>>()?;
    while runs.iter().any(|run| run.left() > 0) {
        for run in &mut runs {
            run.decode(run.left().min(TURN))?;
        }
    }
    Ok(runs.iter_mut().map(Run::point).collect())
}

/// A context that has been read and is decoded after.
struct Run<'a> {
    model: &'a Model,
    options: BenchOptions,
    cache: Cache,
    next: Vec<u32>,
    /// Seconds.
    prefill: f64,
    /// Seconds each took.
    steps: Vec<f64>,
}

impl<'a> Run<'a> {
    fn read(model: &'a Model, options: BenchOptions) -> Result<Self> {
        let BenchOptions { batch, context, new_tokens, rows } = options;
        if batch == 0 || context == 0 || new_tokens == 0 {
            return Err(EvalError::Argument("there must be tokens to read and to decode".into()));
        }
        // Which tokens they are has no bearing on the speed.
        let vocab = model.config().vocab_size as u64;
        let ids: Vec<u32> =
            (0..context as u64).map(|i| (i.wrapping_mul(2_654_435_761) % vocab) as u32).collect();
        let mut cache = model.new_cache(batch, rows)?;
        let started = Instant::now();
        let hidden = match batch {
            1 => model.prefill(&ids, &mut cache)?,
            _ => {
                let ids = Tensor::new(ids, model.device())?.unsqueeze(0)?.repeat((batch, 1))?;
                model.forward(&ids, &mut cache, None)?.i((0, context - 1..))?
            }
        };
        // Equal prompts have equal answers.
        let next = vec![greedy(model, &hidden)?; batch];
        let prefill = started.elapsed().as_secs_f64();
        Ok(Self { model, options, cache, next, prefill, steps: Vec::with_capacity(new_tokens) })
    }

    fn left(&self) -> usize {
        self.options.new_tokens - self.steps.len()
    }

    fn decode(&mut self, steps: usize) -> Result<()> {
        for _ in 0..steps {
            let started = Instant::now();
            let logits = self.model.decode(&self.next, &mut self.cache)?;
            let rows = logits.chunks_exact(logits.len() / self.options.batch);
            self.next.iter_mut().zip(rows).for_each(|(id, row)| *id = likeliest(row));
            self.steps.push(started.elapsed().as_secs_f64());
        }
        Ok(())
    }

    fn point(&mut self) -> BenchPoint {
        let BenchOptions { batch, context, .. } = self.options;
        let total: f64 = self.steps.iter().sum();
        self.steps.sort_unstable_by(f64::total_cmp);
        BenchPoint {
            batch,
            context,
            prefill_tokens_per_s: (batch * context) as f64 / self.prefill,
            decode_tokens_per_s: (batch * self.steps.len()) as f64 / total,
            decode_p50_ms: 1e3 * quantile(&self.steps, 0.5),
            decode_p99_ms: 1e3 * quantile(&self.steps, 0.99),
            cache_bytes: self.cache.size_bytes(),
        }
    }
}
