//! A runnable model: a decoder, perhaps a student's attention, a tokenizer.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::checkpoint::{BaseIdentity, Checkpoint, Weights};
use crate::config::ModelConfig;
use crate::decoder::{AttentionInputs, Decoder, Rotation};
use crate::error::{ModelError, Result};
use crate::executor::{check_dtype, executor};
use crate::student::Student;
use crate::tokenizer::Tokenizer;

/// A model, dense without a student.
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
    /// Loads a Hugging Face directory, a `.gguf` file, a hub id or a student, in f32 on the CPU.
    ///
    /// # Errors
    /// What is missing, broken or unsupported, by name.
    pub fn load(model: &str) -> Result<Self> {
        Self::load_on(model, &Device::Cpu, DType::F32)
    }

    /// [`Model::load`] onto a device, with base weights and activations of `dtype`: f32 on the CPU, f32 or bf16 elsewhere.
    /// What a student has learned is f32 everywhere.
    ///
    /// # Errors
    /// As [`Model::load`]; a dtype that the device has no kernels for.
    pub fn load_on(model: &str, device: &Device, dtype: DType) -> Result<Self> {
        Checkpoint::open(model)
            .and_then(|checkpoint| Self::from_checkpoint(checkpoint, device, dtype))
            .map_err(|error| error.while_loading(Path::new(model)))
    }

    /// Loads the weights of an opened checkpoint; `device` and `dtype` as in [`Model::load_on`].
    ///
    /// # Errors
    /// A missing tensor, one of another shape or one that nothing reads; a dtype that the device has no kernels for.
    pub fn from_checkpoint(checkpoint: Checkpoint, device: &Device, dtype: DType) -> Result<Self> {
        check_dtype(device, dtype)?;
        let Checkpoint { config, weights, tokenizer, still, lora, recipe, base } = checkpoint;
        let decoder = Arc::new(Decoder::load(&config, &weights, device, dtype)?);
        let student = still
            .map(|still| Student::from_weights(still, lora, &config, &weights)?.to_device(device))
            .transpose()?
            .map(|student| Student { recipe, ..student });
        weights.check_all_read(&config)?;
        Ok(Self { decoder, student, tokenizer, base })
    }

    /// The same model on another device; `dtype` as in [`Model::load_on`].
    ///
    /// # Errors
    /// A dtype that the device has no kernels for; too little memory there.
    pub fn to_device(&self, device: &Device, dtype: DType) -> Result<Self> {
        check_dtype(device, dtype)?;
        let mut tensors = HashMap::new();
        self.decoder.visit_tensors(|name, tensor| {
            tensors.insert(name.to_owned(), tensor);
            Ok(())
        })?;
        let weights = Weights::from_tensors(tensors);
        let decoder = Arc::new(Decoder::load(self.config(), &weights, device, dtype)?);
        let student = self.student.as_ref().map(|student| student.to_device(device)).transpose()?;
        Ok(Self { decoder, student, ..self.clone() })
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.decoder.device()
    }

    /// Hyper-parameters of the base.
    pub fn config(&self) -> &ModelConfig {
        &self.decoder.config
    }

    /// The same model with dense attention. (A student with merged weights keeps those.)
    pub fn teacher(&self) -> Self {
        Self { student: None, ..self.clone() }
    }

    /// The same base with the attention of a student that is on the base's device.
    pub fn with_student(&self, student: Student) -> Self {
        Self { student: Some(student), ..self.clone() }
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
        self.through_layers(x, &rotation, |layer, inputs| {
            if cancel.is_raised() {
                return Err(ModelError::Cancelled);
            }
            Ok(cache.layers[layer].advance(inputs.rows(), lengths)?)
        })
    }

    /// Feeds one token to each sequence and returns the logits after it, `[B, vocab]`, in the cache's own memory: no step
    /// takes more than the one before it had, but for what the attention state grows by.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn decode<'a>(&self, ids: &[u32], cache: &'a mut Cache) -> Result<&'a [f32]> {
        self.check_cache(cache, ids.len())?;
        executor(self.device())?.decode(self, ids, cache)?;
        Ok(&cache.logits)
    }

    /// All layers and the final norm, with the attention that `attend(layer, inputs)` gives.
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
