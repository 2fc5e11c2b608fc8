//! Greedy generation of several sequences, one token of each at a time.

use std::time::Instant;

use candle_core::{IndexOp, Tensor};

use crate::cache::Cache;
use crate::error::{ModelError, Result};
use crate::generate::{Finish, Generation};
use crate::model::Model;
use crate::sampler::{any_nan, likeliest};

/// Tokens of prompts in one prefill pass.
const ROWS: usize = 16 * 1024;

/// Continues every prompt with its likeliest tokens. The result is that of [`generate`](crate::generate()), up to rounding. A
/// sequence that has ended stays in the batch until the last one ends; its further tokens are dropped.
///
/// * `cache`: empty, with one sequence for each prompt.
/// * `max_new_tokens`: for each prompt.
///
/// # Errors
/// An empty prompt, an id outside the vocabulary, a cache that holds something or is of another batch or model.
pub fn generate_together(
    model: &Model,
    prompts: &[&[u32]],
    max_new_tokens: &[usize],
    cache: &mut Cache,
) -> Result<Vec<Generation>> {
    let batch = prompts.len();
    model.check_cache(cache, batch)?;
    let fresh = (0..batch).all(|sequence| cache.position(sequence) == 0);
    if !fresh || max_new_tokens.len() != batch || prompts.iter().any(|prompt| prompt.is_empty()) {
        return Err(ModelError::Invalid(
            "sequences are generated together from prompts that are not empty, with an empty cache and a limit each".into(),
        ));
    }
    let start = Instant::now();
    let last = read(model, prompts, cache)?;
    let first = model.logits(&last)?.flatten_all()?.to_vec1::<f32>()?;
    let prefill_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut writings: Vec<Writing> =
        max_new_tokens.iter().map(|&most| Writing::new(most)).collect();
    let width = first.len() / batch;
    let take = |writings: &mut [Writing], logits: &[f32]| {
        let mut rows = writings.iter_mut().zip(logits.chunks_exact(width));
        rows.try_for_each(|(writing, logits)| writing.take(model, logits))
    };
    take(&mut writings, &first)?;
    while writings.iter().any(|writing| writing.finish.is_none()) {
        let ids: Vec<u32> = writings.iter().map(|writing| writing.next).collect();
        let logits = model.decode(&ids, cache)?;
        take(&mut writings, logits)?;
    }
    let decode_seconds = start.elapsed().as_secs_f64();
    let done = writings.into_iter().map(|writing| {
        Ok(Generation {
            text: model.tokenizer.decode(&writing.ids, true)?,
            fed: writing.ids.len().saturating_sub(1),
            ids: writing.ids,
            finish: writing.finish.unwrap_or(Finish::Length),
            warning: None,
            prefill_seconds,
            decode_seconds,
        })
    });
    done.collect()
}

/// Feeds the prompts; the hidden states of their last tokens, `[B, E]`.
fn read(model: &Model, prompts: &[&[u32]], cache: &mut Cache) -> Result<Tensor> {
    let batch = prompts.len();
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
    let piece = (ROWS / batch).max(1);
    let mut last = vec![None; batch];
    for start in (0..longest).step_by(piece) {
        let width = piece.min(longest - start);
        let part = |prompt: &&[u32]| prompt.len().saturating_sub(start).min(width);
        let lengths: Vec<usize> = prompts.iter().map(part).collect();
        let mut ids = vec![0_u32; batch * width];
        for ((row, prompt), &length) in ids.chunks_mut(width).zip(prompts).zip(&lengths) {
            if length > 0 {
                row[..length].copy_from_slice(&prompt[start..start + length]);
            }
        }
        let ids = Tensor::from_vec(ids, (batch, width), model.device())?;
        let whole = lengths.iter().all(|&length| length == width);
        let hidden = model.forward(&ids, cache, (!whole).then_some(&lengths))?;
        for (sequence, &length) in lengths.iter().enumerate() {
            if length > 0 && start + length == prompts[sequence].len() {
                last[sequence] = Some(hidden.i((sequence, length - 1..length))?);
            }
        }
    }
    let last: Vec<Tensor> = last.into_iter().flatten().collect();
    Ok(Tensor::cat(&last, 0)?)
}

/// One sequence.
struct Writing {
    ids: Vec<u32>,
    max_new_tokens: usize,
    /// What it is fed next.
    next: u32,
    finish: Option<Finish>,
}

impl Writing {
    fn new(max_new_tokens: usize) -> Self {
        let finish = (max_new_tokens == 0).then_some(Finish::Length);
        Self { ids: Vec::new(), max_new_tokens, next: 0, finish }
    }

    /// Takes the most likely token, unless the sequence has ended.
    fn take(&mut self, model: &Model, logits: &[f32]) -> Result<()> {
        if self.finish.is_some() {
            return Ok(());
        }
        if any_nan(logits) {
            return Err(ModelError::Invalid(
                "the model's logits are not numbers: its weights are damaged".into(),
            ));
        }
        self.next = likeliest(logits);
        if model.config().eos_token_ids.contains(&self.next) {
            self.finish = Some(Finish::EndOfSequence);
            return Ok(());
        }
        self.ids.push(self.next);
        if self.ids.len() == self.max_new_tokens {
            self.finish = Some(Finish::Length);
        }
        Ok(())
    }
}
