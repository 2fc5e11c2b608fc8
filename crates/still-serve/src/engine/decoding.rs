//! Decode steps of all sequences together.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use still_model::{Cache, ModelError};

use super::request::Failure;
use super::sequence::{Phase, Sequence};
use super::worker::Worker;

impl Worker {
    /// Feeds every sequence that is continued its last token, and chooses the next.
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
        shared.metrics.decode_steps.inc();
        let failed = match step {
            Ok(Ok(())) => {
                let logits = workspace.logits();
                let width = logits.len() / ids.len();
                let mut ended = Vec::new();
                for (sequence, logits) in continued.into_iter().zip(logits.chunks_exact(width)) {
                    sequence.decoded = true;
                    sequence.tokens.push(sequence.next);
                    match sequence.choose(logits, &shared.metrics) {
                        Ok(None) => {}
                        Ok(Some((finish, text))) => ended.push((sequence.id, Ok((finish, text)))),
                        Err(failure) => ended.push((sequence.id, Err(failure))),
                    }
                }
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
        *workspace = Default::default();
        while let Some(at) = self.sequences.iter().position(|s| s.phase == Phase::Decoding) {
            self.fail(at, failed());
        }
    }
}

/// What a panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".into())
}
