//! Decode steps of all running sequences together.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rayon::prelude::*;
use still_model::{Cache, Finish, ModelError};

use super::metrics::Metrics;
use super::request::Failure;
use super::sequence::{Phase, Sequence};
use super::worker::Worker;

impl Worker {
    /// Feeds every running sequence its last token and chooses the next one.
    pub(super) fn decode_a_step(&mut self) {
        let Self { sequences, model, workspace, shared, .. } = self;
        let mut continued: Vec<&mut Sequence> =
            sequences.iter_mut().filter(|s| s.phase == Phase::Decoding).collect();
        if continued.is_empty() {
            return;
        }
        let ids: Vec<u32> = continued.iter().map(|sequence| sequence.next).collect();
        let mut caches: Vec<&mut Cache> =
            continued.iter_mut().map(|sequence| &mut sequence.cache).collect();
        let step = catch_unwind(AssertUnwindSafe(|| {
            model.decode_many(&ids, &mut caches, workspace).map(|_| ())
        }));
        let step = step.map(|fed| fed.and_then(|()| workspace.logits()));
        shared.metrics.decode_steps.inc();
        let failed = match step {
            Ok(Ok(logits)) => {
                let ended = choose(continued, logits, &shared.metrics);
                for (id, end) in ended {
                    let Some(at) = self.sequences.iter().position(|s| s.id == id) else { continue };
                    match end {
                        Ok((finish, text)) => self.finish(at, finish, text),
                        Err(failure) => self.fail(at, failure),
                    }
                }
                return;
            }
            Ok(Err(error)) => {
                let text = error.to_string();
                Box::new(move || Failure::Model(ModelError::Invalid(text.clone())))
                    as Box<dyn Fn() -> Failure>
            }
            Err(panic) => {
                let text = panic_text(&*panic);
                Box::new(move || Failure::Panicked(text.clone()))
            }
        };
        // No cache of the step can be trusted.
        self.workspace.reset();
        while let Some(at) = self.sequences.iter().position(|s| s.phase == Phase::Decoding) {
            self.fail(at, failed());
        }
    }
}

/// The end of a sequence: its reason and the rest of the text, or a failure.
type End = Result<(Finish, String), Failure>;

/// Chooses the next token of each sequence from its row of the logits. Returns the ids of sequences that have ended.
fn choose(continued: Vec<&mut Sequence>, logits: &[f32], metrics: &Metrics) -> Vec<(u64, End)> {
    let width = logits.len() / continued.len();
    let choose = |(sequence, logits): (&mut Sequence, &[f32])| {
        sequence.decoded = true;
        sequence.tokens.push(sequence.next);
        let end = sequence.choose(logits, metrics).transpose()?;
        Some((sequence.id, end))
    };
    let rows = continued.into_iter().zip(logits.chunks_exact(width));
    // A grammar's masks take more stack than the threads of the pool have.
    let (grammars, others): (Vec<_>, Vec<_>) = rows.partition(|(s, _)| s.sampler.is_constrained());
    let mut ended: Vec<(u64, End)> = others.into_par_iter().filter_map(choose).collect();
    ended.extend(grammars.into_iter().filter_map(choose));
    ended
}

/// The message of a panic.
pub fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".into())
}
