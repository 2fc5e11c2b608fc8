//! A store of states: a folder, or an S3 bucket.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig};

use super::StateError;

/// An object store, and the prefix of its states.
#[derive(Clone)]
pub struct StateStore {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
}

impl fmt::Debug for StateStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.store, self.prefix)
    }
}

/// Clients wait for a bucket, so a request to it fails after seconds, not after the default of three minutes.
fn retries() -> RetryConfig {
    RetryConfig { max_retries: 3, retry_timeout: Duration::from_secs(5), ..RetryConfig::default() }
}

impl StateStore {
    /// Objects of `store` whose names begin with `prefix`.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &str) -> Self {
        Self { store, prefix: Path::from(prefix) }
    }

    /// `s3://BUCKET/PREFIX`, with the credentials, region and endpoint of the environment (`AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`, `AWS_ALLOW_HTTP`), or a folder, which is made if it is not there.
    ///
    /// # Errors
    /// A folder that cannot be made; settings of S3 that are missing or wrong.
    pub fn open(location: &str) -> Result<Self, StateError> {
        let failed = |source| StateError::Store { action: "cannot open", source };
        if let Some(rest) = location.strip_prefix("s3://") {
            // An error says that another provider is installed already, which is as good.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let store = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retries());
            let store = store.build();
            return Ok(Self::new(Arc::new(store.map_err(failed)?), prefix));
        }
        if let Some((scheme, _)) = location.split_once("://") {
            return Err(StateError::Scheme(scheme.into()));
        }
        let made = std::fs::create_dir_all(location);
        made.map_err(|source| StateError::Folder { path: location.into(), source })?;
        let store = LocalFileSystem::new_with_prefix(location).map_err(failed)?;
        Ok(Self::new(Arc::new(store.with_fsync(true)), ""))
    }

    /// A store in this process's memory.
    pub fn in_memory() -> Self {
        Self::new(Arc::new(InMemory::new()), "")
    }

    /// The objects below `part`.
    pub(crate) fn below(&self, part: &str) -> Self {
        Self { store: Arc::clone(&self.store), prefix: self.prefix.clone().join(part) }
    }

    pub(crate) fn path(&self, name: &str) -> Path {
        self.prefix.clone().join(name)
    }

    /// The bytes of an object; none if there is no such object.
    pub(crate) async fn get(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let read = async { self.store.get(&self.path(name)).await?.bytes().await };
        match read.await {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(StateError::Store { action: "cannot read", source }),
        }
    }

    /// Some bytes of an object; none if there is no such object.
    pub(crate) async fn get_range(
        &self,
        name: &str,
        range: std::ops::Range<u64>,
    ) -> Result<Option<Vec<u8>>, StateError> {
        match self.store.get_range(&self.path(name), range).await {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(StateError::Store { action: "cannot read", source }),
        }
    }

    /// Writes an object atomically.
    pub(crate) async fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), StateError> {
        let put = self.store.put(&self.path(name), PutPayload::from(bytes)).await;
        put.map(|_| ()).map_err(|source| StateError::Store { action: "cannot write", source })
    }

    /// Copies `from` to `to`. Returns whether `from` exists.
    pub(crate) async fn copy(&self, from: &str, to: &str) -> Result<bool, StateError> {
        match self.store.copy(&self.path(from), &self.path(to)).await {
            Ok(()) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(StateError::Store { action: "cannot write", source }),
        }
    }

    /// Removes an object. Returns whether it existed.
    pub(crate) async fn delete(&self, name: &str) -> Result<bool, StateError> {
        if self.head(name).await?.is_none() {
            return Ok(false);
        }
        match self.store.delete(&self.path(name)).await {
            Ok(()) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(StateError::Store { action: "cannot remove", source }),
        }
    }

    pub(crate) async fn head(&self, name: &str) -> Result<Option<ObjectMeta>, StateError> {
        match self.store.head(&self.path(name)).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(StateError::Store { action: "cannot read", source }),
        }
    }

    /// All objects directly below the prefix: names and metadata.
    pub(crate) async fn list(&self) -> Result<Vec<(String, ObjectMeta)>, StateError> {
        let listed = self.store.list_with_delimiter(Some(&self.prefix)).await;
        let listed =
            listed.map_err(|source| StateError::Store { action: "cannot list", source })?;
        let name = |meta: ObjectMeta| Some((meta.location.filename()?.to_owned(), meta));
        Ok(listed.objects.into_iter().filter_map(name).collect())
    }
}
