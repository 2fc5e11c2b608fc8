//! A model that runs: a decoder, a tokenizer and, in a student, its learned attention.

use std::sync::Arc;

use candle_core::{DType, Device, DeviceLocation, Tensor};
use still_attention::{AttentionKind, RowDtype};

use crate::base::BaseIdentity;
use crate::cache::{Cache, Workspace};
use crate::cancel::Cancel;
use crate::config::ModelConfig;
use crate::decoder::{AttentionInputs, Decoder, Rotation};
use crate::error::{ModelError, Result};
use crate::executor::{Batching, executor};
use crate::student::Student;
use crate::tokenizer::Tokenizer;

/// A model: a teacher with dense attention, or a student with hybrid attention.
#[derive(Clone, Debug)]
pub struct Model {
    /// Frozen base weights.
    pub decoder: Arc<Decoder>,
    /// The learned part of a student.
    pub student: Option<Student>,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Where the base weights came from.
    pub base: BaseIdentity,
}

impl Model {
    /// The device that it computes on.
    pub fn device(&self) -> &Device {
        self.decoder.device()
    }

    /// How many sequences to feed together for the best speed.
    ///
    /// # Errors
    /// Weights on a device that no model runs on.
    pub fn batching(&self) -> Result<Batching> {
        Ok(executor(self.device())?.batching())
    }

    /// Hyper-parameters of the base.
    pub fn config(&self) -> &ModelConfig {
        &self.decoder.config
    }

    /// The same weights with dense attention. If a student's low-rank updates were merged into the weights, they stay.
    pub fn teacher(&self) -> Self {
        Self { student: None, ..self.clone() }
    }

    /// The same base with a student's attention. The student must be on the base's device.
    pub fn with_student(&self, student: Student) -> Self {
        Self { student: Some(student), ..self.clone() }
    }

    /// Default dtype of exact rows in this model's cache: the student's own, or else `usual`. On CUDA, rows of 16 and 32 bits
    /// always have the dtype of activations.
    pub fn cache_rows(&self, usual: RowDtype) -> RowDtype {
        let said = self.student.as_ref().and_then(|student| student.config.rows).unwrap_or(usual);
        match (self.device(), said, self.decoder.dtype()) {
            (Device::Cpu, ..) | (_, RowDtype::Int8 | RowDtype::Int4, _) => said,
            (_, _, DType::BF16) => RowDtype::Bf16,
            _ => RowDtype::F32,
        }
    }

    /// An empty cache of `batch` sequences with exact rows of dtype `rows`, on the device of the weights. On CUDA `rows` must be
    /// the weights' dtype, [`RowDtype::Int8`] or, for a student or in f32, [`RowDtype::Int4`].
    ///
    /// # Errors
    /// A student that does not fit the model; rows or attention that the device has no kernels for.
    pub fn new_cache(&self, batch: usize, rows: RowDtype) -> Result<Cache> {
        let layers = executor(self.device())?.new_states(self, batch, rows)?;
        Ok(Cache::new(layers, batch))
    }

    /// Checks that the cache has `batch` sequences, and layers of this model's number, kind and device.
    pub(crate) fn check_cache(&self, cache: &Cache, batch: usize) -> Result<()> {
        if batch != cache.batch() || cache.layers.len() != self.decoder.layers.len() {
            return Err(ModelError::Invalid(format!(
                "{batch} sequences for a cache of {}, {} layers for one of {}",
                cache.batch(),
                self.decoder.layers.len(),
                cache.layers.len()
            )));
        }
        let expected = |n: usize| -> (AttentionKind, DeviceLocation) {
            let hybrid = self.student.as_ref().is_some_and(|student| student.layer(n).is_some());
            let kind = match self.decoder.layers[n].sliding_window {
                _ if hybrid => AttentionKind::Hybrid,
                Some(window) => AttentionKind::Sliding { window },
                None => AttentionKind::Dense,
            };
            (kind, self.device().location())
        };
        let found = cache.layers.iter().map(|layer| (layer.kind(), layer.location()));
        if found.enumerate().any(|(n, found)| found != expected(n)) {
            return Err(ModelError::Invalid(
                "the cache was made for another model, or for this one on another device".into(),
            ));
        }
        Ok(())
    }

    /// Feeds `ids` `[B, T]` u32 and returns the final-normed hidden states `[B, T, E]`.
    ///
    /// `lengths`: valid tokens of each right-padded sequence; all `T` if absent.
    ///
    /// # Errors
    /// An id outside the vocabulary; a cache of another batch or model.
    pub fn forward(
        &self,
        ids: &Tensor,
        cache: &mut Cache,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        self.check_cache(cache, ids.dim(0)?)?;
        executor(self.device())?.forward(self, ids, cache, lengths)
    }

    /// [`Model::forward`] of a checked cache, by operations that every device has.
    pub(crate) fn forward_through_layers(
        &self,
        ids: &Tensor,
        cache: &mut Cache,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        let x = self.decoder.embed_batch(ids)?;
        self.forward_embedded(x, cache, lengths, &Cancel::default())
    }

    /// [`Model::forward`] of embeddings `[B, T, E]`.
    pub(crate) fn forward_embedded(
        &self,
        x: Tensor,
        cache: &mut Cache,
        lengths: Option<&[usize]>,
        cancel: &Cancel,
    ) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let mut starts: Vec<usize> = (0..batch).map(|sequence| cache.position(sequence)).collect();
        if starts.iter().all(|&start| start == starts[0]) {
            starts.truncate(1);
        }
        let rotation = self.decoder.rotation_at(&starts, tokens)?;
        #[cfg(feature = "cuda")]
        let scratch = still_compute::cuda::PassScratch::default();
        self.through_layers(x, &rotation, |layer, inputs| {
            if cancel.is_raised() {
                return Err(ModelError::Cancelled);
            }
            let layer = &mut cache.layers[layer];
            #[cfg(feature = "cuda")]
            return Ok(layer.advance_in(inputs.rows(), lengths, &scratch)?);
            #[cfg(not(feature = "cuda"))]
            return Ok(layer.advance(inputs.rows(), lengths)?);
        })
    }

    /// Feeds one token to each sequence and returns the logits after it, `[B, vocab]`, in the cache's own memory. A step
    /// allocates nothing but what the attention state grows by.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn decode<'a>(&self, ids: &[u32], cache: &'a mut Cache) -> Result<&'a [f32]> {
        self.check_cache(cache, ids.len())?;
        executor(self.device())?.decode(self, ids, cache)
    }

    /// Feeds one token to each of several sequences with a cache each, and returns the logits after it, `[sequences, vocab]`.
    /// Every matrix product takes the rows of all sequences together.
    ///
    /// On the CPU a sequence's logits are bit for bit those of [`Model::decode`]. On CUDA rounding depends on the number of
    /// sequences, unless the workspace has [a fixed number of rows](Workspace::of_rows). Where a layer has no kernel for such a
    /// step, the sequences are fed one after another.
    ///
    /// # Errors
    /// An id outside the vocabulary; numbers of ids and caches that differ; a cache of several sequences or of another model. No
    /// cache is changed then.
    pub fn decode_many<'a>(
        &self,
        ids: &[u32],
        caches: &mut [&mut Cache],
        workspace: &'a mut Workspace,
    ) -> Result<&'a [f32]> {
        if ids.len() != caches.len() {
            let (ids, caches) = (ids.len(), caches.len());
            return Err(ModelError::Invalid(format!("{ids} tokens for {caches} caches")));
        }
        if ids.is_empty() {
            workspace.logits.clear();
            return Ok(&workspace.logits);
        }
        self.decoder.check_ids(ids)?;
        caches.iter().try_for_each(|cache| self.check_cache(cache, 1))?;
        executor(self.device())?.decode_many(self, ids, caches, workspace)
    }

    /// All layers and the final norm. `attend(layer, inputs)` computes the attention.
    pub(crate) fn through_layers<E: From<ModelError>>(
        &self,
        x: Tensor,
        rotation: &Rotation,
        mut attend: impl FnMut(usize, &AttentionInputs) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Tensor, E> {
        let visited =
            self.decoder.visit_layers(x, rotation, self.student.as_ref(), |n, _, inputs| {
                attend(n, inputs)
            })?;
        Ok(self.decoder.final_norm(&visited)?)
    }

    /// Logits of hidden states, `[…, E]` → `[…, vocab]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.decoder.logits(hidden)
    }
}
