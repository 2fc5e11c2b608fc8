//! What describes a base model, apart from its weights.

mod hugging_face;
mod read;
mod refused;
mod rope;
mod window;

use std::fmt::Display;
use std::ops::RangeInclusive;

use still_attention::HeadGeometry;

pub(crate) use read::Table;
pub use rope::RopeScaling;

use crate::error::{ModelError, Result};

const HIDDEN_SIZE: RangeInclusive<usize> = 1..=1 << 20;
const INTERMEDIATE_SIZE: RangeInclusive<usize> = 1..=1 << 22;
const LAYERS: RangeInclusive<usize> = 1..=1 << 12;
const HEADS: RangeInclusive<usize> = 1..=1 << 14;
const HEAD_DIM: RangeInclusive<usize> = 2..=1 << 12;
const VOCABULARY: RangeInclusive<usize> = 1..=1 << 24;
/// The longest context that a configuration may speak of, in tokens.
const MAX_POSITIONS: usize = u32::MAX as usize;
const RMS_NORM_EPS: RangeInclusive<f64> = 1e-20..=1.0;
const ROPE_THETA: RangeInclusive<f64> = 1.0..=1e15;
const ROTARY_FACTOR: RangeInclusive<f64> = 1e-3..=1.0;

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
    /// Phi-3, 3.5 and Phi-4-mini without a sliding window: Llama whose files hold q, k and v as one matrix, gate and up as
    /// another, and which may rotate a part of each head.
    Phi3,
}

impl Architecture {
    /// Every family.
    pub const ALL: [Self; 5] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Phi3];

    /// `model_type` of a Hugging Face configuration.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Phi3 => "phi3",
        }
    }

    /// `architectures[0]` of a Hugging Face configuration.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Phi3 => "Phi3ForCausalLM",
        }
    }

    /// Whether every query and key head has a norm of its own before it is rotated.
    pub fn qk_norm(self) -> bool {
        self == Self::Qwen3
    }

    /// Whether files hold q, k and v as one matrix (`qkv_proj`), gate and up as another (`gate_up_proj`).
    pub(crate) fn fused_projections(self) -> bool {
        self == Self::Phi3
    }

    /// Whether `partial_rotary_factor` decides how much of each head is rotated; other families rotate all of it.
    pub(crate) fn partial_rotation(self) -> bool {
        self == Self::Phi3
    }

    /// Whether `attention_bias` decides about biases, on o too. Qwen2 always has them on q, k and v, Mistral never.
    pub(crate) fn optional_attention_bias(self) -> bool {
        matches!(self, Self::Llama | Self::Qwen3)
    }

    /// Whether `mlp_bias` decides about biases of the MLP; other families have none.
    pub(crate) fn optional_mlp_bias(self) -> bool {
        self == Self::Llama
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
        let known = |a: &Self| !matches!(a, Self::Mistral | Self::Phi3);
        Self::from_model_type(name).ok().filter(known).ok_or_else(|| {
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
    /// Share of each head's channels that RoPE rotates, from the first on.
    pub partial_rotary_factor: f64,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Biases on the q, k and v projections.
    pub attention_bias: bool,
    /// A bias on the o projection. In Hugging Face's files it comes with the others; a GGUF file may have either.
    pub attention_output_bias: bool,
    /// Biases on the MLP's three projections.
    pub mlp_bias: bool,
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

    /// Channels of each head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        (self.head_dim as f64 * self.partial_rotary_factor) as usize
    }

    /// Checks that the numbers are in range and fit each other. Within these ranges no product of sizes overflows.
    ///
    /// # Errors
    /// Names the values that do not.
    pub fn validate(&self) -> Result<()> {
        for (name, value, range) in [
            ("hidden_size", self.hidden_size, HIDDEN_SIZE),
            ("intermediate_size", self.intermediate_size, INTERMEDIATE_SIZE),
            ("num_hidden_layers", self.num_hidden_layers, LAYERS),
            ("num_attention_heads", self.num_attention_heads, HEADS),
            ("num_key_value_heads", self.num_key_value_heads, HEADS),
            ("head_dim", self.head_dim, HEAD_DIM),
            ("vocab_size", self.vocab_size, VOCABULARY),
            ("max_position_embeddings", self.max_position_embeddings, 1..=MAX_POSITIONS),
        ] {
            in_range(name, value, &range)?;
        }
        in_range("rms_norm_eps", self.rms_norm_eps, &RMS_NORM_EPS)?;
        in_range("rope_theta", self.rope_theta, &ROPE_THETA)?;
        in_range("partial_rotary_factor", self.partial_rotary_factor, &ROTARY_FACTOR)?;
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if heads % kv_heads != 0 {
            return Err(ModelError::Invalid(format!(
                "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::Invalid(format!(
                "head_dim {} is not even: RoPE rotates pairs of channels",
                self.head_dim
            )));
        }
        let rotated = self.rotary_dim();
        if rotated < 2 || !rotated.is_multiple_of(2) {
            return Err(ModelError::Invalid(format!(
                "partial_rotary_factor {} of a head_dim of {} is {rotated} channels: RoPE rotates pairs",
                self.partial_rotary_factor, self.head_dim
            )));
        }
        self.rope_scaling.as_ref().map_or(Ok(()), |scaling| scaling.validate(rotated))
    }
}

fn in_range<T: Display + PartialOrd>(
    name: &str,
    value: T,
    range: &RangeInclusive<T>,
) -> Result<()> {
    // A NaN is in no range.
    if range.contains(&value) {
        return Ok(());
    }
    Err(ModelError::Invalid(format!(
        "{name} is {value}, expected a number from {} to {}",
        range.start(),
        range.end()
    )))
}
