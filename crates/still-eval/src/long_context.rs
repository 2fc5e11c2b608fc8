//! Pass-key recall, cache bytes and decode speed from one walk through a long context.

use std::time::Instant;

use candle_core::Tensor;
use serde::Serialize;
use still_attention::RowDtype;
use still_model::{Cache, Model, likeliest};

use crate::error::{EvalError, Result};
use crate::passkey::{PasskeyAnswer, PasskeyPrompts};
use crate::speed::{decode_speed, greedy};

/// What to measure.
#[derive(Clone, Debug)]
pub struct LongContextOptions {
    /// Contexts, in tokens, at which cache bytes and decode speed are measured; ascending, at most the
    /// prompts' length.
    pub marks: Vec<usize>,
    /// Decode steps timed at each mark.
    pub decode_steps: usize,
    /// How the cache stores exact rows.
    pub rows: RowDtype,
}

/// One measured context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ContextPoint {
    /// Tokens in the cache.
    pub context_tokens: usize,
    /// Bytes of the attention cache of one sequence, all layers.
    pub cache_bytes: usize,
    /// Median decode speed from there.
    pub decode_tokens_per_s: f64,
}

/// Result of [`long_context`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LongContext {
    /// One answer per key.
    pub answers: Vec<PasskeyAnswer>,
    /// One point per mark.
    pub points: Vec<ContextPoint>,
    /// Tokens read per second, over all prompts.
    pub prefill_tokens_per_s: f64,
}

impl LongContext {
    /// Share of keys answered rightly.
    pub fn recall(&self) -> f64 {
        let right = self.answers.iter().filter(|answer| answer.right).count();
        right as f64 / self.answers.len() as f64
    }
}

/// Asks for every key and measures at every mark, reading what prompts share only once.
///
/// `progress` is told the tokens read since it was last called.
///
/// # Errors
/// Options out of range, or the model fails.
pub fn long_context(
    model: &Model,
    prompts: &PasskeyPrompts,
    options: &LongContextOptions,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<LongContext> {
    let (marks, length) = (options.marks.as_slice(), prompts.length);
    if prompts.prompts.is_empty() {
        return Err(EvalError::Argument("pass-key recall needs at least one key".into()));
    }
    let ascending = marks.is_sorted_by(|a, b| a < b);
    if !ascending || marks.iter().any(|&mark| mark == 0 || mark > length) {
        return Err(EvalError::Argument(format!(
            "contexts to measure must ascend within 1 … {length} tokens, got {marks:?}"
        )));
    }
    let mut walk = Walk { model, options, progress, points: Vec::new(), tokens: 0, seconds: 0.0 };
    let mut shared = model.new_cache(1, options.rows)?;
    let mut read = 0;
    let mut answers = Vec::with_capacity(prompts.prompts.len());
    for (index, prompt) in prompts.prompts.iter().enumerate() {
        // Marks are measured on the way to the first key only.
        let marks = if index == 0 { marks } else { &[] };
        walk.read(&prompts.shared[read..prompt.shared_tokens], &mut shared, marks)?;
        read = prompt.shared_tokens;
        let mut cache = shared.clone();
        let Some(hidden) = walk.read(&prompt.rest, &mut cache, marks)? else {
            return Err(EvalError::Argument("a pass-key prompt without a question".into()));
        };
        let mut ids = vec![greedy(model, &hidden)?];
        while ids.len() < prompt.answer_tokens {
            ids.push(likeliest(model.decode(&ids[ids.len() - 1..], &mut cache)?));
        }
        answers.push(prompt.judge(&model.tokenizer.decode(&ids, true)?));
    }
    Ok(LongContext {
        answers,
        points: walk.points,
        prefill_tokens_per_s: walk.tokens as f64 / walk.seconds,
    })
}

struct Walk<'a> {
    model: &'a Model,
    options: &'a LongContextOptions,
    progress: &'a (dyn Fn(usize) + Sync),
    points: Vec<ContextPoint>,
    tokens: usize,
    seconds: f64,
}

impl Walk<'_> {
    /// Reads `ids`, stopping to measure at every mark; the last hidden state if there were any.
    fn read(
        &mut self,
        mut ids: &[u32],
        cache: &mut Cache,
        marks: &[usize],
    ) -> Result<Option<Tensor>> {
        let mut last = None;
        while !ids.is_empty() {
            let position = cache.position(0);
            let next = marks.get(self.points.len()).copied();
            let until_mark = next.map_or(ids.len(), |mark| mark.saturating_sub(position));
            let (now, later) = ids.split_at(until_mark.min(ids.len()));
            ids = later;
            let started = Instant::now();
            let hidden = self.model.prefill(now, cache)?;
            self.seconds += started.elapsed().as_secs_f64();
            self.tokens += now.len();
            (self.progress)(now.len());
            if next == Some(cache.position(0)) {
                let speed = decode_speed(self.model, cache, &hidden, self.options.decode_steps)?;
                self.points.push(ContextPoint {
                    context_tokens: cache.position(0),
                    cache_bytes: cache.size_bytes(),
                    decode_tokens_per_s: speed.tokens_per_s,
                });
            }
            last = Some(hidden);
        }
        Ok(last)
    }
}
