//! Prefill and decode speed of a model, and the bytes of its cache.

use candle_core::{IndexOp, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use still_attention::{RowDtype, StateBytes};
use still_model::{Cache, Cancel, Model, OnRead, Workspace, likeliest};

use crate::error::{EvalError, Result};
use crate::timing::{Times, time_once};

/// One measured context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchPoint {
    /// Sequences read and decoded together.
    pub batch: usize,
    /// Tokens read first.
    pub context: usize,
    /// Of all prompts, their last tokens' logits included.
    pub prefill_tokens_per_s: f64,
    /// Of the tokens read onto the prompts' state, their last one's logits included; absent if none were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub onto_tokens_per_s: Option<f64>,
    /// Of all sequences, over all decoded tokens.
    pub decode_tokens_per_s: f64,
    /// Median step, milliseconds.
    pub decode_p50_ms: f64,
    /// 99th percentile of the steps, milliseconds: the slowest of fewer than a hundred.
    pub decode_p99_ms: f64,
    /// The slowest step, milliseconds: among many, one in which a cache takes memory to grow into. Absent from older files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_max_ms: Option<f64>,
    /// Bytes of the attention cache after the last step.
    pub cache_bytes: usize,
    /// `cache_bytes` by what they hold, on the CPU. No part of a results file.
    #[serde(skip)]
    pub cache_parts: Option<StateBytes>,
    /// Of `cache_bytes`, without room to grow into. No part of a results file.
    #[serde(skip)]
    pub used_cache_bytes: usize,
    /// Bytes of the attention cache before the first step. No part of a results file.
    #[serde(skip)]
    pub prefilled_cache_bytes: usize,
}

/// Tokens read and decoded to warm up: they reach the step, and a GPU's graph of it.
const WARM_UP: (usize, usize) = (64, 2);

/// Steps of one context before those of the next; see [`ModelBench::time_alternating`].
const STEPS_AT_A_TIME: usize = 16;

/// A model that has warmed up: memory, threads and kernels are there.
#[derive(Debug)]
pub struct ModelBench<'a> {
    model: &'a Model,
    batch: usize,
    rows: RowDtype,
    onto: usize,
    separate: bool,
}

impl<'a> ModelBench<'a> {
    /// Warms up with `batch` sequences, whose cache stores exact rows as `rows`.
    ///
    /// # Errors
    /// No sequence; an error of the model.
    pub fn new(model: &'a Model, batch: usize, rows: RowDtype) -> Result<Self> {
        let bench = Self { model, batch, rows, onto: 0, separate: false };
        let (context, new_tokens) = WARM_UP;
        bench.time(context, new_tokens)?;
        Ok(bench)
    }

    /// Also times `tokens` tokens that are read onto each context's state after decoding, as a conversation's next turn is. A GPU
    /// that has just read a long context runs slower for a while, and no longer does when it has decoded.
    #[must_use]
    pub fn reading_onto(self, tokens: usize) -> Self {
        Self { onto: tokens, ..self }
    }

    /// The same of `batch` sequences that have a cache each ([`Model::decode_many`]). One prompt is read for all.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_separate_caches(self, batch: usize) -> Result<Self> {
        let bench = Self { batch, separate: true, ..self };
        let (context, new_tokens) = WARM_UP;
        bench.time(context, new_tokens)?;
        Ok(bench)
    }

    /// Reads a made-up prompt of `context` tokens and decodes `new_tokens` greedily after it; a step is a forward pass, its
    /// logits and their arg-max. A GPU reads the prompt twice, and the second time is timed.
    ///
    /// # Errors
    /// If there is nothing to time or the model fails.
    pub fn time(&self, context: usize, new_tokens: usize) -> Result<BenchPoint> {
        let mut run = self.read(context, new_tokens)?;
        run.decode(new_tokens)?;
        run.read_onto()?;
        Ok(run.point())
    }

    /// [`ModelBench::time`] of several contexts, all of them read before any decodes, and then 16 tokens of each in alternation: a
    /// machine whose speed drifts does so for all of them alike, so that their steps can be compared. Their caches are in
    /// memory together.
    ///
    /// # Errors
    /// As [`ModelBench::time`].
    pub fn time_alternating(
        &self,
        contexts: &[usize],
        new_tokens: usize,
    ) -> Result<Vec<BenchPoint>> {
        let mut runs: Vec<Run<'_>> = contexts
            .iter()
            .map(|&context| self.read(context, new_tokens))
            .collect::<Result<_>>()?;
        for done in (0..new_tokens).step_by(STEPS_AT_A_TIME) {
            runs.iter_mut()
                .try_for_each(|run| run.decode(STEPS_AT_A_TIME.min(new_tokens - done)))?;
        }
        runs.iter_mut().try_for_each(Run::read_onto)?;
        Ok(runs.into_iter().map(Run::point).collect())
    }

    /// [`ModelBench::time`] of a text instead of a made-up prompt. Also returns a cache that has read the text and nothing
    /// else. `on_read` is told how much has been read.
    ///
    /// # Errors
    /// A text or `new_tokens` of nothing, several sequences, tokens onto the context; an error of the model.
    pub fn time_text(
        &self,
        ids: &[u32],
        new_tokens: usize,
        on_read: &OnRead,
    ) -> Result<(BenchPoint, Cache)> {
        if self.batch != 1 || self.onto != 0 {
            return Err(EvalError::Argument("a text is one sequence".into()));
        }
        let mut run = self.read_ids(ids, ids.len(), new_tokens, on_read)?;
        let [cache] = &run.caches[..] else {
            return Err(EvalError::Argument("a text is one sequence".into()));
        };
        let read = cache.clone();
        run.decode(new_tokens)?;
        Ok((run.point(), read))
    }

    fn read(&self, context: usize, new_tokens: usize) -> Result<Run<'_>> {
        // Which tokens they are has no bearing on the speed.
        let vocab = self.model.config().vocab_size as u64;
        let ids: Vec<u32> = (0..(context + self.onto) as u64)
            .map(|i| (i.wrapping_mul(2_654_435_761) % vocab) as u32)
            .collect();
        self.read_ids(&ids, context, new_tokens, &OnRead::default())
    }

    /// Reads the first `context` tokens of each sequence, on a GPU once more than is timed; the others are to be read onto them.
    fn read_ids(
        &self,
        ids: &[u32],
        context: usize,
        new_tokens: usize,
        on_read: &OnRead,
    ) -> Result<Run<'_>> {
        let &Self { model, batch, rows, separate, .. } = self;
        if batch == 0 || context == 0 || new_tokens == 0 {
            return Err(EvalError::Argument("there must be tokens to read and to decode".into()));
        }
        let together = if separate { 1 } else { batch };
        let (first, onto) = ids.split_at(context);
        if !model.device().is_cpu() {
            // The first of its length loads kernels, and gets memory that is not there yet.
            let mut cache = model.new_cache(together, rows)?;
            read(model, &mut cache, (first, together), &OnRead::default())?;
        }
        let mut cache = model.new_cache(together, rows)?;
        let (first, prefill_ms) = read(model, &mut cache, (first, together), on_read)?;
        // Equal prompts have equal answers.
        let next = vec![first; batch];
        let caches = vec![cache; batch / together];
        let prefilled_bytes = caches.iter().map(Cache::size_bytes).sum();
        let steps = Vec::with_capacity(new_tokens);
        Ok(Run {
            model,
            context,
            caches,
            workspace: Workspace::default(),
            next,
            read: together,
            prefill_ms,
            onto: onto.to_vec(),
            onto_tokens_per_s: None,
            prefilled_bytes,
            steps,
        })
    }
}

/// Reads ids onto what each of a batch of sequences has: the likeliest next token, and the milliseconds that took.
fn read(
    model: &Model,
    cache: &mut Cache,
    (ids, batch): (&[u32], usize),
    on_read: &OnRead,
) -> Result<(u32, f64)> {
    time_once(model.device(), || -> Result<u32> {
        let hidden = match batch {
            1 => model.prefill_until(ids, cache, &Cancel::default(), on_read)?,
            _ => {
                let column = Tensor::new(ids, model.device())?.unsqueeze(0)?;
                let column = column.repeat((batch, 1))?;
                model.forward(&column, cache, None)?.i((0, ids.len() - 1..))?
            }
        };
        Ok(likeliest(&model.logits(&hidden)?.flatten_all()?.to_vec1::<f32>()?))
    })
}

/// A context that has been read, is decoded after, and is then read onto.
struct Run<'a> {
    model: &'a Model,
    context: usize,
    /// One of all sequences, or one for each.
    caches: Vec<Cache>,
    workspace: Workspace,
    next: Vec<u32>,
    /// Sequences that were read.
    read: usize,
    prefill_ms: f64,
    /// What is still to be read onto each sequence.
    onto: Vec<u32>,
    onto_tokens_per_s: Option<f64>,
    prefilled_bytes: usize,
    /// Milliseconds each took.
    steps: Vec<f64>,
}

impl Run<'_> {
    fn decode(&mut self, steps: usize) -> Result<()> {
        let Self { model, caches, workspace, next, .. } = self;
        for _ in 0..steps {
            let ((), ms) = time_once(model.device(), || -> Result<()> {
                let logits = match &mut caches[..] {
                    [cache] if cache.batch() == next.len() => model.decode(next, cache)?,
                    caches => {
                        let mut caches: Vec<&mut Cache> = caches.iter_mut().collect();
                        model.decode_many(next, &mut caches, workspace)?
                    }
                };
                let rows = logits.par_chunks_exact(logits.len() / next.len());
                next.par_iter_mut().zip(rows).for_each(|(id, row)| *id = likeliest(row));
                Ok(())
            })?;
            self.steps.push(ms);
        }
        Ok(())
    }

    /// Reads what is to be read onto what is there, if anything is.
    fn read_onto(&mut self) -> Result<()> {
        let (batch, tokens) = (self.next.len(), self.onto.len());
        if tokens > 0 {
            let mut ms = 0.0;
            for cache in &mut self.caches {
                let ids = (self.onto.as_slice(), cache.batch());
                ms += read(self.model, cache, ids, &OnRead::default())?.1;
            }
            self.onto_tokens_per_s = Some(1e3 * (batch * tokens) as f64 / ms);
        }
        Ok(())
    }

    fn point(self) -> BenchPoint {
        let (batch, steps) = (self.next.len(), Times::new(self.steps, 1));
        let parts = self.caches.iter().map(Cache::bytes_by_part);
        BenchPoint {
            batch,
            context: self.context,
            prefill_tokens_per_s: 1e3 * (self.read * self.context) as f64 / self.prefill_ms,
            onto_tokens_per_s: self.onto_tokens_per_s,
            decode_tokens_per_s: 1e3 * batch as f64 / steps.mean_ms(),
            decode_p50_ms: steps.median_ms,
            decode_p99_ms: steps.quantile_ms(0.99),
            decode_max_ms: Some(steps.quantile_ms(1.0)),
            cache_bytes: self.caches.iter().map(Cache::size_bytes).sum(),
            cache_parts: parts.sum(),
            used_cache_bytes: self.caches.iter().map(Cache::used_bytes).sum(),
            prefilled_cache_bytes: self.prefilled_bytes,
        }
    }
}
