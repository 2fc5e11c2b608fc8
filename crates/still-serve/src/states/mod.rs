//! Kept states: what a model has computed of a sequence, for later requests to continue.
//!
//! | file | content |
//! |---|---|
//! | `prefix` | prefixes of sequences, identified by a hash chain over chunks |
//! | `memory` | states in memory, up to a number of bytes |
//! | `store` | a folder or an S3 bucket with states |
//! | `kept` | states in a store, found by their prefix |
//! | `named` | states under names |

mod kept;
mod memory;
mod named;
mod prefix;
mod store;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use still_model::ModelError;

pub(crate) use kept::KeptStates;
pub(crate) use memory::{Kept, Memory};
pub(crate) use named::{NamedStates, check_name};
pub(crate) use prefix::{Chain, Digest, Prefix};
pub use store::StateStore;

/// A state under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateInfo {
    /// Its name.
    pub name: String,
    /// Tokens of its sequence.
    pub tokens: usize,
    /// Bytes of its file.
    pub bytes: u64,
    /// Time of saving, in seconds since 1970.
    pub modified_unix_seconds: i64,
}

/// All states under names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateList {
    /// Sorted by name.
    pub states: Vec<StateInfo>,
    /// Names of damaged files in the store.
    pub damaged: Vec<String>,
}

/// Errors of kept states.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// There is no such state.
    #[error("there is no state {0:?}")]
    NotFound(String),
    /// An invalid name.
    #[error(
        "a state's name has 1 to 128 of the characters A-Z, a-z, 0-9, '.', '_' and '-', and does not begin with '.'"
    )]
    InvalidName,
    /// The states in memory would exceed their limit.
    #[error("states with names would take more than the {most} bytes that states may take")]
    Full {
        /// The limit in bytes.
        most: u64,
    },
    /// The store failed.
    #[error("{action} the state store: {source}")]
    Store {
        /// What was attempted.
        action: &'static str,
        /// The store's error.
        source: object_store::Error,
    },
    /// The store did not answer in time.
    #[error("the state store does not answer within {} seconds", .0.as_secs_f64())]
    Slow(Duration),
    /// The folder for states cannot be created.
    #[error("cannot make the folder {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// An unknown kind of store.
    #[error("a state store on {0:?} is not supported")]
    Scheme(String),
    /// A file that is damaged or of another model or format; a state that cannot be saved.
    #[error(transparent)]
    File(#[from] ModelError),
    /// A file with another state than its name says.
    #[error("the state file {0} is not what its name says")]
    Forged(String),
    /// A named state whose file is complete, but after which the model computes NaN.
    #[error("what the model computes after the state {0:?} is no numbers")]
    NoNumbers(String),
    /// A state without a name, of so many tokens, after which the model computes NaN.
    #[error("what the model computes after a kept state of {0} tokens is no numbers")]
    KeptNoNumbers(usize),
    /// A computation that panicked.
    #[error("the computation failed: {0}")]
    Failed(String),
}

impl StateError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::File(error) => error.hint(),
            Self::Full { .. } => Some("remove a state, or give the server a state store".into()),
            Self::Store { .. } | Self::Slow(_) => {
                Some("check that the store is there and may be read and written".into())
            }
            Self::Scheme(_) => Some("give a folder, or s3://BUCKET/PREFIX".into()),
            Self::Forged(_) => Some("remove the file".into()),
            Self::NoNumbers(_) => Some("remove the state, and save it again".into()),
            Self::KeptNoNumbers(_) => Some("ask again: the state is not used any more".into()),
            Self::Folder { .. } => Some("check the path and its permissions".into()),
            Self::NotFound(_) | Self::InvalidName | Self::Failed(_) => None,
        }
    }
}

/// The named states of an engine. All work runs on the engine's threads, whichever runtime awaits it.
#[derive(Clone, Debug)]
pub struct States {
    pub(crate) named: Arc<NamedStates>,
    pub(crate) runtime: tokio::runtime::Handle,
}

impl States {
    /// Lists all of them by name.
    ///
    /// # Errors
    /// A store that fails.
    pub async fn list(&self) -> Result<StateList, StateError> {
        self.run(|named| async move { named.list().await }).await
    }

    /// Describes one of them.
    ///
    /// # Errors
    /// No such state; a store that fails.
    pub async fn get(&self, name: &str) -> Result<StateInfo, StateError> {
        let name = name.to_owned();
        self.run(|named| async move { named.get(&name).await }).await
    }

    /// Reads a state's file, as a request that continues the state does.
    ///
    /// # Errors
    /// No such state; a file that is damaged, or of another model or format.
    pub async fn restore(&self, name: &str) -> Result<StateInfo, StateError> {
        let name = name.to_owned();
        let load = |named: Arc<NamedStates>| async move {
            named.load(&name).await?;
            named.get(&name).await
        };
        self.run(load).await
    }

    /// Copies the state `from` to the name `to`, replacing a state of that name.
    ///
    /// # Errors
    /// No such state; an invalid name; a store that fails.
    pub async fn fork(&self, from: &str, to: &str) -> Result<StateInfo, StateError> {
        let (from, to) = (from.to_owned(), to.to_owned());
        self.run(|named| async move { named.fork(&from, &to).await }).await
    }

    /// Removes a state.
    ///
    /// # Errors
    /// No such state; a store that fails.
    pub async fn delete(&self, name: &str) -> Result<(), StateError> {
        let name = name.to_owned();
        self.run(|named| async move { named.delete(&name).await }).await
    }

    async fn run<T, F>(&self, work: impl FnOnce(Arc<NamedStates>) -> F) -> Result<T, StateError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StateError>> + Send + 'static,
    {
        let done = self.runtime.spawn(work(Arc::clone(&self.named))).await;
        done.unwrap_or_else(|failed| Err(StateError::Failed(failed.to_string())))
    }
}
