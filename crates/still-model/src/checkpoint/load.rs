//! From an opened checkpoint to a model that runs.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{Checkpoint, OnFetch, WeightFormat, Weights, shapes};
use crate::config::ModelConfig;
use crate::decoder::{Decoder, DecoderLayer, Linear, MlpWeights, NormWeight, Part, Weight};
use crate::error::{ModelError, Result};
use crate::executor::check_dtype;
use crate::model::Model;
use crate::student::Student;

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
        Self::load_in(model, device, dtype, WeightFormat::File)
    }

    /// [`Model::load_on`] with matrices in another form than their file's.
    ///
    /// # Errors
    /// Also a form that the device has no products with.
    pub fn load_in(
        model: &str,
        device: &Device,
        dtype: DType,
        format: WeightFormat,
    ) -> Result<Self> {
        Self::load_with_progress(model, device, dtype, format, &OnFetch::default())
    }

    /// [`Model::load_in`], which tells of what it fetches from a hub.
    ///
    /// # Errors
    /// As [`Model::load_in`].
    pub fn load_with_progress(
        model: &str,
        device: &Device,
        dtype: DType,
        format: WeightFormat,
        on_fetch: &OnFetch,
    ) -> Result<Self> {
        Checkpoint::open_with_progress(model, on_fetch)
            .and_then(|checkpoint| Self::from_checkpoint(checkpoint, device, dtype, format))
            .map_err(|error| error.while_loading(Path::new(model)))
    }

    /// Loads the weights of an opened checkpoint; `device` and `dtype` as in [`Model::load_on`].
    ///
    /// # Errors
    /// A missing tensor, one of another shape or one that nothing reads; a dtype or a form that the device has no kernels for.
    pub fn from_checkpoint(
        checkpoint: Checkpoint,
        device: &Device,
        dtype: DType,
        format: WeightFormat,
    ) -> Result<Self> {
        check_dtype(device, dtype)?;
        let Checkpoint { config, weights, tokenizer, still, lora, recipe, base } = checkpoint;
        let decoder = Arc::new(Decoder::load_in(&config, &weights, device, dtype, format)?);
        let student = still
            .map(|still| Student::from_weights(still, lora, &config, &weights)?.to_device(device))
            .transpose()?
            .map(|student| Student { recipe, ..student });
        weights.check_all_read(&config)?;
        Ok(Self { decoder, student, tokenizer, base })
    }

    /// The same model on another device; `dtype` as in [`Model::load_on`]. Matrices that are packed stay as they are if they can
    /// ([`WeightFormat::File`]).
    ///
    /// # Errors
    /// A dtype that the device has no kernels for; too little memory there.
    pub fn to_device(&self, device: &Device, dtype: DType) -> Result<Self> {
        self.to_device_in(device, dtype, WeightFormat::File)
    }

    /// [`Model::to_device`] with matrices in another form than they have.
    ///
    /// # Errors
    /// Also a form that the device has no products with.
    pub fn to_device_in(
        &self,
        device: &Device,
        dtype: DType,
        format: WeightFormat,
    ) -> Result<Self> {
        check_dtype(device, dtype)?;
        let (mut tensors, mut packed) = (HashMap::new(), HashMap::new());
        for (name, part) in self.decoder.parts() {
            match part {
                Part::Matrix(Weight::Packed(matrix)) => {
                    packed.insert(name, matrix.clone());
                }
                part => {
                    tensors.insert(name, part.to_tensor()?);
                }
            }
        }
        let weights = Weights::from_tensors(tensors).overlaid(Weights::from_packed(packed));
        let decoder = Arc::new(Decoder::load_in(self.config(), &weights, device, dtype, format)?);
        let student = self.student.as_ref().map(|student| student.to_device(device)).transpose()?;
        Ok(Self { decoder, student, ..self.clone() })
    }
}

impl Decoder {
    /// Assembles a decoder from named weights. Matrices stay as their file has them where products can use that
    /// ([`WeightFormat::File`]); everything else is of `dtype`, f32 on the CPU.
    ///
    /// # Errors
    /// A missing tensor or one of another shape.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        Self::load_in(config, weights, device, dtype, WeightFormat::File)
    }

    /// [`Decoder::load`] with matrices in another form.
    ///
    /// # Errors
    /// Also a form that the device has no products with.
    pub fn load_in(
        config: &ModelConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
        format: WeightFormat,
    ) -> Result<Self> {
        config.check_device(device.location())?;
        // What the family's files have, and nothing else, is asked for.
        let shapes = shapes(config);
        let missing = |name: &str| ModelError::Invalid(format!("the family has no tensor {name}"));
        let vector = |name: &str| -> Result<Option<Tensor>> {
            shapes.get(name).map(|shape| weights.get(name, shape, dtype, device)).transpose()
        };
        let matrix = |name: &str| -> Result<Weight> {
            match shapes.get(name).map(Vec::as_slice) {
                Some(&[rows, columns]) => {
                    format.place(weights, name, [rows, columns], device, dtype)
                }
                _ => Err(missing(name)),
            }
        };
        let family = config.architecture.family();
        let norm = |name: &str| -> Result<Option<NormWeight>> {
            let stored = vector(name)?;
            Ok(stored.map(|w| NormWeight::from_stored(w, family.norm_offset)).transpose()?)
        };
        let layer = |n: usize| -> Result<DecoderLayer> {
            let name = |name: &str| format!("model.layers.{n}.{name}");
            let linear = |of: &str| -> Result<Linear> {
                Ok(Linear {
                    weight: matrix(&name(&format!("{of}.weight")))?,
                    bias: vector(&name(&format!("{of}.bias")))?,
                })
            };
            let optional_norm = |of: &str| norm(&name(&format!("{of}.weight")));
            let norm = |of: &str| optional_norm(of)?.ok_or_else(|| missing(of));
            let post_norm = |of: &str| family.post_norms.then(|| norm(of)).transpose();
            Ok(DecoderLayer {
                input_layernorm: norm("input_layernorm")?,
                q_proj: linear("self_attn.q_proj")?,
                k_proj: linear("self_attn.k_proj")?,
                v_proj: linear("self_attn.v_proj")?,
                o_proj: linear("self_attn.o_proj")?,
                q_norm: optional_norm("self_attn.q_norm")?,
                k_norm: optional_norm("self_attn.k_norm")?,
                post_attention_norm: post_norm("post_attention_layernorm")?,
                mlp: MlpWeights {
                    norm: norm(family.mlp_norm())?,
                    gate: linear("mlp.gate_proj")?,
                    up: linear("mlp.up_proj")?,
                    down: linear("mlp.down_proj")?,
                    activation: family.activation,
                    post_norm: post_norm("post_feedforward_layernorm")?,
                },
                rms_norm_eps: config.rms_norm_eps,
                head_dim: config.head_dim,
                sliding_window: config.sliding_window(n),
                logit_scale: config.logit_scale(),
            })
        };
        let embed_tokens = matrix("model.embed_tokens.weight")?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            matrix("lm_head.weight")?
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        let last = "model.norm.weight";
        let norm = norm(last)?.ok_or_else(|| missing(last))?;
        Ok(Self::new(config.clone(), embed_tokens, layers, norm, lm_head))
    }
}
