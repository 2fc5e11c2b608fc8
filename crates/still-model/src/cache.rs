//! What a model remembers of a batch of sequences.

use candle_core::DeviceLocation;
use still_attention::{AttentionKind, AttentionState, RowDtype};

use crate::error::{ModelError, Result};
use crate::executor::{Scratch, executor};
use crate::model::Model;

/// What a model remembers of a batch of sequences: the attention state of every layer.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) layers: Vec<Box<dyn AttentionState>>,
    batch: usize,
    /// Logits of the last decode step, `[B, vocab]`.
    pub(crate) logits: Vec<f32>,
    pub(crate) scratch: Scratch,
}

impl Cache {
    /// Bytes held for all sequences in all layers.
    pub fn size_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.size_bytes()).sum()
    }

    /// Tokens fed to a sequence so far.
    pub fn position(&self, sequence: usize) -> usize {
        self.layers.first().map_or(0, |layer| layer.position(sequence))
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }
}

impl Model {
    /// An empty cache of `batch` sequences whose exact rows are stored as `rows`, on the device of the weights. On CUDA `rows`
    /// is the weights' dtype.
    ///
    /// # Errors
    /// A student that does not fit the model; rows or a student's attention that the device has no kernels for.
    pub fn new_cache(&self, batch: usize, rows: RowDtype) -> Result<Cache> {
        let layers = executor(self.device())?.new_states(self, batch, rows)?;
        Ok(Cache { layers, batch, logits: Vec::new(), scratch: Scratch::default() })
    }

    /// An error unless the cache is for `batch` sequences and its layers are of this model's number, kind and device.
    pub(crate) fn check_cache(&self, cache: &Cache, batch: usize) -> Result<()> {
        if batch != cache.batch || cache.layers.len() != self.decoder.layers.len() {
            return Err(ModelError::Invalid(format!(
                "{batch} sequences for a cache of {}, {} layers for one of {}",
                cache.batch,
                self.decoder.layers.len(),
                cache.layers.len()
            )));
        }
        let kind = match self.student {
            Some(_) => AttentionKind::Hybrid,
            None => AttentionKind::Dense,
        };
        let expected: (AttentionKind, DeviceLocation) = (kind, self.device().location());
        if cache.layers.iter().any(|layer| (layer.kind(), layer.location()) != expected) {
            return Err(ModelError::Invalid(
                "the cache was made for another model, or for this one on another device".into(),
            ));
        }
        Ok(())
    }
}
