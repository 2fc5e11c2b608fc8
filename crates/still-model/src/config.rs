//! What describes a base model, apart from its weights.

use serde_json::{Value, json};
use still_attention::HeadGeometry;

use crate::error::{ModelError, Result};

/// A supported decoder family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2, 3, 3.1, 3.2 and SmolLM2.
    Llama,
    /// Mistral without a sliding window: v0.2 and v0.3, Nemo. Llama by another name.
    Mistral,
    /// Qwen2 and Qwen2.5: Llama with biases on q, k and v.
    Qwen2,
    /// Qwen3: Llama with a norm on every query and key head.
    Qwen3,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// `model_type` of a Hugging Face configuration.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// `architectures[0]` of a Hugging Face configuration.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// Whether every query and key head has a norm of its own before it is rotated.
    pub fn qk_norm(self) -> bool {
        self == Self::Qwen3
    }

    /// By `model_type`.
    ///
    /// # Errors
    /// Names an architecture that is not supported, and those that are.
    pub fn from_model_type(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|a| a.model_type() == name).ok_or_else(|| {
            unsupported_architecture(name, Self::ALL.map(Self::model_type).join(", "))
        })
    }

    /// By `general.architecture` of a GGUF file, where a Mistral is a `llama`.
    ///
    /// # Errors
    /// Names an architecture that is not supported, and those that are.
    pub fn from_gguf(name: &str) -> Result<Self> {
        Self::from_model_type(name).ok().filter(|&a| a != Self::Mistral).ok_or_else(|| {
            unsupported_architecture(name, "llama (Mistral too), qwen2, qwen3".into())
        })
    }
}

fn unsupported_architecture(name: &str, supported: String) -> ModelError {
    ModelError::Unsupported {
        what: format!("architecture \"{name}\""),
        found_in: None,
        hint: format!("supported architectures: {supported}"),
    }
}

/// How RoPE's frequencies are stretched beyond the trained context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Tokens of the original context.
        original_max_position_embeddings: usize,
    },
}

/// A decoder's hyper-parameters, in Hugging Face's words.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are Hugging Face's own")]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: Option<RopeScaling>,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Biases on the q, k and v projections.
    pub attention_bias: bool,
    pub bos_token_id: Option<u32>,
    /// Any of these ends generation.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Head counts for the operator.
    pub fn geometry(&self) -> HeadGeometry {
        HeadGeometry {
            num_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }

    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// An unsupported architecture or option (named), a missing or contradictory value.
    pub fn from_hf_json(json: &Value) -> Result<Self> {
        let architecture = Architecture::from_model_type(
            json["model_type"].as_str().ok_or_else(|| missing("model_type"))?,
        )?;
        let required =
            |key: &str| json[key].as_u64().map(|n| n as usize).ok_or_else(|| missing(key));
        let hidden_size = required("hidden_size")?;
        let num_attention_heads = required("num_attention_heads")?;
        let optional = |key: &str| json[key].as_u64().map(|n| n as usize);
        // Newer configurations keep RoPE's parameters in one table.
        let rope = &json["rope_parameters"];
        let rope_theta =
            json["rope_theta"].as_f64().or_else(|| rope["rope_theta"].as_f64()).unwrap_or(10_000.0);
        let scaling = if json["rope_scaling"].is_object() { &json["rope_scaling"] } else { rope };
        if let Some(act) = json["hidden_act"].as_str()
            && act != "silu"
        {
            return Err(ModelError::Unsupported {
                what: format!("activation \"{act}\""),
                found_in: None,
                hint: "supported activations: silu".into(),
            });
        }
        for key in ["attention_bias", "mlp_bias"] {
            // Qwen2 has biases on q, k and v whatever this says.
            let meaningless = architecture == Architecture::Qwen2 && key == "attention_bias";
            if json[key].as_bool() == Some(true) && !meaningless {
                return Err(ModelError::Unsupported {
                    what: format!("\"{key}\": true in a {} model", architecture.model_type()),
                    found_in: None,
                    hint: "supported: attention_bias and mlp_bias false".into(),
                });
            }
        }
        let eos_token_ids = match &json["eos_token_id"] {
            Value::Array(ids) => ids.iter().filter_map(Value::as_u64).map(|id| id as u32).collect(),
            Value::Number(id) => id.as_u64().map(|id| id as u32).into_iter().collect(),
            _ => Vec::new(),
        };
        let config = Self {
            architecture,
            hidden_size,
            intermediate_size: required("intermediate_size")?,
            num_hidden_layers: required("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: optional("num_key_value_heads").unwrap_or(num_attention_heads),
            head_dim: optional("head_dim").unwrap_or_else(|| match architecture {
                Architecture::Qwen3 => 128,
                _ => hidden_size / num_attention_heads.max(1),
            }),
            vocab_size: required("vocab_size")?,
            rms_norm_eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope_theta,
            rope_scaling: rope_scaling(scaling)?,
            max_position_embeddings: optional("max_position_embeddings").unwrap_or(
                match architecture {
                    Architecture::Llama => 2048,
                    Architecture::Mistral => 131_072,
                    Architecture::Qwen2 | Architecture::Qwen3 => 32_768,
                },
            ),
            tie_word_embeddings: json["tie_word_embeddings"].as_bool().unwrap_or(false),
            attention_bias: architecture == Architecture::Qwen2,
            bos_token_id: json["bos_token_id"].as_u64().map(|id| id as u32),
            eos_token_ids,
        };
        config.validate()?;
        refuse_window(json, &config)?;
        Ok(config)
    }

    /// Writes what [`ModelConfig::from_hf_json`] reads.
    pub fn to_hf_json(&self) -> Value {
        let mut json = json!({
            "architectures": [self.architecture.class_name()],
            "model_type": self.architecture.model_type(),
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids,
        });
        if self.architecture == Architecture::Mistral {
            // A Mistral that does not say so has a window.
            json["sliding_window"] = Value::Null;
        }
        match self.rope_scaling {
            None => {}
            Some(RopeScaling::Linear { factor }) => {
                json["rope_scaling"] = json!({ "rope_type": "linear", "factor": factor });
            }
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                json["rope_scaling"] = json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position_embeddings,
                });
            }
        }
        json
    }

    /// Checks that the numbers fit each other.
    ///
    /// # Errors
    /// Names the values that do not.
    pub fn validate(&self) -> Result<()> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if heads == 0 || kv_heads == 0 || heads % kv_heads != 0 {
            return Err(ModelError::Invalid(format!(
                "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::Invalid(format!(
                "head_dim {} is not even: RoPE rotates pairs of channels",
                self.head_dim
            )));
        }
        for (name, value) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("vocab_size", self.vocab_size),
        ] {
            if value == 0 {
                return Err(ModelError::Invalid(format!("{name} is 0")));
            }
        }
        Ok(())
    }
}

/// An error if some layer attends to a window that is shorter than the context, by Hugging Face's rules.
///
/// A student takes over a teacher's attention to everything before; one that sees only a window has none to take over.
fn refuse_window(json: &Value, config: &ModelConfig) -> Result<()> {
    // What a configuration that leaves them out means.
    const WINDOW: u64 = 4096;
    const FULL_LAYERS: u64 = 28;
    let window = match json.get("sliding_window") {
        None => Some(WINDOW),
        Some(window) => window.as_u64(),
    };
    let windowed = json["use_sliding_window"].as_bool() == Some(true);
    let full_layers = json["max_window_layers"].as_u64().unwrap_or(FULL_LAYERS);
    let by_type = json["layer_types"]
        .as_array()
        .is_some_and(|types| types.iter().any(|kind| kind == "sliding_attention"));
    let key = match config.architecture {
        // The key means nothing in a Llama.
        Architecture::Llama if windowed => "use_sliding_window",
        Architecture::Llama => return Ok(()),
        Architecture::Mistral => "sliding_window",
        Architecture::Qwen2 | Architecture::Qwen3 if by_type => "layer_types",
        Architecture::Qwen2 | Architecture::Qwen3
            if windowed && full_layers < config.num_hidden_layers as u64 =>
        {
            "use_sliding_window"
        }
        Architecture::Qwen2 | Architecture::Qwen3 => return Ok(()),
    };
    let context = config.max_position_embeddings;
    match window {
        Some(window) if window < context as u64 => Err(ModelError::Unsupported {
            what: format!(
                "a {} model whose attention is a sliding window of {window} tokens (\"{key}\"), shorter than its \
                 context of {context},",
                config.architecture.model_type()
            ),
            found_in: None,
            hint: "linearizing replaces attention to the whole context, which this model does not have: use a \
                   version without a window (of Mistral 7B: v0.2 or later), or lower max_position_embeddings to \
                   the window and stay within it"
                .into(),
        }),
        _ => Ok(()),
    }
}

fn missing(key: &str) -> ModelError {
    ModelError::Invalid(format!("the configuration has no usable \"{key}\""))
}

fn rope_scaling(json: &Value) -> Result<Option<RopeScaling>> {
    let kind = json["rope_type"].as_str().or_else(|| json["type"].as_str());
    let number =
        |key: &str| json[key].as_f64().ok_or_else(|| missing(&format!("rope_scaling.{key}")));
    match kind {
        None | Some("default") => Ok(None),
        Some("linear") => Ok(Some(RopeScaling::Linear { factor: number("factor")? })),
        Some("llama3") => Ok(Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: number("original_max_position_embeddings")? as usize,
        })),
        Some(other) => Err(ModelError::Unsupported {
            what: format!("rope scaling \"{other}\""),
            found_in: None,
            hint: "supported: default, linear, llama3".into(),
        }),
    }
}
