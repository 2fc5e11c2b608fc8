//! What a model remembers of a batch of sequences.

use std::collections::HashMap;

use candle_core::Tensor;
use still_attention::{AttentionState, SavedState, StateBytes};

use crate::error::{ModelError, Result};
use crate::executor::Scratch;

/// The cache of a batch of sequences: an attention state for every layer.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) layers: Vec<Box<dyn AttentionState>>,
    batch: usize,
    /// Logits of the last decode step, `[B, vocab]`, unless a graph has them.
    pub(crate) logits: Vec<f32>,
    pub(crate) scratch: Scratch,
}

/// Scratch memory of [`Model::decode_many`](crate::Model::decode_many), reused from step to step. Between calls its content does
/// not matter.
#[derive(Debug, Default)]
pub struct Workspace {
    /// Logits of the last step, `[sequences, vocab]`, unless the scratch has them.
    pub(crate) logits: Vec<f32>,
    /// The fixed number of rows of every step, if there is one.
    pub(crate) rows: Option<usize>,
    pub(crate) scratch: Scratch,
}

impl Workspace {
    /// A workspace whose steps all have the shape of `rows` sequences on CUDA. A sequence's logits then do not depend on the
    /// number of other sequences, bit for bit. More than `rows` sequences take several steps.
    ///
    /// On the CPU they never depend on it.
    pub fn of_rows(rows: usize) -> Self {
        Self { rows: Some(rows.max(1)), ..Self::default() }
    }

    /// Logits of the last step, `[sequences, vocab]`.
    ///
    /// # Errors
    /// An error of the device.
    pub fn logits(&self) -> Result<&[f32]> {
        Ok(self.scratch.logits()?.unwrap_or(&self.logits))
    }

    /// Discards what an interrupted step may have left.
    pub fn reset(&mut self) {
        *self = Self { rows: self.rows, ..Self::default() };
    }
}

impl Cache {
    /// A cache of all layers' empty states.
    pub(crate) fn new(layers: Vec<Box<dyn AttentionState>>, batch: usize) -> Self {
        Self { layers, batch, logits: Vec::new(), scratch: Scratch::default() }
    }

    /// Allocated bytes of all sequences in all layers.
    pub fn size_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.size_bytes()).sum()
    }

    /// The bytes of [`size_bytes`](Self::size_bytes) by content, for a cache on the CPU.
    pub fn bytes_by_part(&self) -> Option<StateBytes> {
        self.layers.iter().map(|layer| layer.bytes_by_part()).sum()
    }

    /// Bytes in use: allocated bytes less the room to grow into, where a layer knows it.
    pub fn used_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.used_bytes()).sum()
    }

    /// Tokens fed to a sequence so far.
    pub fn position(&self, sequence: usize) -> usize {
        self.layers.first().map_or(0, |layer| layer.position(sequence))
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Cuts a sequence back to its first `tokens` tokens. Dense attention takes any number. Hybrid attention can drop tokens of
    /// the current chunk, or all ([`AttentionState::truncate`]).
    ///
    /// # Errors
    /// A number that some layer cannot go back to. No layer is changed then.
    pub fn truncate(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        // Layers may differ in how far they go back.
        for state in &self.layers {
            state.check_truncate(sequence, tokens)?;
        }
        self.layers.iter_mut().try_for_each(|state| Ok(state.truncate(sequence, tokens)?))
    }

    /// The whole content as tensors on the host, by name: `layers.N.PART.TENSOR`, where a part is a head of a sequence.
    ///
    /// # Errors
    /// An error of the device.
    pub fn save(&self) -> Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::new();
        for (n, state) in self.layers.iter().enumerate() {
            let saved = state.save()?.into_tensors();
            tensors.extend(saved.into_iter().map(|(name, x)| (format!("layers.{n}.{name}"), x)));
        }
        Ok(tensors)
    }

    /// Replaces the content by what a cache of the same model, batch and row format has [saved](Self::save).
    ///
    /// # Errors
    /// Tensors of another model, batch or row format. Drop the cache then.
    pub fn restore(&mut self, tensors: HashMap<String, Tensor>) -> Result<()> {
        let mut layers = vec![SavedState::default(); self.layers.len()];
        for (name, tensor) in tensors {
            let found = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
            let layer = found.and_then(|(n, name)| Some((n.parse::<usize>().ok()?, name)));
            let Some((n, name)) = layer.filter(|&(n, _)| n < layers.len()) else {
                let what = format!("a saved cache has a tensor {name:?} that is of no layer");
                return Err(ModelError::Invalid(what));
            };
            layers[n].insert(name.to_owned(), tensor);
        }
        for (state, saved) in self.layers.iter_mut().zip(layers) {
            state.restore(saved)?;
        }
        Ok(())
    }
}
