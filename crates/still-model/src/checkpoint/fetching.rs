//! Files of a hub, from its cache or fetched into it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use hf_hub::CacheRepo;
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiError, ApiRepo};

/// The progress of a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched<'a> {
    /// Its name in its repository.
    pub file: &'a str,
    /// Bytes that have arrived.
    pub bytes: u64,
    /// Bytes of the whole file.
    pub of: u64,
    /// Bytes that an earlier try had fetched. `bytes` starts from it.
    pub before: u64,
}

type Listener = dyn Fn(Fetched<'_>) + Send + Sync;

/// A callback for the progress of downloads. Clones share it; the default does nothing.
#[derive(Clone, Default)]
pub struct OnFetch(Option<Arc<Listener>>);

impl OnFetch {
    /// Calls `listener`.
    pub fn new(listener: impl Fn(Fetched<'_>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(listener)))
    }

    /// A file from the hub's cache, else fetched, from where an earlier try ended.
    pub(super) fn get(
        &self,
        cached: &CacheRepo,
        repo: &ApiRepo,
        file: &str,
    ) -> Result<PathBuf, ApiError> {
        match cached.get(file) {
            Some(path) => Ok(path),
            None => {
                let told = Told { on_fetch: self, file, of: 0, bytes: 0, before: None };
                repo.download_with_progress(file, told)
            }
        }
    }
}

impl fmt::Debug for OnFetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "OnFetch(…)" } else { "OnFetch" })
    }
}

/// A download, as the hub's library tells of it.
struct Told<'a> {
    on_fetch: &'a OnFetch,
    file: &'a str,
    of: u64,
    bytes: u64,
    /// Unknown before the library has told it, as the first bytes that came.
    before: Option<u64>,
}

impl Progress for Told<'_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.of, self.bytes, self.before) = (size as u64, 0, None);
    }

    fn update(&mut self, size: usize) {
        self.bytes += size as u64;
        let before = *self.before.get_or_insert(self.bytes);
        if let Some(listener) = &self.on_fetch.0 {
            listener(Fetched { file: self.file, bytes: self.bytes, of: self.of, before });
        }
    }

    fn finish(&mut self) {}
}
