//! A sequence and its state, as the bytes of a session in which nothing was said.

use std::path::Path;

use still_attention::RowDtype;

use super::file;
use crate::cache::Cache;
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::tensor_file::{decode_tensors, encode_tensors};

/// A sequence and the state after it.
///
/// Its bytes are those of a [session](crate::ChatSession) without messages: versioned, with a digest, and tied to the model.
#[derive(Debug)]
pub struct SavedSequence {
    /// What the state has read.
    pub tokens: Vec<u32>,
    /// How the state stores exact rows.
    pub rows: RowDtype,
    /// The state, of one sequence.
    pub cache: Cache,
}

impl SavedSequence {
    /// The bytes of a file of a state of the model that is `identity` ([`Model::state_identity`]).
    ///
    /// # Errors
    /// A state on a GPU.
    pub fn encode(
        identity: &str,
        tokens: &[u32],
        rows: RowDtype,
        cache: &Cache,
    ) -> Result<Vec<u8>> {
        let entries = file::entries(identity, rows, &[], tokens, cache)?;
        encode_tensors(Path::new("a state"), entries)
    }

    /// What [`encode`](Self::encode), or a session's [`save`](crate::ChatSession::save), has written. `path` is what errors call it.
    ///
    /// # Errors
    /// Bytes that are damaged, or of another model or format.
    pub fn decode(model: &Model, identity: &str, path: &Path, bytes: &[u8]) -> Result<Self> {
        let (saved, tensors) = file::parse(path, decode_tensors(path, bytes, true)?, identity)?;
        let (tokens, rows) = (saved.tokens, saved.rows);
        Ok(Self { cache: restored(model, path, rows, &tokens, tensors)?, tokens, rows })
    }
}

/// The cache that has read `tokens`.
pub(super) fn restored(
    model: &Model,
    path: &Path,
    rows: RowDtype,
    tokens: &[u32],
    tensors: std::collections::HashMap<String, candle_core::Tensor>,
) -> Result<Cache> {
    let mut cache = model.new_cache(1, rows)?;
    cache.restore(tensors).map_err(|error| ModelError::corrupt(path, error.to_string()))?;
    if cache.position(0) != tokens.len() {
        let (has, says) = (cache.position(0), tokens.len());
        let what = format!("its state has read {has} tokens, and it says {says}");
        return Err(ModelError::corrupt(path, what));
    }
    Ok(cache)
}
