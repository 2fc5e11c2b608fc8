//! A student's learned tensors: feature maps, λ, gate and low-rank updates of every layer.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use still_attention::{HybridWeights, LinearNorm, StillConfig, fold_householder};
use still_compute::random::normal;

use crate::config::ModelConfig;
use crate::decoder::{Decoder, Lora, LoraLayer, StudentLayer};
use crate::error::{ModelError, Result};

/// Initial `w`: the exact terms weigh `sigmoid(w)` = 0.1 (LoLCATs).
const WINDOW_FACTOR_INIT: f32 = -2.197;

/// Initial values of feature maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeatureInit {
    /// `W = I`.
    #[default]
    Identity,
    /// `W` normal with variance `1/D`.
    Normal,
}

/// Which low-rank updates a student has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank `r`.
    pub rank: usize,
    /// `α`: updates are scaled by `α / r`.
    pub alpha: f64,
    /// Projections among `q`, `k`, `v`, `o` and, of a student with an output gate, `g`.
    pub targets: Vec<LoraTarget>,
}

/// The highest rank of an update.
const MAX_RANK: usize = 1 << 16;
/// The largest `α`.
const MAX_ALPHA: f64 = 1e6;

impl LoraConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the one that is out of range.
    pub fn validate(&self) -> Result<()> {
        let (rank, alpha) = (self.rank, self.alpha);
        if rank == 0 || rank > MAX_RANK || self.targets.is_empty() {
            return Err(ModelError::Invalid(format!(
                "LoRA needs a positive rank of {MAX_RANK} at most and at least one target: rank {rank}, {} targets",
                self.targets.len()
            )));
        }
        if alpha.is_nan() || alpha.abs() > MAX_ALPHA {
            return Err(ModelError::Invalid(format!(
                "LoRA's alpha is {alpha}, expected a number from -{MAX_ALPHA} to {MAX_ALPHA}"
            )));
        }
        Ok(())
    }
}

/// A projection that can have a low-rank update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names say it")]
pub enum LoraTarget {
    Q,
    K,
    V,
    O,
    /// The output gate's projection: the student's own, not the base's.
    G,
}

impl LoraTarget {
    /// The base's four projections.
    pub const ALL: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];
    /// These four and the output gate's.
    pub const WITH_GATE: [Self; 5] = [Self::Q, Self::K, Self::V, Self::O, Self::G];

    /// The projection's name in a checkpoint.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::G => "g_proj",
        }
    }

    fn slot(self, layer: &LoraLayer) -> &Option<Lora> {
        match self {
            Self::Q => &layer.q,
            Self::K => &layer.k,
            Self::V => &layer.v,
            Self::O => &layer.o,
            Self::G => &layer.g,
        }
    }

    fn slot_mut(self, layer: &mut LoraLayer) -> &mut Option<Lora> {
        match self {
            Self::Q => &mut layer.q,
            Self::K => &mut layer.k,
            Self::V => &mut layer.v,
            Self::O => &mut layer.o,
            Self::G => &mut layer.g,
        }
    }

    /// `[out, in]` of the projection.
    pub(crate) fn shape(self, model: &ModelConfig) -> (usize, usize) {
        let (q, kv) = (model.num_attention_heads, model.num_key_value_heads);
        match self {
            Self::Q | Self::G => (q * model.head_dim, model.hidden_size),
            Self::K | Self::V => (kv * model.head_dim, model.hidden_size),
            Self::O => (model.hidden_size, q * model.head_dim),
        }
    }
}

/// The learned part of a student and the configuration of its attention.
#[derive(Clone, Debug)]
pub struct Student {
    /// The configuration of every layer's attention.
    pub config: StillConfig,
    /// The layers whose attention it replaces, bottom first: all but those with a sliding window. `config.layer` is a layer's
    /// number.
    pub layers: Vec<StudentLayer>,
    /// The low-rank updates' configuration, while they are not merged.
    pub lora: Option<LoraConfig>,
    /// The resolved recipe that trained it, if any.
    pub recipe: Option<serde_json::Value>,
}

impl Student {
    /// The learned tensors of a decoder's layer. `None` for a layer that keeps its attention.
    pub fn layer(&self, layer: usize) -> Option<&StudentLayer> {
        let found = self.layers.binary_search_by_key(&layer, |own| own.config.layer);
        found.ok().map(|index| &self.layers[index])
    }

    /// An untrained student: feature maps as `init` says, `û` normal, `ℓ = ln 8`, `w = −2.197`, a gate near one half.
    ///
    /// # Errors
    /// A configuration that does not fit the model.
    pub fn init(
        config: StillConfig,
        model: &ModelConfig,
        init: FeatureInit,
        seed: u64,
    ) -> Result<Self> {
        let geometry = model.geometry();
        model.check_still(&config)?;
        if init == FeatureInit::Identity && config.feature_dim != model.head_dim {
            return Err(ModelError::Invalid(format!(
                "an identity feature map needs feature_dim = head_dim: {} and {}",
                config.feature_dim, model.head_dim
            )));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (d, f) = (model.head_dim, config.feature_dim);
        let heads = model.num_attention_heads;
        let selection_heads = geometry.selection_heads(config.selection_head);
        let mut map = |heads: usize| -> Result<Tensor> {
            Ok(match init {
                FeatureInit::Identity => {
                    Tensor::eye(d, DType::F32, &Device::Cpu)?.unsqueeze(0)?.repeat((heads, 1, 1))?
                }
                FeatureInit::Normal => normal(&mut rng, &[heads, d, f], (d as f64).powf(-0.5))?,
            })
        };
        let maps = model
            .full_layers()
            .map(|n| Ok((n, map(heads)?, map(selection_heads)?)))
            .collect::<Result<Vec<_>>>()?;
        let reflected = config.feature_map.reflects();
        let layers = maps
            .into_iter()
            .map(|(n, feature_map_q, feature_map_k)| {
                let mut reflection = |heads: usize| -> Result<Option<Tensor>> {
                    Ok(reflected.then(|| normal(&mut rng, &[heads, d], 1.0)).transpose()?)
                };
                let (householder_q, householder_k) =
                    (reflection(heads)?, reflection(selection_heads)?);
                let log_lambda = (config.linear_norm == LinearNorm::Mean)
                    .then(|| Tensor::full(8.0_f32.ln(), heads, &Device::Cpu))
                    .transpose()?;
                let window_factor = config
                    .window_factor
                    .then(|| Tensor::full(WINDOW_FACTOR_INIT, heads, &Device::Cpu))
                    .transpose()?;
                let gate_proj = config
                    .gate
                    .then(|| normal(&mut rng, &[heads * d, model.hidden_size], 0.02))
                    .transpose()?;
                Ok(StudentLayer {
                    config: config.layer(n)?,
                    attention: HybridWeights {
                        feature_map_q,
                        feature_map_k,
                        householder_q,
                        householder_k,
                        log_lambda,
                        window_factor,
                    },
                    gate_proj,
                    lora: None,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, layers, lora: None, recipe: None })
    }

    /// The same learned tensors under another configuration, for ablations. A scale that the tensors lack starts as in
    /// [`Student::init`]. A scale that the configuration does not use is left out. Reflections become part of the maps' matrices.
    ///
    /// # Errors
    /// A configuration that does not fit the model, or that needs maps of another shape or a gate that was never learned.
    pub fn with_config(&self, config: StillConfig, model: &ModelConfig) -> Result<Self> {
        let fits = |old: &StillConfig| {
            old.selection_head == config.selection_head && old.feature_dim == config.feature_dim
        };
        if !fits(&self.config) || (config.gate && !self.config.gate) {
            return Err(ModelError::Invalid(
                "a student keeps its selection heads, the width of its feature maps, and has no gate that it did not learn"
                    .into(),
            ));
        }
        let fresh = Self::init(config.clone(), model, FeatureInit::Normal, 0)?;
        let layers = self.layers.iter().zip(fresh.layers).map(|(old, new)| {
            let (mut attention, fresh) = (old.attention.clone(), new.attention);
            if fresh.householder_q.is_none() {
                for (map, reflection) in [
                    (&mut attention.feature_map_q, attention.householder_q.take()),
                    (&mut attention.feature_map_k, attention.householder_k.take()),
                ] {
                    if let Some(reflection) = reflection {
                        *map = fold_householder(map, &reflection)?;
                    }
                }
            } else if attention.householder_q.is_none() {
                return Err(ModelError::Invalid("the student has learned no reflections".into()));
            }
            let keep = |old: &mut Option<Tensor>, fresh: Option<Tensor>| {
                *old = fresh.map(|fresh| old.take().unwrap_or(fresh));
            };
            keep(&mut attention.log_lambda, fresh.log_lambda);
            keep(&mut attention.window_factor, fresh.window_factor);
            let gate_proj = new.config.gate.then(|| old.gate_proj.clone()).flatten();
            Ok(StudentLayer { config: new.config, attention, gate_proj, lora: old.lora.clone() })
        });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self { config, layers, ..self.clone() })
    }

    /// Adds low-rank updates that change nothing yet: `A` uniform as in PEFT (Kaiming, a = √5), `B = 0`.
    ///
    /// # Errors
    /// A rank or `α` out of range, or no targets; the gate as a target of a student that has none.
    pub fn add_lora(&mut self, model: &ModelConfig, lora: LoraConfig, seed: u64) -> Result<()> {
        lora.validate()?;
        if lora.targets.contains(&LoraTarget::G) && !self.config.gate {
            return Err(ModelError::Invalid(
                "the output gate (\"g\") is a target of LoRA, but the student has none".into(),
            ));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for layer in &mut self.layers {
            let mut updates = LoraLayer::default();
            for &target in &lora.targets {
                let (out, inner) = target.shape(model);
                let bound = 1.0 / (inner as f32).sqrt();
                let a: Vec<f32> =
                    (0..lora.rank * inner).map(|_| rng.random_range(-bound..bound)).collect();
                *target.slot_mut(&mut updates) = Some(Lora {
                    a: Tensor::from_vec(a, (lora.rank, inner), &Device::Cpu)?,
                    b: Tensor::zeros((out, lora.rank), DType::F32, &Device::Cpu)?,
                    scale: lora.alpha / lora.rank as f64,
                    dropout: None,
                });
            }
            layer.lora = Some(updates);
        }
        self.lora = Some(lora);
        Ok(())
    }

    /// The same student on another device.
    ///
    /// # Errors
    /// Too little memory there.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map_tensors(|_, tensor| Ok(tensor.to_device(device)?))
    }

    /// The same student with every learned tensor replaced by `f(name, tensor)`.
    ///
    /// Names are `model.layers.N.self_attn.` and `feature_map_q`, `feature_map_k`, `householder_q`,
    /// `householder_k`, `log_lambda`, `window_factor`, `g_proj.weight`, or `q_proj.lora_A.weight` and its like.
    ///
    /// # Errors
    /// An error of `f`.
    pub fn map_tensors(&self, mut f: impl FnMut(&str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let mut student = self.clone();
        for layer in &mut student.layers {
            let n = layer.config.layer;
            let mut apply = |name: &str, tensor: &mut Tensor| -> Result<()> {
                *tensor = f(&format!("model.layers.{n}.self_attn.{name}"), tensor)?;
                Ok(())
            };
            let attention = &mut layer.attention;
            apply("feature_map_q", &mut attention.feature_map_q)?;
            apply("feature_map_k", &mut attention.feature_map_k)?;
            for (name, tensor) in [
                ("householder_q", &mut attention.householder_q),
                ("householder_k", &mut attention.householder_k),
                ("log_lambda", &mut attention.log_lambda),
                ("window_factor", &mut attention.window_factor),
                ("g_proj.weight", &mut layer.gate_proj),
            ] {
                if let Some(tensor) = tensor {
                    apply(name, tensor)?;
                }
            }
            let Some(updates) = &mut layer.lora else { continue };
            for target in LoraTarget::WITH_GATE {
                if let Some(lora) = target.slot_mut(updates) {
                    apply(&format!("{}.lora_A.weight", target.name()), &mut lora.a)?;
                    apply(&format!("{}.lora_B.weight", target.name()), &mut lora.b)?;
                }
            }
        }
        Ok(student)
    }

    /// The decoder with this student's low-rank updates merged into its weights, and the student without them. The updated
    /// weights are copies; saving merges them one at a time instead.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn merged_into(&self, decoder: &Decoder) -> Result<(Decoder, Self)> {
        let mut decoder = decoder.clone();
        for (n, base) in decoder.layers.iter_mut().enumerate() {
            if let Some(lora) = self.layer(n).and_then(|layer| layer.lora.as_ref()) {
                *base = base.merged(lora)?;
            }
        }
        Ok((decoder, self.without_updates()?))
    }

    /// Low-rank updates by the name of the weight that each is added to.
    pub fn updates(&self) -> HashMap<String, &Lora> {
        let mut all = HashMap::new();
        for layer in &self.layers {
            let n = layer.config.layer;
            let Some(updates) = &layer.lora else { continue };
            for target in LoraTarget::ALL {
                if let Some(lora) = target.slot(updates) {
                    let name = target.name();
                    all.insert(format!("model.layers.{n}.self_attn.{name}.weight"), lora);
                }
            }
        }
        all
    }

    /// The same student without low-rank updates. The update of its gate is merged; those of the base's weights
    /// ([`Student::updates`]) are dropped.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn without_updates(&self) -> Result<Self> {
        let mut student = self.clone();
        for layer in &mut student.layers {
            let update = layer.lora.take().and_then(|updates| updates.g);
            if let (Some(gate), Some(update)) = (&mut layer.gate_proj, update) {
                *gate = update.added_to(&gate.clone().into())?.to_device(gate.device())?;
            }
        }
        student.lora = None;
        Ok(student)
    }

    /// Number of learned values.
    pub fn parameters(&self) -> usize {
        let mut count = 0;
        let counted = self.map_tensors(|_, tensor| {
            count += tensor.elem_count();
            Ok(tensor.clone())
        });
        debug_assert!(counted.is_ok(), "counting cannot fail");
        count
    }

    /// Whether a projection has an update (for messages and tests).
    pub fn has_lora(&self, target: LoraTarget) -> bool {
        let slot = |layer: &StudentLayer| {
            layer.lora.as_ref().is_some_and(|lora| target.slot(lora).is_some())
        };
        self.layers.iter().any(slot)
    }
}
