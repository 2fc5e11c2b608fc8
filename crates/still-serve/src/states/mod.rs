//! States that are kept: what a model remembers of a sequence, to go on from.
//!
//! | file | content |
//! |---|---|
//! | `prefix` | beginnings of sequences, known by a hash chain over their chunks |
//! | `memory` | states in memory, bounded by their bytes |
//! | `store` | where states are kept besides: a folder, or a bucket of S3 |
//! | `kept` | states without a name in a store |
//! | `named` | states with a name |

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

/// A state that a client has named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateInfo {
    /// Its name.
    pub name: String,
    /// Tokens that it has read.
    pub tokens: usize,
    /// Bytes of its file.
    pub bytes: u64,
    /// When it was saved, in seconds since 1970.
    pub modified_unix_seconds: i64,
}

/// The states that clients have named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateList {
    /// By name.
    pub states: Vec<StateInfo>,
    /// Names of files in the store that are no states.
    pub damaged: Vec<String>,
}

/// What can go wrong with kept states.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// There is no such state.
    #[error("there is no state {0:?}")]
    NotFound(String),
    /// A name that no state can have.
    #[error(
        "a state's name has 1 to 128 of the characters A-Z, a-z, 0-9, '.', '_' and '-', and does not begin with '.'"
    )]
    InvalidName,
    /// States in memory would take too many bytes.
    #[error("states with names would take more than the {most} bytes that states may take")]
    Full {
        /// Bytes that they may take.
        most: u64,
    },
    /// The store failed.
    #[error("{action} the state store: {source}")]
    Store {
        /// What was attempted.
        action: &'static str,
        /// The store's word.
        source: object_store::Error,
    },
    /// The store takes too long.
    #[error("the state store does not answer within {} seconds", .0.as_secs_f64())]
    Slow(Duration),
    /// A folder for states that cannot be made.
    #[error("cannot make the folder {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A store of a kind that there is none of.
    #[error("a state store on {0:?} is not supported")]
    Scheme(String),
    /// A file that is damaged, or of another model or format; or a state that cannot be saved.
    #[error(transparent)]
    File(#[from] ModelError),
    /// A file that is not what its name says.
    #[error("the state file {0} is not what its name says")]
    Forged(String),
    /// A state whose file is whole, and after which a model computes no numbers.
    #[error("what the model computes after the state {0:?} is no numbers")]
    NoNumbers(String),
    /// A state without a name, of so many tokens, after which a model computes no numbers.
    #[error("what the model computes after a kept state of {0} tokens is no numbers")]
    KeptNoNumbers(usize),
    /// A computation that panicked.
    #[error("the computation failed: {0}")]
    Failed(String),
}

impl StateError {
    /// What can be done about it.
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

/// States that clients have named. All of it runs on the engine's own threads, whoever awaits it.
#[derive(Clone, Debug)]
pub struct States {
    pub(crate) named: Arc<NamedStates>,
    pub(crate) runtime: tokio::runtime::Handle,
}

impl States {
    /// All of them, by name.
    ///
    /// # Errors
    /// A store that fails.
    pub async fn list(&self) -> Result<StateList, StateError> {
        self.run(|named| async move { named.list().await }).await
    }

    /// One of them.
    ///
    /// # Errors
    /// No such state; a store that fails.
    pub async fn get(&self, name: &str) -> Result<StateInfo, StateError> {
        let name = name.to_owned();
        self.run(|named| async move { named.get(&name).await }).await
    }

    /// Reads a state's file as a request that continues it does.
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

    /// Makes a state `to` of what the state `from` is, in place of one that had this name.
    ///
    /// # Errors
    /// No such state; a name that no state can have; a store that fails.
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
