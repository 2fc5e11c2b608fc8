//! A runnable model: a decoder, perhaps a student's attention, a tokenizer.

use std::sync::Arc;

use candle_core::{Device, IndexOp, Tensor};
use still_attention::{HybridState, KvCache, PreparedWeights, RowDtype};
use still_quant::FEW;

use crate::checkpoint::{BaseIdentity, Checkpoint};
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use crate::step::{Buffers, step};
use crate::student::Student;
use crate::tokenizer::Tokenizer;

/// Tokens that a prompt is fed in at a time: a multiple of every usual chunk, small enough to keep activations small.
const PREFILL_BLOCK: usize = 512;

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
        Self::from_checkpoint(Checkpoint::open(model)?)
    }

    /// Loads the weights of an opened checkpoint.
    ///
    /// # Errors
    /// A missing tensor or one of another shape.
    pub fn from_checkpoint(checkpoint: Checkpoint) -> Result<Self> {
        let Checkpoint { config, weights, tokenizer, still, lora, recipe, base } = checkpoint;
        let decoder = Arc::new(Decoder::load(&config, &weights, &Device::Cpu)?);
        let student = still
            .map(|still| Student::from_weights(still, lora, &config, &weights))
            .transpose()?
            .map(|student| Student { recipe, ..student });
        Ok(Self { decoder, student, tokenizer, base })
    }

    /// Hyper-parameters of the base.
    pub fn config(&self) -> &ModelConfig {
        &self.decoder.config
    }

    /// The same model with dense attention. (A student with merged weights keeps those.)
    pub fn teacher(&self) -> Self {
        Self { student: None, ..self.clone() }
    }

    /// The same base with a student's attention.
    pub fn with_student(&self, student: Student) -> Self {
        Self { student: Some(student), ..self.clone() }
    }

    /// An empty cache of `batch` sequences whose exact rows are stored as `rows`.
    ///
    /// # Errors
    /// A student that does not fit the model.
    pub fn new_cache(&self, batch: usize, rows: RowDtype) -> Result<Cache> {
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
    /// An id outside the vocabulary; a cache of another batch.
    pub fn forward(
        &self,
        ids: &Tensor,
        cache: &mut Cache,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        let (batch, tokens) = ids.dims2()?;
        if batch != cache.batch || cache.layers.len() != self.decoder.layers.len() {
            return Err(ModelError::Invalid(format!(
                "{batch} sequences for a cache of {}, {} layers for one of {}",
                cache.batch,
                self.decoder.layers.len(),
                cache.layers.len()
            )));
        }
        let mut starts: Vec<usize> = (0..batch).map(|sequence| cache.position(sequence)).collect();
        if starts.iter().all(|&start| start == starts[0]) {
            starts.truncate(1);
        }
        let rotation = self.decoder.rotation_at(&starts, tokens)?;
        let mut x = self.decoder.embed(ids)?;
        self.check_cache(cache)?;
        if tokens == 1 && batch <= FEW && lengths.is_none() {
            let mut values = x.flatten_all()?.to_vec1::<f32>()?;
            // On a thread of the pool, so that its many short parallel loops start at once.
            rayon::scope(|_| {
                step(&self.decoder, self.student.as_ref(), &mut values, &rotation, cache)
            })?;
            return Ok(Tensor::from_vec(values, x.shape(), x.device())?);
        }
        for (n, (layer, cache)) in self.decoder.layers.iter().zip(&mut cache.layers).enumerate() {
            let student = self.student.as_ref().map(|student| &student.layers[n]);
            let inputs = layer.attention_inputs(&x, &rotation, student)?;
            let attention = match (cache, student) {
                (LayerCache::Dense(cache), None) => {
                    cache.advance(&inputs.q, &inputs.k, &inputs.v, lengths)?
                }
                (LayerCache::Hybrid(state), Some(student)) => {
                    let gate = student.gate(&inputs.normed, self.config().head_dim)?;
                    state.advance(&inputs.q, &inputs.k, &inputs.v, gate.as_ref(), lengths)?
                }
                _ => unreachable!("the cache was checked"),
            };
            x = layer.finish(&x, &attention, student)?;
        }
        self.decoder.final_norm(&x)
    }

    /// An error unless the cache's layers are of this model's kinds.
    fn check_cache(&self, cache: &Cache) -> Result<()> {
        let hybrid = self.student.is_some();
        if cache.layers.iter().all(|layer| matches!(layer, LayerCache::Hybrid(_)) == hybrid) {
            return Ok(());
        }
        Err(ModelError::Invalid("the cache was made for another model".into()))
    }

    /// Logits of hidden states, `[…, E]` → `[…, vocab]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.decoder.logits(hidden)
    }

    /// Feeds one sequence's prompt in blocks; returns the last token's hidden state, `[1, E]`.
    ///
    /// # Errors
    /// An empty prompt, an id outside the vocabulary.
    pub fn prefill(&self, ids: &[u32], cache: &mut Cache) -> Result<Tensor> {
        let mut last = None;
        for block in ids.chunks(PREFILL_BLOCK) {
            let ids = Tensor::new(block, self.decoder.device())?.unsqueeze(0)?;
            let hidden = self.forward(&ids, cache, None)?;
            last = Some(hidden.i((0, block.len() - 1..block.len()))?);
        }
        last.ok_or_else(|| ModelError::Invalid("the prompt has no tokens".into()))
    }
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
}

impl Cache {
    /// Bytes held for all sequences in all layers.
    pub fn size_bytes(&self) -> usize {
        let size = |layer: &LayerCache| match layer {
            LayerCache::Dense(cache) => cache.size_bytes(),
            LayerCache::Hybrid(state) => state.size_bytes(),
        };
        self.layers.iter().map(size).sum()
    }

    /// Tokens fed to a sequence so far.
    pub fn position(&self, sequence: usize) -> usize {
        match self.layers.first() {
            Some(LayerCache::Dense(cache)) => cache.position(sequence),
            Some(LayerCache::Hybrid(state)) => state.position(sequence),
            None => 0,
        }
    }
}
