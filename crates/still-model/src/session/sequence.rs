//! A sequence and its state, as the bytes of a session without messages.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use still_attention::RowDtype;

use super::file;
use crate::cache::Cache;
use crate::error::{ModelError, Result};
use crate::tensor_file::{decode_tensors, encode_tensors};

/// A sequence and the state after it, in the host's memory. The state may come from any device and go to any other.
///
/// Its bytes are those of a [session](crate::ChatSession) without messages: versioned, with a digest, and tied to the model.
#[derive(Clone, Debug)]
pub struct SavedSequence {
    /// Tokens that the state has read.
    pub tokens: Vec<u32>,
    /// Dtype of the state's exact rows.
    pub rows: RowDtype,
    /// [`Cache::save`].
    state: HashMap<String, Tensor>,
    /// Its name in errors.
    path: PathBuf,
}

impl SavedSequence {
    /// Saves the cache of one sequence that has read `tokens`.
    ///
    /// # Errors
    /// An error of the device.
    pub fn of(tokens: &[u32], rows: RowDtype, cache: &Cache) -> Result<Self> {
        Ok(Self { tokens: tokens.to_vec(), rows, state: cache.save()?, path: "a state".into() })
    }

    /// The bytes of a file of a state of the model that is `identity` ([`Model::state_identity`](crate::Model::state_identity)).
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn encode(self, identity: &str) -> Result<Vec<u8>> {
        let entries = file::entries(identity, self.rows, &[], &self.tokens, self.state)?;
        encode_tensors(&self.path, entries)
    }

    /// Reads bytes that [`encode`](Self::encode) or a session's [`save`](crate::ChatSession::save) wrote. `path` is their name in
    /// errors.
    ///
    /// # Errors
    /// Bytes that are damaged, or of another model or format.
    pub fn decode(identity: &str, path: &Path, bytes: &[u8]) -> Result<Self> {
        let (saved, state) = file::parse(path, decode_tensors(path, bytes, true)?, identity)?;
        Ok(Self { tokens: saved.tokens, rows: saved.rows, state, path: path.into() })
    }

    /// A cache with this state. `cache` is any cache of one sequence of the same model and rows; its state is replaced.
    ///
    /// # Errors
    /// A state of another shape; one that has read another number of tokens; an error of the device.
    pub fn restore(self, cache: Cache) -> Result<Cache> {
        restored(cache, &self.path, &self.tokens, self.state)
    }
}

/// The cache that has read `tokens`.
pub(super) fn restored(
    mut cache: Cache,
    path: &Path,
    tokens: &[u32],
    tensors: HashMap<String, Tensor>,
) -> Result<Cache> {
    cache.restore(tensors).map_err(|error| ModelError::corrupt(path, error.to_string()))?;
    if cache.position(0) != tokens.len() {
        let (has, says) = (cache.position(0), tokens.len());
        let what = format!("its state has read {has} tokens, and it says {says}");
        return Err(ModelError::corrupt(path, what));
    }
    Ok(cache)
}
