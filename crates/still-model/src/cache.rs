//! What a model remembers of a batch of sequences.

use std::collections::HashMap;

use candle_core::Tensor;
use still_attention::{AttentionState, SavedState, StateBytes};

use crate::error::{ModelError, Result};
use crate::executor::Scratch;

/// What a model remembers of a batch of sequences: the attention state of every layer.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) layers: Vec<Box<dyn AttentionState>>,
    batch: usize,
    /// Logits of the last decode step, `[B, vocab]`, unless a graph has them.
    pub(crate) logits: Vec<f32>,
    pub(crate) scratch: Scratch,
}

/// Memory of decode steps over several caches ([`Model::decode_many`](crate::Model::decode_many)), kept from one to the next. It
/// holds nothing between calls that matters.
#[derive(Debug, Default)]
pub struct Workspace {
    /// Of the last step, `[sequences, vocab]`, unless the scratch has them.
    pub(crate) logits: Vec<f32>,
    /// Rows of every step, whoever takes part.
    pub(crate) rows: Option<usize>,
    pub(crate) scratch: Scratch,
}

impl Workspace {
    /// Of steps that on CUDA all have the shape of a step of `rows` sequences, so that a sequence's logits do not depend, bit for bit,
    /// on how many others there are. More sequences than that take several steps.
    ///
    /// On the CPU they never do.
    pub fn of_rows(rows: usize) -> Self {
        Self { rows: Some(rows.max(1)), ..Self::default() }
    }

    /// Those of the last step, `[sequences, vocab]`.
    ///
    /// # Errors
    /// An error of the device.
    pub fn logits(&self) -> Result<&[f32]> {
        Ok(self.scratch.logits()?.unwrap_or(&self.logits))
    }

    /// Forgets what an interrupted step may have left.
    pub fn reset(&mut self) {
        *self = Self { rows: self.rows, ..Self::default() };
    }
}

impl Cache {
    /// Of the empty states of all layers.
    pub(crate) fn new(layers: Vec<Box<dyn AttentionState>>, batch: usize) -> Self {
        Self { layers, batch, logits: Vec::new(), scratch: Scratch::default() }
    }

    /// Bytes held for all sequences in all layers, with the room to grow into.
    pub fn size_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.size_bytes()).sum()
    }

    /// The bytes of [`size_bytes`](Self::size_bytes) by what they hold, of a cache on the CPU.
    pub fn bytes_by_part(&self) -> Option<StateBytes> {
        self.layers.iter().map(|layer| layer.bytes_by_part()).sum()
    }

    /// Bytes of what is remembered, without the room to grow into where a layer knows how much that is.
    pub fn used_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.used_bytes()).sum()
    }

    /// Tokens fed to a sequence so far.
    pub fn position(&self, sequence: usize) -> usize {
        self.layers.first().map_or(0, |layer| layer.position(sequence))
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Forgets all tokens of a sequence but the first `tokens`: any number with dense attention, those of the last token's chunk or
    /// all with hybrid attention ([`AttentionState::truncate`]).
    ///
    /// # Errors
    /// A number that a layer cannot go back to, and then no layer has.
    pub fn truncate(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        // Layers may differ in how far they go back.
        for state in &self.layers {
            state.check_truncate(sequence, tokens)?;
        }
        self.layers.iter_mut().try_for_each(|state| Ok(state.truncate(sequence, tokens)?))
    }

    /// All that the cache remembers, as tensors on the host by name: `layers.N.PART.TENSOR`, where a part is a head of a sequence.
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

    /// Remembers what a cache of the same model, batch and row format has [saved](Self::save), in place of what it did.
    ///
    /// # Errors
    /// Tensors of another model, batch or row format, after which the cache is to be thrown away.
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
