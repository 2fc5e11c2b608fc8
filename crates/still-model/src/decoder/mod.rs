//! The decoder: embeddings, layers, final norm and head of a base model.

mod layer;
mod layer_ops;
mod linear;
pub mod ops;
mod rotation;
mod saving_ops;
mod tensor_ops;
mod visit;
mod weight;

use candle_core::{D, DType, Device, Tensor};

pub use layer::{AttentionInputs, DecoderLayer};
pub use layer_ops::{LayerOps, Norm, Projected, Projection, Role};
pub(crate) use linear::on_host;
pub use linear::{Linear, Lora, LoraLayer};
pub use ops::{Dropout, MlpWeights, Rotation};
pub use saving_ops::{SavedActivations, SavingOps, Value};
pub use tensor_ops::TensorOps;
pub use weight::{Part, Weight};

use crate::checkpoint::Weights;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
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
    pub norm: Tensor,
    /// `[vocab, E]`; the embedding's own storage if tied.
    pub lm_head: Weight,
    frequencies: Frequencies,
}

impl Decoder {
    /// Assembles a decoder from named weights. Matrices stay as their file has them where products can use that
    /// ([`Weight::Packed`]), which is on the CPU; everything else is of `dtype`, f32 on the CPU.
    ///
    /// # Errors
    /// A missing tensor or one of another shape.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let get = |name: &str, shape: &[usize]| weights.get(name, shape, dtype, device);
        let matrix = |name: &str, shape: &[usize; 2]| -> Result<Weight> {
            match device {
                Device::Cpu => weights.matrix(name, *shape),
                _ => Ok(Weight::Dense(get(name, shape)?)),
            }
        };
        let ModelConfig {
            hidden_size: e, intermediate_size: i, vocab_size: v, head_dim: d, ..
        } = *config;
        let (q, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
        let layer = |n: usize| -> Result<DecoderLayer> {
            let linear = |name: &str, out: usize, inner: usize, biased: bool| -> Result<Linear> {
                let name = format!("model.layers.{n}.{name}");
                Ok(Linear {
                    weight: matrix(&format!("{name}.weight"), &[out, inner])?,
                    bias: if biased { Some(get(&format!("{name}.bias"), &[out])?) } else { None },
                })
            };
            let norm = |name: &str| get(&format!("model.layers.{n}.{name}.weight"), &[e]);
            let head_norm = |name: &str| -> Result<Option<Tensor>> {
                let name = format!("model.layers.{n}.self_attn.{name}.weight");
                config.architecture.family().qk_norm.then(|| get(&name, &[d])).transpose()
            };
            let (biased, mlp_biased) = (config.attention_bias, config.mlp_bias);
            Ok(DecoderLayer {
                input_layernorm: norm("input_layernorm")?,
                q_proj: linear("self_attn.q_proj", q, e, biased)?,
                k_proj: linear("self_attn.k_proj", kv, e, biased)?,
                v_proj: linear("self_attn.v_proj", kv, e, biased)?,
                o_proj: linear("self_attn.o_proj", e, q, config.attention_output_bias)?,
                q_norm: head_norm("q_norm")?,
                k_norm: head_norm("k_norm")?,
                mlp: MlpWeights {
                    norm: norm("post_attention_layernorm")?,
                    gate: linear("mlp.gate_proj", i, e, mlp_biased)?,
                    up: linear("mlp.up_proj", i, e, mlp_biased)?,
                    down: linear("mlp.down_proj", e, i, mlp_biased)?,
                },
                rms_norm_eps: config.rms_norm_eps,
                head_dim: d,
            })
        };
        let embed_tokens = matrix("model.embed_tokens.weight", &[v, e])?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            matrix("lm_head.weight", &[v, e])?
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        Ok(Self::new(
            config.clone(),
            embed_tokens,
            layers,
            get("model.norm.weight", &[e])?,
            lm_head,
        ))
    }

    /// From parts.
    pub fn new(
        config: ModelConfig,
        embed_tokens: Weight,
        layers: Vec<DecoderLayer>,
        norm: Tensor,
        lm_head: Weight,
    ) -> Self {
        let frequencies = Frequencies::new(&config);
        Self { config, embed_tokens, layers, norm, lm_head, frequencies }
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        self.embed_tokens.device()
    }

    /// Dtype of activations.
    pub fn dtype(&self) -> DType {
        self.norm.dtype()
    }

    /// Every weight by its Hugging Face name.
    pub fn parts(&self) -> Vec<(String, Part<'_>)> {
        let mut all: Vec<(String, Part<'_>)> =
            vec![("model.embed_tokens.weight".to_owned(), (&self.embed_tokens).into())];
        for (n, layer) in self.layers.iter().enumerate() {
            let mut add = |name: &str, part| all.push((format!("model.layers.{n}.{name}"), part));
            add("input_layernorm.weight", (&layer.input_layernorm).into());
            add("post_attention_layernorm.weight", (&layer.mlp.norm).into());
            for (name, norm) in
                [("self_attn.q_norm", &layer.q_norm), ("self_attn.k_norm", &layer.k_norm)]
            {
                if let Some(norm) = norm {
                    add(&format!("{name}.weight"), norm.into());
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
        all.push(("model.norm.weight".to_owned(), (&self.norm).into()));
        if !self.config.tie_word_embeddings {
            all.push(("lm_head.weight".to_owned(), (&self.lm_head).into()));
        }
        all
    }

    /// Every weight by its Hugging Face name, widened if it is packed.
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
        let count = |weight: &Weight| -> Result<usize> {
            let (rows, columns) = weight.dims2()?;
            Ok(rows * columns)
        };
        let mut elements = count(&self.embed_tokens)? + self.norm.elem_count();
        if !self.config.tie_word_embeddings {
            elements += count(&self.lm_head)?;
        }
        for layer in &self.layers {
            let attention = [&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj];
            let mlp = [&layer.mlp.gate, &layer.mlp.up, &layer.mlp.down];
            for linear in attention.into_iter().chain(mlp) {
                elements += count(&linear.weight)?;
                elements += linear.bias.as_ref().map_or(0, Tensor::elem_count);
            }
            let norms = [Some(&layer.input_layernorm), Some(&layer.mlp.norm)];
            let norms = norms.into_iter().chain([layer.q_norm.as_ref(), layer.k_norm.as_ref()]);
            elements += norms.flatten().map(Tensor::elem_count).sum::<usize>();
        }
        Ok(elements as u64)
    }

    /// One sequence: `[1, N, E]`. Ids are checked where they are, on the host: nothing waits for a device.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.check_ids(ids)?;
        let ids = Tensor::from_slice(ids, ids.len(), self.device())?;
        Ok(self.embed_tokens.select(&ids)?.unsqueeze(0)?)
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
        Ok(self.partial_rotation(&self.angles(positions), (starts.len(), tokens))?)
    }

    /// One run of any positions, for rows of several sequences packed into one.
    pub(crate) fn rotation_of(&self, positions: &[usize]) -> Result<Rotation> {
        let angles = self.angles(positions.iter().copied());
        Ok(self.partial_rotation(&angles, (1, positions.len()))?)
    }

    fn partial_rotation(
        &self,
        angles: &[f64],
        sizes: (usize, usize),
    ) -> candle_core::Result<Rotation> {
        Rotation::partial(angles, sizes, self.config.head_dim, self.frequencies.scale)
    }

    /// Radians, `[positions, rotary_dim / 2]`.
    fn angles(&self, positions: impl Iterator<Item = usize>) -> Vec<f64> {
        positions
            .flat_map(|position| self.frequencies.inverse.iter().map(move |f| position as f64 * f))
            .collect()
    }

    /// Sets `rotation` to one token at each of `positions`, one a sequence.
    pub(crate) fn set_positions(
        &self,
        rotation: &mut Rotation,
        positions: impl Iterator<Item = usize>,
    ) {
        let (head_dim, scale) = (self.config.head_dim, self.frequencies.scale);
        rotation.set_positions(positions, &self.frequencies.inverse, (head_dim, scale));
    }

    /// The final norm of `[B, N, E]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::rms_norm(x, &self.norm, self.config.rms_norm_eps)?)
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
            return Ok(ops::wide_linear(&rows, self.lm_head.dense()?)?.reshape(shape)?);
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
            let head = self.lm_head.dense()?.narrow(0, ids.start, ids.len())?;
            *out = ops::wide_linear(hidden, &head)?.flatten_all()?.to_vec1()?;
            return Ok(());
        }
        out.resize(rows * ids.len(), f32::NAN);
        ops::with_values(hidden, |hidden| self.lm_head.multiply_into(ids, hidden, out))??;
        Ok(())
    }
}
