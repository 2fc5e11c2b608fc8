//! What describes a base model, apart from its weights.

use serde_json::{Value, json};
use still_attention::HeadGeometry;

use crate::error::{ModelError, Result};

/// A supported decoder family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2, 3, 3.1, 3.2 and SmolLM2.
    Llama,
    /// Qwen2 and Qwen2.5: Llama with biases on q, k and v.
    Qwen2,
}

impl Architecture {
    const ALL: [Self; 2] = [Self::Llama, Self::Qwen2];

    /// `model_type` of a Hugging Face configuration, `general.architecture` of a GGUF file.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }

    /// `architectures[0]` of a Hugging Face configuration.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
        }
    }

    /// By `model_type`.
    ///
    /// # Errors
    /// Names an architecture that is not supported.
    pub fn from_model_type(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|a| a.model_type() == name).ok_or_else(|| {
            ModelError::Unsupported {
                what: format!("architecture \"{name}\""),
                found_in: None,
                hint: "supported architectures: llama, qwen2".into(),
            }
        })
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
        if json["use_sliding_window"].as_bool() == Some(true) {
            return Err(ModelError::Unsupported {
                what: "a base model with sliding-window attention".into(),
                found_in: None,
                hint: "use a checkpoint with \"use_sliding_window\": false".into(),
            });
        }
        if let Some(act) = json["hidden_act"].as_str()
            && act != "silu"
        {
            return Err(ModelError::Unsupported {
                what: format!("activation \"{act}\""),
                found_in: None,
                hint: "supported activations: silu".into(),
            });
        }
        if json["mlp_bias"].as_bool() == Some(true)
            || (architecture == Architecture::Llama
                && json["attention_bias"].as_bool() == Some(true))
        {
            return Err(ModelError::Unsupported {
                what: "a Llama model with projection biases".into(),
                found_in: None,
                hint: "supported: attention_bias and mlp_bias false".into(),
            });
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
            head_dim: optional("head_dim")
                .unwrap_or_else(|| hidden_size / num_attention_heads.max(1)),
            vocab_size: required("vocab_size")?,
            rms_norm_eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope_theta,
            rope_scaling: rope_scaling(scaling)?,
            max_position_embeddings: optional("max_position_embeddings").unwrap_or(2048),
            tie_word_embeddings: json["tie_word_embeddings"].as_bool().unwrap_or(false),
            attention_bias: architecture == Architecture::Qwen2,
            bos_token_id: json["bos_token_id"].as_u64().map(|id| id as u32),
            eos_token_ids,
        };
        config.validate()?;
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
