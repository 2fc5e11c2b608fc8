//! The decoder: embeddings, layers, final norm and head of a base model.
//!
//! | file | content |
//! |---|---|
//! | `layer` | what a layer computes, said once |
//! | `layer_ops` | the trait of operations that it is written in |
//! | `tensor_ops` | the operations in the tensor library's graph |
//! | `saving_ops` | the operations with what a backward pass needs, and that pass |
//! | `student_layer` | what a student's layer has in place of softmax attention |
//! | `linear` | a frozen projection and its low-rank update |
//! | `norm` | weights of norms |
//! | `weight` | a frozen matrix in the form that its file had |
//! | `quantized` | one whose GPU multiplies by its codes |
//! | `rotation` | RoPE's frequencies |
//! | `ops` | the fused ops beneath |

mod layer;
mod layer_ops;
mod linear;
mod norm;
pub mod ops;
mod quantized;
mod rotation;
mod saving_ops;
mod student_layer;
mod tensor_ops;
mod weight;

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor};

pub use layer::{AttentionInputs, DecoderLayer};
pub use layer_ops::{LayerOps, Norm, Projected, Projection, Role, RopeBase};
pub(crate) use linear::on_host;
pub use linear::{Linear, Lora, LoraLayer};
pub use norm::NormWeight;
pub use ops::{Dropout, MlpWeights, Rotation};
pub use quantized::QuantizedMatrix;
pub use saving_ops::{SavedActivations, SavingOps, Value};
pub use student_layer::StudentLayer;
pub use tensor_ops::TensorOps;
pub use weight::{Part, Weight};

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
#[cfg(feature = "cuda")]
use ops::SHARED;
use rotation::Frequencies;

/// A base model's frozen weights. Without a student's layers it is the teacher.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Hyper-parameters.
    pub config: ModelConfig,
    /// `[vocab, E]`
    pub embed_tokens: Weight,
    /// The layers, bottom first.
    pub layers: Vec<DecoderLayer>,
    /// Weight of the final norm, `[E]`.
    pub norm: NormWeight,
    /// `[vocab, E]`; the embedding's own storage if tied.
    pub lm_head: Weight,
    frequencies: Frequencies,
    /// Of layers with a sliding window.
    local_frequencies: Option<Frequencies>,
}

impl Decoder {
    /// From parts.
    pub fn new(
        config: ModelConfig,
        embed_tokens: Weight,
        layers: Vec<DecoderLayer>,
        norm: NormWeight,
        lm_head: Weight,
    ) -> Self {
        let (frequencies, local_frequencies) =
            (Frequencies::new(&config), Frequencies::local(&config));
        Self { config, embed_tokens, layers, norm, lm_head, frequencies, local_frequencies }
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        self.embed_tokens.device()
    }

    /// Dtype of activations.
    pub fn dtype(&self) -> DType {
        self.norm.scale.dtype()
    }

    /// Every weight by its Hugging Face name.
    pub fn parts(&self) -> Vec<(String, Part<'_>)> {
        let mut all: Vec<(String, Part<'_>)> =
            vec![("model.embed_tokens.weight".to_owned(), (&self.embed_tokens).into())];
        for (n, layer) in self.layers.iter().enumerate() {
            let mut add = |name: &str, part| all.push((format!("model.layers.{n}.{name}"), part));
            add("input_layernorm.weight", layer.input_layernorm.stored().into());
            let mlp_norm = self.config.architecture.family().mlp_norm();
            add(&format!("{mlp_norm}.weight"), layer.mlp.norm.stored().into());
            for (name, norm) in [
                ("self_attn.q_norm", &layer.q_norm),
                ("self_attn.k_norm", &layer.k_norm),
                ("post_attention_layernorm", &layer.post_attention_norm),
                ("post_feedforward_layernorm", &layer.mlp.post_norm),
            ] {
                if let Some(norm) = norm {
                    add(&format!("{name}.weight"), norm.stored().into());
                }
            }
            for (name, linear) in [
                ("mlp.gate_proj", &layer.mlp.gate),
                ("mlp.up_proj", &layer.mlp.up),
                ("mlp.down_proj", &layer.mlp.down),
                ("self_attn.q_proj", &layer.q_proj),
                ("self_attn.k_proj", &layer.k_proj),
                ("self_attn.v_proj", &layer.v_proj),
                ("self_attn.o_proj", &layer.o_proj),
            ] {
                add(&format!("{name}.weight"), (&linear.weight).into());
                if let Some(bias) = &linear.bias {
                    add(&format!("{name}.bias"), bias.into());
                }
            }
        }
        all.push(("model.norm.weight".to_owned(), self.norm.stored().into()));
        if !self.config.tie_word_embeddings {
            all.push(("lm_head.weight".to_owned(), (&self.lm_head).into()));
        }
        all
    }

    /// Bytes of all weights, and how many matrices are stored in which format ([`Weight::format_name`]).
    pub fn formats(&self) -> (usize, BTreeMap<&'static str, usize>) {
        let (mut bytes, mut formats) = (0, BTreeMap::new());
        for (_, part) in self.parts() {
            match part {
                Part::Matrix(weight) => {
                    bytes += weight.size_bytes();
                    *formats.entry(weight.format_name()).or_default() += 1;
                }
                Part::Vector(tensor) => {
                    bytes += tensor.elem_count() * tensor.dtype().size_in_bytes();
                }
            }
        }
        (bytes, formats)
    }

    /// Every weight by its Hugging Face name, widened if it is packed or quantized.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn visit_tensors(&self, mut f: impl FnMut(&str, Tensor) -> Result<()>) -> Result<()> {
        self.parts().into_iter().try_for_each(|(name, part)| f(&name, part.to_tensor()?))
    }

    /// Values of all weights that [`Decoder::visit_tensors`] visits, counted from shapes.
    ///
    /// # Errors
    /// A weight without rows and columns.
    pub fn elements(&self) -> Result<u64> {
        let counts = self
            .parts()
            .into_iter()
            .map(|(_, part)| Ok(part.dims()?.into_iter().product::<usize>() as u64));
        counts.sum()
    }

    /// One sequence: `[1, N, E]`. Ids are checked where they are, on the host: nothing waits for a device.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.check_ids(ids)?;
        let ids = Tensor::from_slice(ids, ids.len(), self.device())?;
        let rows = self.embed_tokens.select(&ids)?.unsqueeze(0)?;
        Ok(match self.config.embedding_scale() {
            Some(scale) => (rows * scale)?,
            None => rows,
        })
    }

    /// The embedding `[E]` of one id on the CPU, over what `row` held; `tile` is memory for it.
    pub(crate) fn embed_row(&self, id: u32, tile: &mut Vec<f32>, row: &mut [f32]) -> Result<()> {
        self.embed_tokens.row_into(id as usize, tile, row)?;
        if let Some(scale) = self.config.embedding_scale() {
            still_compute::rows::scale(row, scale as f32);
        }
        Ok(())
    }

    /// `ids` `[B, N]` u32 → `[B, N, E]`; from a device they are copied to be checked.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn embed_batch(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, tokens) = ids.dims2()?;
        let rows = self.embed(&ids.flatten_all()?.to_vec1::<u32>()?)?;
        Ok(rows.reshape((batch, tokens, self.config.hidden_size))?)
    }

    /// An error that names an id outside the vocabulary, if there is one.
    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            None => Ok(()),
            Some(id) => Err(ModelError::Invalid(format!(
                "token id {id} is outside the vocabulary of {vocab}"
            ))),
        }
    }

    /// The rotation of positions `start..start + tokens`, the same for every sequence.
    ///
    /// # Errors
    /// If `tokens` is 0.
    pub fn rotation(&self, start: usize, tokens: usize) -> Result<Rotation> {
        self.rotation_at(&[start], tokens)
    }

    /// One run of positions per sequence.
    ///
    /// # Errors
    /// If `tokens` is 0.
    pub fn rotation_at(&self, starts: &[usize], tokens: usize) -> Result<Rotation> {
        let positions = starts.iter().flat_map(|&start| start..start + tokens);
        self.rotation_by(positions, (starts.len(), tokens))
    }

    /// One run of any positions, for rows of several sequences packed into one.
    pub(crate) fn rotation_of(&self, positions: &[usize]) -> Result<Rotation> {
        self.rotation_by(positions.iter().copied(), (1, positions.len()))
    }

    /// Of positions `[runs, tokens]`, by every base that the model has.
    fn rotation_by(
        &self,
        positions: impl Iterator<Item = usize> + Clone,
        sizes: (usize, usize),
    ) -> Result<Rotation> {
        #[cfg(feature = "cuda")]
        if self.device().is_cuda() && sizes.0 * sizes.1 * self.config.rotary_dim() / 2 >= SHARED {
            return self.rotation_on_device(positions, sizes);
        }
        self.rotation_on_host(positions, sizes)
    }

    /// [`Decoder::rotation_at`] whose values are on the host: of single tokens.
    #[cfg(feature = "cuda")]
    pub(crate) fn step_rotation(&self, positions: &[usize]) -> Result<Rotation> {
        self.rotation_on_host(positions.iter().copied(), (positions.len(), 1))
    }

    fn rotation_on_host(
        &self,
        positions: impl Iterator<Item = usize> + Clone,
        sizes: (usize, usize),
    ) -> Result<Rotation> {
        let by = |frequencies: &Frequencies| {
            let angles: Vec<f64> = positions.clone().flat_map(|p| frequencies.angles(p)).collect();
            Rotation::partial(&angles, sizes, self.config.head_dim, frequencies.scale)
        };
        let local = self.local_frequencies.as_ref().map(by).transpose()?;
        Ok(by(&self.frequencies)?.with_local(local))
    }

    #[cfg(feature = "cuda")]
    fn rotation_on_device(
        &self,
        positions: impl Iterator<Item = usize>,
        sizes: (usize, usize),
    ) -> Result<Rotation> {
        let positions: Vec<u32> = positions.map(|position| position as u32).collect();
        let by = |Frequencies { inverse, scale }: &Frequencies| {
            let angles = ops::device::rope_angles(self.device(), &positions, inverse, *scale)?;
            Rotation::on_device(angles, sizes, self.config.head_dim)
        };
        let local = self.local_frequencies.as_ref().map(by).transpose()?;
        Ok(by(&self.frequencies)?.with_local(local))
    }

    /// Sets `rotation` to one token at each of `positions`, one a sequence.
    pub(crate) fn set_positions(
        &self,
        rotation: &mut Rotation,
        positions: impl Iterator<Item = usize> + Clone,
    ) {
        let head_dim = self.config.head_dim;
        if let Some(Frequencies { inverse, scale }) = &self.local_frequencies {
            rotation.local_mut().set_positions(positions.clone(), inverse, (head_dim, *scale));
        }
        let Frequencies { inverse, scale } = &self.frequencies;
        rotation.set_positions(positions, inverse, (head_dim, *scale));
    }

    /// The final norm of `[B, N, E]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::rms_norm(x, &self.norm.scale, self.config.rms_norm_eps)?)
    }

    /// Logits of final-normed hidden states, `[…, E]` → `[…, vocab]`, f32.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        if !hidden.device().is_cpu() {
            let (mut shape, vocab) = (hidden.dims().to_vec(), self.config.vocab_size);
            let rows = hidden.flatten_to(D::Minus2)?;
            if let Some(width) = shape.last_mut() {
                *width = vocab;
            }
            return Ok(ops::wide_product(&rows, &self.lm_head)?.reshape(shape)?);
        }
        Ok(ops::frozen_linear(hidden, &self.lm_head, None)?)
    }

    /// Writes the logits of the token ids `ids` alone, `[rows, ids]` f32, over what `out` held.
    ///
    /// `hidden` `[rows, E]`, on the weights' device and of their activations' dtype. A caller that takes the vocabulary in
    /// parts never holds all logits.
    ///
    /// # Errors
    /// Shapes that do not fit, ids outside the vocabulary, another dtype or device.
    pub fn logits_into(
        &self,
        hidden: &Tensor,
        ids: std::ops::Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let (rows, width) = hidden.dims2()?;
        let (vocab, inner) = self.lm_head.dims2()?;
        if width != inner || ids.end > vocab {
            return Err(ModelError::Invalid(format!(
                "logits of ids {ids:?} of {vocab} from hidden states of width {width}"
            )));
        }
        if !hidden.device().is_cpu() {
            let head = self.lm_head.dense_rows(ids)?;
            *out = ops::wide_linear(hidden, &head)?.flatten_all()?.to_vec1()?;
            return Ok(());
        }
        out.resize(rows * ids.len(), f32::NAN);
        ops::with_values(hidden, |hidden| self.lm_head.multiply_into(ids, hidden, out))??;
        Ok(())
    }
}
