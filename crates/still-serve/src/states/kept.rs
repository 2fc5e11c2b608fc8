//! Kept states in a store, found by their prefix.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use still_attention::RowDtype;
use still_model::SavedSequence;

use super::StateError;
use super::prefix::{Chain, Prefix, PrefixIndex};
use super::store::StateStore;

/// After a failure or timeout the store is not asked for this long, so that answers do not wait for it repeatedly.
const REST: Duration = Duration::from_secs(15);
/// Factor of the time limit of a write, compared with a read: the client already has the answer's text.
const WRITES: u32 = 3;

/// The states of one model in a store that others may share.
#[derive(Debug)]
pub(crate) struct KeptStates {
    identity: String,
    rows: RowDtype,
    store: StateStore,
    most_bytes: u64,
    /// Time limit of a read.
    patience: Duration,
    /// When the store last failed.
    failed: Mutex<Option<Instant>>,
    /// Only one task at a time lists the store.
    listing: tokio::sync::Mutex<Listing>,
    /// Names of damaged files.
    damaged: Mutex<HashSet<Prefix>>,
    /// Bytes of files that are being written.
    writing: AtomicU64,
}

/// A write in progress. Its bytes count until it has succeeded or failed.
struct Writing<'a> {
    all: &'a AtomicU64,
    bytes: u64,
}

impl<'a> Writing<'a> {
    fn begin(all: &'a AtomicU64, bytes: u64) -> Self {
        all.fetch_add(bytes, Ordering::SeqCst);
        Self { all, bytes }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

#[derive(Debug, Default)]
struct Listing {
    listed: Option<Instant>,
    index: PrefixIndex<()>,
}

impl KeptStates {
    pub fn new(
        identity: String,
        rows: RowDtype,
        store: &StateStore,
        (most_bytes, patience): (u64, Duration),
    ) -> Self {
        let store = store.below(&identity).below("kept");
        Self {
            identity,
            rows,
            store,
            most_bytes,
            patience,
            failed: Mutex::default(),
            listing: tokio::sync::Mutex::default(),
            damaged: Mutex::default(),
            writing: AtomicU64::new(0),
        }
    }

    /// The state that has read the most of `tokens`, more than `least` and at most `most`; `decoded`: whether decode steps may have
    /// computed it. None while the store rests.
    pub async fn longest(
        &self,
        chain: &Chain,
        tokens: &[u32],
        within: (usize, usize),
        decoded: bool,
    ) -> Result<Option<(Prefix, SavedSequence)>, StateError> {
        let found = self.unless_it_rests(self.patience, self.look(chain, tokens, within, decoded));
        Ok(found.await?.flatten())
    }

    /// Writes a state, unless the store has it or is paused.
    pub async fn put(&self, prefix: Prefix, saved: SavedSequence) -> Result<(), StateError> {
        let written = self.unless_it_rests(self.patience * WRITES, self.write(prefix, saved));
        written.await.map(|_| ())
    }

    /// Runs an operation on the store within a time limit, or nothing while the store is paused.
    async fn unless_it_rests<T>(
        &self,
        patience: Duration,
        work: impl Future<Output = Result<T, StateError>>,
    ) -> Result<Option<T>, StateError> {
        let failed = || self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed().is_some_and(|failed| failed.elapsed() < REST) {
            return Ok(None);
        }
        let done = tokio::time::timeout(patience, work).await;
        let done = done.unwrap_or(Err(StateError::Slow(patience)));
        if let Err(StateError::Store { .. } | StateError::Slow(_)) = &done {
            *failed() = Some(Instant::now());
        }
        done.map(Some)
    }

    async fn look(
        &self,
        chain: &Chain,
        tokens: &[u32],
        (least, most): (usize, usize),
        decoded: bool,
    ) -> Result<Option<(Prefix, SavedSequence)>, StateError> {
        let asked = Instant::now();
        let found = {
            let mut listing = self.listing.lock().await;
            // Others that asked at the same time share one listing.
            if listing.listed.is_none_or(|listed| listed < asked) {
                let begun = Instant::now();
                let files = self.store.list().await?;
                let known = files.iter().filter_map(|(name, _)| Prefix::of_file_name(name));
                let mut index = PrefixIndex::default();
                known.for_each(|prefix| _ = index.insert(prefix, ()));
                *listing = Listing { listed: Some(begun), index };
            }
            let damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
            let takes = |prefix: &Prefix| {
                prefix.tokens > least && (decoded || !prefix.decoded) && !damaged.contains(prefix)
            };
            listing.index.longest(chain, tokens, most, takes).map(|(prefix, ())| *prefix)
        };
        let Some(prefix) = found else { return Ok(None) };
        let name = prefix.file_name();
        // Another replica may have removed it meanwhile.
        let Some(bytes) = self.store.get(&name).await? else { return Ok(None) };
        let identity = self.identity.clone();
        let path = PathBuf::from(self.store.path(&name).as_ref());
        let decode = move || SavedSequence::decode(&identity, &path, &bytes);
        let saved = match tokio::task::spawn_blocking(decode).await {
            Ok(Ok(saved)) => saved,
            Ok(Err(error)) => {
                self.is_damaged(prefix);
                return Err(StateError::File(error));
            }
            Err(panic) => return Err(StateError::Failed(panic.to_string())),
        };
        let fits = saved.rows == self.rows && saved.tokens.len() == prefix.tokens;
        if !fits || !tokens.starts_with(&saved.tokens) {
            self.is_damaged(prefix);
            return Err(StateError::Forged(name));
        }
        Ok(Some((prefix, saved)))
    }

    /// Marks a file as damaged. It is not read again until it is overwritten.
    pub fn is_damaged(&self, prefix: Prefix) {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner).insert(prefix);
    }

    async fn write(&self, prefix: Prefix, saved: SavedSequence) -> Result<(), StateError> {
        let name = prefix.file_name();
        let damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner).remove(&prefix);
        if !damaged && self.store.head(&name).await?.is_some() {
            return Ok(());
        }
        let bytes = encode(&self.identity, saved).await?;
        let _writing = Writing::begin(&self.writing, bytes.len() as u64);
        self.make_room().await?;
        self.store.put(&name, bytes).await
    }

    /// Removes the oldest files until all that are being written fit.
    async fn make_room(&self) -> Result<(), StateError> {
        // Before the list: a file that gets complete meanwhile counts twice, and not never.
        let writing = self.writing.load(Ordering::SeqCst);
        let mut files = self.store.list().await?;
        files.retain(|(name, _)| Prefix::of_file_name(name).is_some());
        let mut bytes = writing + files.iter().map(|(_, meta)| meta.size).sum::<u64>();
        if bytes <= self.most_bytes {
            return Ok(());
        }
        files.sort_by_key(|(_, meta)| meta.last_modified);
        for (name, meta) in files {
            if bytes <= self.most_bytes {
                break;
            }
            self.store.delete(&name).await?;
            bytes -= meta.size;
        }
        Ok(())
    }
}

/// The bytes of a state's file, made on a thread of its own.
pub(super) async fn encode(identity: &str, saved: SavedSequence) -> Result<Vec<u8>, StateError> {
    let identity = identity.to_owned();
    match tokio::task::spawn_blocking(move || saved.encode(&identity)).await {
        Ok(bytes) => Ok(bytes?),
        Err(panic) => Err(StateError::Failed(panic.to_string())),
    }
}
