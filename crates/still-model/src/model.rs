//! A runnable model: a decoder, perhaps a student's attention, a tokenizer.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use still_attention::{HybridState, KvCache, PreparedWeights, RowDtype};
use still_quant::SMALL_BATCH;

use crate::cancel::Cancel;
use crate::checkpoint::{BaseIdentity, Checkpoint, Weights};
use crate::config::ModelConfig;
#[cfg(feature = "cuda")]
use crate::cuda::CudaLayer;
use crate::decoder::{AttentionInputs, Decoder, Rotation};
use crate::error::{ModelError, Result};
use crate::step::{Buffers, step};
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

    /// An empty cache of `batch` sequences whose exact rows are stored as `rows`, on the device of the weights. On CUDA `rows`
    /// is the weights' dtype.
    ///
    /// # Errors
    /// A student that does not fit the model; rows or a student's attention that the device has no kernels for.
    pub fn new_cache(&self, batch: usize, rows: RowDtype) -> Result<Cache> {
        #[cfg(feature = "cuda")]
        if self.decoder.device().is_cuda() {
            let layers = self.layers_on_cuda(batch, rows)?.into_iter().map(LayerCache::Cuda);
            return Ok(Cache { layers: layers.collect(), batch, buffers: Buffers::default() });
        }
        let geometry = self.config().geometry();
        let layers = match &self.student {
            None => (0..self.decoder.layers.len())
                .map(|_| LayerCache::Dense(KvCache::new(geometry, batch, rows)))
                .collect(),
            Some(student) => student
                .layers
                .iter()
                .map(|layer| {
                    let weights = PreparedWeights::new(geometry, &layer.config, &layer.attention)?;
                    Ok(LayerCache::Hybrid(Box::new(HybridState::new(weights, batch, rows))))
                })
                .collect::<Result<_>>()?,
        };
        Ok(Cache { layers, batch, buffers: Buffers::default() })
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
        let (batch, tokens) = ids.dims2()?;
        self.check_cache(cache, batch)?;
        if self.decoder.device().is_cpu()
            && tokens == 1
            && batch <= SMALL_BATCH
            && lengths.is_none()
        {
            self.step(&ids.flatten_all()?.to_vec1::<u32>()?, cache, false)?;
            let shape = (batch, 1, self.config().hidden_size);
            return Ok(Tensor::from_slice(&cache.buffers.normed, shape, ids.device())?);
        }
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
        let hidden = self.through_layers(x, &rotation, |layer, inputs| {
            if cancel.is_raised() {
                return Err(ModelError::Cancelled);
            }
            cache.layers[layer].advance(inputs, lengths).map(Some)
        })?;
        hidden.ok_or_else(|| ModelError::Invalid("a layer gave no attention".into()))
    }

    /// Feeds one token to each sequence and returns the logits after it, `[B, vocab]`, in the cache's own memory: no step
    /// takes more than the one before it had, but for what the attention state grows by.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn decode<'a>(&self, ids: &[u32], cache: &'a mut Cache) -> Result<&'a [f32]> {
        #[cfg(feature = "cuda")]
        if self.decoder.device().is_cuda() {
            self.decode_on_cuda(ids, cache)?;
            return Ok(&cache.buffers.logits);
        }
        if ids.len() <= SMALL_BATCH {
            self.check_cache(cache, ids.len())?;
            self.step(ids, cache, true)?;
        } else {
            let column = Tensor::from_slice(ids, (ids.len(), 1), self.decoder.device())?;
            let hidden = self.forward(&column, cache, None)?.squeeze(1)?;
            let vocab = 0..self.config().vocab_size;
            self.decoder.logits_into(&hidden, vocab, &mut cache.buffers.logits)?;
        }
        Ok(&cache.buffers.logits)
    }

    fn step(&self, ids: &[u32], cache: &mut Cache, wants_logits: bool) -> Result<()> {
        self.decoder.check_ids(ids)?;
        step(&self.decoder, self.student.as_ref(), ids, cache, wants_logits)
    }

    /// All layers and the final norm, with the attention that `attend(layer, inputs)` gives; `None` as soon as it
    /// gives none.
    pub(crate) fn through_layers(
        &self,
        x: Tensor,
        rotation: &Rotation,
        mut attend: impl FnMut(usize, &AttentionInputs) -> Result<Option<Tensor>>,
    ) -> Result<Option<Tensor>> {
        let students = self.student.as_ref().map(|student| student.layers.as_slice());
        let visited = self.decoder.visit_layers(x, rotation, students, |n, _, inputs| {
            attend(n, inputs)?.ok_or(Stopped::NoAttention)
        });
        match visited {
            Ok(x) => self.decoder.final_norm(&x).map(Some),
            Err(Stopped::NoAttention) => Ok(None),
            Err(Stopped::Failed(error)) => Err(error),
        }
    }

    /// An error unless the cache is for `batch` sequences and its layers are of this model's number and kind.
    pub(crate) fn check_cache(&self, cache: &Cache, batch: usize) -> Result<()> {
        if batch != cache.batch || cache.layers.len() != self.decoder.layers.len() {
            return Err(ModelError::Invalid(format!(
                "{batch} sequences for a cache of {}, {} layers for one of {}",
                cache.batch,
                self.decoder.layers.len(),
                cache.layers.len()
            )));
        }
        let own = (self.student.is_some(), self.decoder.device().is_cpu());
        if cache.layers.iter().any(|layer| (layer.is_hybrid(), layer.is_on_cpu()) != own) {
            return Err(ModelError::Invalid(
                "the cache was made for another model, or for this one on another device".into(),
            ));
        }
        Ok(())
    }

    /// Logits of hidden states, `[…, E]` → `[…, vocab]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.decoder.logits(hidden)
    }
}

/// Why layers were not gone through to the end.
enum Stopped {
    NoAttention,
    Failed(ModelError),
}

impl From<ModelError> for Stopped {
    fn from(error: ModelError) -> Self {
        Self::Failed(error)
    }
}

/// An error unless `device` has kernels for `dtype`.
pub(crate) fn check_dtype(device: &Device, dtype: DType) -> Result<()> {
    let known = match device {
        Device::Cpu => dtype == DType::F32,
        _ => matches!(dtype, DType::F32 | DType::BF16),
    };
    if known {
        return Ok(());
    }
    Err(ModelError::Unsupported {
        what: format!("a model in {} on {:?}", dtype.as_str(), device.location()),
        found_in: None,
        hint: "use f32; bf16 is for CUDA devices".into(),
    })
}

/// What a model remembers of a batch of sequences.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
    batch: usize,
    /// Of [`step`]; holds nothing between calls that matters.
    pub(crate) buffers: Buffers,
}

#[derive(Clone, Debug)]
pub(crate) enum LayerCache {
    Dense(KvCache),
    Hybrid(Box<HybridState>),
    #[cfg(feature = "cuda")]
    Cuda(CudaLayer),
}

impl LayerCache {
    /// Attends from the new tokens to themselves and everything before: `[B, H, T, D]`.
    pub(crate) fn advance(
        &mut self,
        AttentionInputs { q, k, v, gate }: &AttentionInputs,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        Ok(match self {
            Self::Dense(cache) => cache.advance(q, k, v, lengths)?,
            Self::Hybrid(state) => state.advance(q, k, v, gate.as_ref(), lengths)?,
            #[cfg(feature = "cuda")]
            Self::Cuda(layer) => layer.advance(q, k, v, lengths)?,
        })
    }

    /// Tokens fed to a sequence so far.
    pub(crate) fn position(&self, sequence: usize) -> usize {
        match self {
            Self::Dense(cache) => cache.position(sequence),
            Self::Hybrid(state) => state.position(sequence),
            #[cfg(feature = "cuda")]
            Self::Cuda(layer) => layer.position(sequence),
        }
    }

    fn size_bytes(&self) -> usize {
        match self {
            Self::Dense(cache) => cache.size_bytes(),
            Self::Hybrid(state) => state.size_bytes(),
            #[cfg(feature = "cuda")]
            Self::Cuda(layer) => layer.size_bytes(),
        }
    }

    fn is_hybrid(&self) -> bool {
        match self {
            Self::Dense(_) => false,
            Self::Hybrid(_) => true,
            #[cfg(feature = "cuda")]
            Self::Cuda(layer) => matches!(layer, CudaLayer::Hybrid(_)),
        }
    }

    fn is_on_cpu(&self) -> bool {
        matches!(self, Self::Dense(_) | Self::Hybrid(_))
    }
}

impl Cache {
    /// Bytes held for all sequences in all layers.
    pub fn size_bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::size_bytes).sum()
    }

    /// Tokens fed to a sequence so far.
    pub fn position(&self, sequence: usize) -> usize {
        self.layers.first().map_or(0, |layer| layer.position(sequence))
    }
}
