//! The end of a sequence: keeps its state and reports to the client.

use std::sync::Arc;

use still_model::{Finish, SavedSequence};

use super::metrics::Outcome;
use super::request::{Event, Failure};
use super::sequence::Sequence;
use super::worker::Worker;
use crate::states::{Kept, Prefix, StateError};

impl Worker {
    /// Ends a sequence that was served. Its state is kept, and the client gets [`Event::Done`] once every replica can find the
    /// state.
    pub(super) fn finish(&mut self, at: usize, finish: Finish, text: String) {
        let mut sequence = self.sequences.remove(at);
        let usage = sequence.usage(&self.model);
        sequence.chain.extend(&sequence.tokens);
        let position = sequence.position();
        let Sequence { events, tokens, chain, cache, decoded, save_as, arrived, .. } = sequence;
        let keeps = sequence.prompt_logprobs.is_none()
            && decoded
            && !self.options.deterministic
            && position > 0;
        let prefix = chain.prefix(&tokens, position, decoded);
        let kept = Kept { tokens: tokens[..position].into(), cache: Arc::new(cache) };
        let writes =
            Writes { prefix: Some(prefix).filter(|_| keeps && self.kept.is_some()), name: save_as };
        // Here, where the cache's device is used by nobody else.
        let saved = match writes.prefix.is_some() || writes.name.is_some() {
            true => Some(SavedSequence::of(&kept.tokens, self.rows, &kept.cache)),
            false => None,
        };
        if keeps {
            self.memory.insert(prefix, kept);
        }
        self.ended(Outcome::Done, Some(arrived.elapsed()));
        let done = Event::Done { finish, text, usage };
        let Some(saved) = saved else {
            let _ = events.send(done);
            return;
        };
        let saved = match saved {
            Ok(saved) => saved,
            Err(error) => {
                let _ = events.send(Event::Failed(error.into()));
                return;
            }
        };
        let (write, store, states) =
            (Arc::clone(&self.writes), self.kept.clone(), self.states.clone());
        self.states.runtime.spawn(async move {
            let _write = write;
            let Writes { prefix, name } = writes;
            if let (Some(prefix), Some(store)) = (prefix, store)
                && let Err(error) = store.put(prefix, saved.clone()).await
            {
                tracing::warn!("a state was not written: {error}");
            }
            let saved = match name {
                Some(name) => states.named.save(&name, saved).await,
                None => Ok(()),
            };
            let _ = events.send(match saved {
                Ok(()) => done,
                Err(error) => Event::Failed(error.into()),
            });
        });
    }

    /// Interrupts a sequence.
    pub(super) fn interrupt(&mut self, at: usize) {
        let sequence = self.sequences.remove(at);
        let usage = sequence.usage(&self.model);
        let finish = Finish::Interrupted;
        let _ = sequence.events.send(Event::Done { finish, text: String::new(), usage });
        self.ended(Outcome::Done, None);
    }

    /// Fails a sequence.
    pub(super) fn fail(&mut self, at: usize, failure: Failure) {
        if matches!(failure, Failure::State(StateError::KeptNoNumbers(_))) {
            self.forget_states_of(at);
        }
        let sequence = self.sequences.remove(at);
        let _ = sequence.events.send(Event::Failed(failure));
        self.ended(Outcome::Failed, None);
        self.wake_orphans();
    }
}

/// The place of a state.
struct Writes {
    /// In the store, found by its prefix.
    prefix: Option<Prefix>,
    name: Option<String>,
}
