//! States in memory, in an LRU cache.

use std::sync::Arc;

use still_model::Cache;

use super::prefix::{Chain, Prefix, PrefixIndex};

/// A state and its tokens.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub tokens: Arc<[u32]>,
    pub cache: Arc<Cache>,
}

#[derive(Debug)]
struct Entry {
    kept: Kept,
    bytes: usize,
    used: u64,
}

/// States, up to a number of bytes.
#[derive(Debug)]
pub(crate) struct Memory {
    index: PrefixIndex<Entry>,
    bytes: usize,
    states: usize,
    most_bytes: usize,
    clock: u64,
}

impl Memory {
    pub fn new(most_bytes: usize) -> Self {
        Self { index: PrefixIndex::default(), bytes: 0, states: 0, most_bytes, clock: 0 }
    }

    /// Keeps a state, unless it alone exceeds the limit.
    pub fn insert(&mut self, prefix: Prefix, kept: Kept) {
        let bytes = kept.cache.size_bytes() + size_of_val(&*kept.tokens);
        if bytes > self.most_bytes {
            return;
        }
        self.remove(&prefix);
        while self.bytes + bytes > self.most_bytes {
            let oldest = self.index.iter().min_by_key(|(_, entry)| entry.used);
            let Some(oldest) = oldest.map(|(prefix, _)| *prefix) else { break };
            self.remove(&oldest);
        }
        self.clock += 1;
        self.index.insert(prefix, Entry { kept, bytes, used: self.clock });
        (self.bytes, self.states) = (self.bytes + bytes, self.states + 1);
    }

    fn remove(&mut self, prefix: &Prefix) {
        if let Some(entry) = self.index.remove(prefix) {
            (self.bytes, self.states) = (self.bytes - entry.bytes, self.states - 1);
        }
    }

    /// Removes the states of prefixes of `tokens` with at least `least` tokens, and returns them.
    pub fn remove_from(&mut self, chain: &Chain, tokens: &[u32], least: usize) -> Vec<Prefix> {
        let mut removed = Vec::new();
        let takes = |prefix: &Prefix| prefix.tokens >= least;
        while let Some((prefix, _)) = self.index.longest(chain, tokens, tokens.len(), takes) {
            let prefix = *prefix;
            self.remove(&prefix);
            removed.push(prefix);
        }
        removed
    }

    /// Whether there is a state of this prefix. It counts as used.
    pub fn touch(&mut self, prefix: &Prefix) -> bool {
        let Some(mut entry) = self.index.remove(prefix) else { return false };
        self.clock += 1;
        entry.used = self.clock;
        self.index.insert(*prefix, entry);
        true
    }

    /// The state with the longest prefix of `tokens`, at most `most` tokens. `decoded`: whether decode steps may have computed it.
    pub fn longest(
        &mut self,
        chain: &Chain,
        tokens: &[u32],
        most: usize,
        decoded: bool,
    ) -> Option<(Prefix, Kept)> {
        let takes = |prefix: &Prefix| prefix.tokens > 0 && (decoded || !prefix.decoded);
        let (prefix, entry) = self.index.longest(chain, tokens, most, takes)?;
        if !tokens.starts_with(&entry.kept.tokens) {
            return None;
        }
        let found = (*prefix, entry.kept.clone());
        self.touch(&found.0);
        Some(found)
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn len(&self) -> usize {
        self.states
    }
}
