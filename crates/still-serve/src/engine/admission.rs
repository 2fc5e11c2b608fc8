//! Gives a request a cache: a kept state's, or an empty one.

use std::collections::HashSet;
use std::sync::Arc;

use still_model::SavedSequence;

use super::options::CHUNK;
use super::request::{Event, Failure};
use super::sequence::{Phase, Sequence};
use super::worker::{Message, Worker};
use crate::states::{Chain, Digest, Kept, Prefix, StateError};

/// Most prefixes in each half of [`Seen`].
const SEEN: usize = 1 << 16;

/// Prefixes of the last sequences, so that a state is kept where a new sequence diverges from an earlier one.
#[derive(Debug, Default)]
pub struct Seen {
    recent: HashSet<Digest>,
    earlier: HashSet<Digest>,
}

impl Seen {
    /// Number of whole chunks that a sequence shares with an earlier one.
    fn common_chunks(&self, chain: &Chain) -> usize {
        let seen =
            |digest: &&Digest| self.recent.contains(*digest) || self.earlier.contains(*digest);
        chain.after_chunks().iter().take_while(seen).count()
    }

    fn insert(&mut self, chain: &Chain) {
        if self.recent.len() > SEEN {
            self.earlier = std::mem::take(&mut self.recent);
        }
        self.recent.extend(chain.after_chunks());
    }
}

impl Worker {
    /// Begins a request.
    pub(super) fn begin(&mut self, mut sequence: Sequence) {
        let tokens = sequence.prompt_tokens as u64;
        self.shared.metrics.prompt_tokens.inc_by(tokens);
        if let Some(name) = sequence.continues.clone() {
            let (id, inbox, states) = (sequence.id, self.inbox.clone(), self.states.clone());
            self.states.runtime.spawn(async move {
                let state = states.named.load(&name).await;
                let _ = inbox.send(Message::Loaded { id, state });
            });
            sequence.phase = Phase::Looking;
            self.sequences.push(sequence);
            return;
        }
        if sequence.takes_states() {
            self.look_in_memory(&mut sequence);
            self.plan_states(&mut sequence);
            self.seen.insert(&sequence.chain);
            if self.wait_for_another(&mut sequence) {
                self.sequences.push(sequence);
                return;
            }
            if self.look_in_store(&mut sequence) {
                self.sequences.push(sequence);
                return;
            }
        }
        self.start_reading(&mut sequence);
        self.sequences.push(sequence);
    }

    /// Continues the state in memory with the longest prefix of the prompt, if there is one.
    fn look_in_memory(&mut self, sequence: &mut Sequence) {
        let Sequence { chain, tokens, prompt_tokens, .. } = &*sequence;
        let most = prompt_tokens - 1;
        let decoded = !self.options.deterministic;
        if let Some((prefix, kept)) = self.memory.longest(chain, tokens, most, decoded)
            && prefix.tokens > sequence.position()
        {
            self.restore(sequence, &prefix, &kept);
        }
    }

    /// Gives a sequence a kept state. Its empty cache is saved for the next sequence, because creating and freeing a cache takes
    /// a GPU's host as long as some layers.
    fn restore(&mut self, sequence: &mut Sequence, prefix: &Prefix, kept: &Kept) {
        match sequence.restore(kept, prefix.decoded) {
            Ok(before) if before.position(0) == 0 => self.spare = Some(before),
            Ok(_) => {}
            Err(error) => tracing::warn!("a kept state was not continued: {error}"),
        }
    }

    /// Searches the store for a longer prefix. Returns whether a search runs.
    fn look_in_store(&mut self, sequence: &mut Sequence) -> bool {
        let Some(store) = self.kept.clone() else { return false };
        let most = sequence.prompt_tokens - 1;
        if sequence.position() >= most {
            return false;
        }
        let Sequence { id, chain, tokens, .. } = &*sequence;
        let (id, chain, tokens) = (*id, chain.clone(), tokens.clone());
        let least = sequence.position();
        let (inbox, decoded) = (self.inbox.clone(), !self.options.deterministic);
        self.states.runtime.spawn(async move {
            let found = match store.longest(&chain, &tokens, (least, most), decoded).await {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!("no state from the store: {error}");
                    None
                }
            };
            let _ = inbox.send(Message::Looked { id, found });
        });
        sequence.phase = Phase::Looking;
        true
    }

    /// Plans where in the prompt to keep the state: at the end, and where the prompt diverges from an earlier sequence. A GPU
    /// reads a few hundred tokens in the time of a few, so it keeps no state that is so close to the continued one.
    pub(super) fn plan_states(&mut self, sequence: &mut Sequence) {
        let last = sequence.last_cut();
        let parts = self.seen.common_chunks(&sequence.chain) * CHUNK;
        let parts = sequence.cut_before(parts).min(last);
        let position = sequence.position();
        sequence.keep_at.insert(parts);
        if sequence.cuts.last || last - last.min(position) >= self.prefill_chunk {
            sequence.keep_at.insert(last);
        }
        sequence.keep_at.retain(|at| *at > position);
    }

    /// Makes a sequence wait if another one is about to read more of their common prefix than a kept state has.
    fn wait_for_another(&mut self, sequence: &mut Sequence) -> bool {
        let last = sequence.last_cut();
        let mut best: Option<(usize, usize)> = None;
        for (n, other) in self.sequences.iter().enumerate() {
            let common = other.chain.common_chunks(&sequence.chain) * CHUNK;
            let common = other.cut_before(common.min(other.prompt_tokens)).min(last);
            let ahead = match other.phase {
                Phase::Decoding => false,
                Phase::Looking if other.continues.is_some() => false,
                // Its position is that of a state, which may change.
                Phase::Looking | Phase::Waiting { .. } => other.takes_states(),
                Phase::Reading => other.takes_states() && common > other.position(),
            };
            if ahead && common > sequence.position() && best.is_none_or(|(_, most)| common > most) {
                best = Some((n, common));
            }
        }
        let Some((n, position)) = best else { return false };
        let other = &mut self.sequences[n];
        other.keep_at.insert(position);
        sequence.phase = Phase::Waiting { other: other.id, position };
        true
    }

    /// Handles the result of a search in the store. The sequence may be gone.
    pub(super) fn looked(&mut self, id: u64, found: Option<(Prefix, SavedSequence)>) {
        let found = found.and_then(|(prefix, saved)| {
            let tokens = saved.tokens.as_slice().into();
            match self.restored(saved) {
                Ok(cache) => Some((prefix, Kept { tokens, cache: Arc::new(cache) })),
                Err(error) => {
                    tracing::warn!("no state from the store: {error}");
                    self.kept.iter().for_each(|store| store.is_damaged(prefix));
                    None
                }
            }
        });
        if let Some((prefix, kept)) = &found {
            self.memory.insert(*prefix, kept.clone());
        }
        let Some(at) = self.sequences.iter().position(|sequence| sequence.id == id) else { return };
        let mut sequence = self.sequences.remove(at);
        if let Some((prefix, kept)) = found {
            self.restore(&mut sequence, &prefix, &kept);
        }
        let position = sequence.position();
        sequence.keep_at.retain(|at| *at > position);
        self.start_reading(&mut sequence);
        self.sequences.insert(at, sequence);
        // Who waits for it to read what it need not read finds the state in memory.
        self.wake_waiting(id);
    }

    /// Handles a named state that was read.
    pub(super) fn loaded(&mut self, id: u64, state: Result<SavedSequence, StateError>) {
        let Some(at) = self.sequences.iter().position(|sequence| sequence.id == id) else { return };
        let saved = match state {
            Ok(saved) if saved.rows == self.rows => saved,
            Ok(saved) => {
                let what = format!(
                    "the state stores exact rows as {:?}, the server as {:?}",
                    saved.rows, self.rows
                );
                return self.fail(at, still_model::ModelError::Invalid(what).into());
            }
            Err(error) => return self.fail(at, error.into()),
        };
        let read = saved.tokens.clone();
        let cache = match self.restored(saved) {
            Ok(cache) => cache,
            Err(error) => return self.fail(at, StateError::File(error).into()),
        };
        let sequence = &mut self.sequences[at];
        sequence.continue_from(&read, cache);
        let (tokens, new) = (sequence.prompt_tokens, sequence.max_new_tokens);
        if tokens + new > self.context {
            let what = format!(
                "a state and prompt of {tokens} tokens and {new} new ones exceed the context of {} tokens",
                self.context
            );
            return self.fail(at, Failure::TooLong(what));
        }
        sequence.chain = self.root.clone();
        sequence.chain.extend(&sequence.tokens);
        self.shared.metrics.prompt_tokens.inc_by(read.len() as u64);
        let mut sequence = self.sequences.remove(at);
        self.start_reading(&mut sequence);
        self.sequences.insert(at, sequence);
    }

    fn start_reading(&mut self, sequence: &mut Sequence) {
        sequence.phase = Phase::Reading;
        self.shared.metrics.tokens_spared.inc_by(sequence.cached as u64);
        let _ = sequence.events.send(Event::Started { cached_tokens: sequence.cached });
    }

    /// Wakes sequences that waited for tokens that `id` has read by now.
    pub(super) fn wake_waiting(&mut self, id: u64) {
        let reader = self.sequences.iter().find(|sequence| sequence.id == id);
        let read =
            reader.filter(|s| s.phase != Phase::Decoding).map_or(usize::MAX, |s| s.position());
        self.wake(|other, position| other == id && position <= read);
    }

    /// Wakes sequences that wait for one that is gone.
    pub(super) fn wake_orphans(&mut self) {
        let there: HashSet<u64> = self.sequences.iter().map(|sequence| sequence.id).collect();
        self.wake(|other, _| !there.contains(&other));
    }

    /// Searches again for a state for all waiting sequences for which `wakes(other, position)` is true.
    fn wake(&mut self, wakes: impl Fn(u64, usize) -> bool) {
        while let Some(at) = self.sequences.iter().position(|sequence| {
            matches!(sequence.phase, Phase::Waiting { other, position } if wakes(other, position))
        }) {
            let mut sequence = self.sequences.remove(at);
            self.look_in_memory(&mut sequence);
            let position = sequence.position();
            sequence.keep_at.retain(|at| *at > position);
            // Only on sequences before it, so that none waits for itself.
            let later = self.sequences.split_off(at);
            let waits = self.wait_for_another(&mut sequence);
            self.sequences.extend(later);
            if !waits {
                self.start_reading(&mut sequence);
            }
            self.sequences.insert(at, sequence);
        }
    }

    /// Keeps a state in memory, and in the store if there is one.
    pub(super) fn keep(&mut self, prefix: Prefix, kept: Kept) {
        if let Some(store) = self.kept.clone() {
            match SavedSequence::of(&kept.tokens, self.rows, &kept.cache) {
                Ok(saved) => {
                    let write = Arc::clone(&self.writes);
                    self.states.runtime.spawn(async move {
                        let _write = write;
                        if let Err(error) = store.put(prefix, saved).await {
                            tracing::warn!("a state was not written: {error}");
                        }
                    });
                }
                Err(error) => tracing::warn!("a state was not written: {error}"),
            }
        }
        self.memory.insert(prefix, kept);
    }
}
