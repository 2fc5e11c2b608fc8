//! What sets the decoder families apart, as data. A new family is an entry here; its tensors' names are in
//! `checkpoint/names.rs`, an operation that no other family has in `decoder/layer.rs`.

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
    /// Phi-3, 3.5 and Phi-4-mini without a sliding window: Llama whose files hold q, k and v as one matrix, gate and up as
    /// another, and which may rotate a part of each head.
    Phi3,
}

/// Which projections have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Biased {
    /// None has.
    Never,
    /// q, k and v have, whatever the configuration says.
    Qkv,
    /// `attention_bias` decides about q, k, v and o.
    Attention,
    /// `attention_bias` decides about q, k, v and o, `mlp_bias` about the MLP.
    AttentionAndMlp,
}

/// What says whether layers attend to a sliding window, which is refused where it is shorter than the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WindowKey {
    /// `use_sliding_window` alone, which the family does not have.
    None,
    /// `sliding_window`; without the key it is this many tokens, or there is none.
    Window(Option<usize>),
    /// `layer_types`, or `use_sliding_window` with `max_window_layers`.
    ByLayer,
}

/// What a family's files say, leave out and mean.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    /// `model_type` of a Hugging Face configuration.
    pub model_type: &'static str,
    /// `architectures[0]` of a Hugging Face configuration.
    pub class_name: &'static str,
    /// Whether GGUF files name it by its `model_type` (`general.architecture`); llama.cpp calls a Mistral a `llama`.
    pub in_gguf: bool,
    /// Whether llama.cpp stores the rows of q and k interleaved, and frequencies' factors in `rope_freqs.weight`.
    pub interleaved_in_gguf: bool,
    /// `max_position_embeddings` of a configuration that leaves it out.
    pub max_position_embeddings: usize,
    /// `num_key_value_heads` of a configuration that leaves it out; `None`: as many as query heads.
    pub num_key_value_heads: Option<usize>,
    /// `head_dim` of a configuration that leaves it out; `None`: the hidden size divided by the heads.
    pub head_dim: Option<usize>,
    /// `rms_norm_eps` of a configuration that leaves it out.
    pub rms_norm_eps: f64,
    pub biased: Biased,
    pub window: WindowKey,
    /// Whether every query and key head has a norm of its own before it is rotated.
    pub qk_norm: bool,
    /// Whether files hold q, k and v as one matrix (`qkv_proj`), gate and up as another (`gate_up_proj`).
    pub fused_projections: bool,
    /// Whether `partial_rotary_factor` decides how much of each head is rotated; other families rotate all of it.
    pub partial_rotation: bool,
}

const LLAMA: Family = Family {
    model_type: "llama",
    class_name: "LlamaForCausalLM",
    in_gguf: true,
    interleaved_in_gguf: true,
    max_position_embeddings: 2048,
    num_key_value_heads: None,
    head_dim: None,
    rms_norm_eps: 1e-6,
    biased: Biased::AttentionAndMlp,
    window: WindowKey::None,
    qk_norm: false,
    fused_projections: false,
    partial_rotation: false,
};

const MISTRAL: Family = Family {
    model_type: "mistral",
    class_name: "MistralForCausalLM",
    in_gguf: false,
    interleaved_in_gguf: false,
    max_position_embeddings: 131_072,
    num_key_value_heads: Some(8),
    biased: Biased::Never,
    window: WindowKey::Window(Some(4096)),
    ..LLAMA
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    class_name: "Qwen2ForCausalLM",
    interleaved_in_gguf: false,
    max_position_embeddings: 32_768,
    num_key_value_heads: Some(32),
    biased: Biased::Qkv,
    window: WindowKey::ByLayer,
    ..LLAMA
};

const QWEN3: Family = Family {
    model_type: "qwen3",
    class_name: "Qwen3ForCausalLM",
    head_dim: Some(128),
    biased: Biased::Attention,
    qk_norm: true,
    ..QWEN2
};

const PHI3: Family = Family {
    model_type: "phi3",
    class_name: "Phi3ForCausalLM",
    interleaved_in_gguf: false,
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    biased: Biased::Never,
    window: WindowKey::Window(None),
    fused_projections: true,
    partial_rotation: true,
    ..LLAMA
};

impl Architecture {
    /// Every family.
    pub const ALL: [Self; 5] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Phi3];

    pub(crate) fn family(self) -> &'static Family {
        match self {
            Self::Llama => &LLAMA,
            Self::Mistral => &MISTRAL,
            Self::Qwen2 => &QWEN2,
            Self::Qwen3 => &QWEN3,
            Self::Phi3 => &PHI3,
        }
    }

    /// `model_type` of a Hugging Face configuration.
    pub fn model_type(self) -> &'static str {
        self.family().model_type
    }

    /// By `model_type`.
    ///
    /// # Errors
    /// Names an architecture that is not supported, and those that are.
    pub fn from_model_type(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|a| a.model_type() == name)
            .ok_or_else(|| unsupported(name, Self::ALL.map(Self::model_type).join(", ")))
    }

    /// By `general.architecture` of a GGUF file, where a Mistral is a `llama`.
    ///
    /// # Errors
    /// Names an architecture that is not supported, and those that are.
    pub fn from_gguf(name: &str) -> Result<Self> {
        let mut known = Self::ALL.into_iter().filter(|a| a.family().in_gguf);
        known.clone().find(|a| a.model_type() == name).ok_or_else(|| {
            let first = known.next().map(Self::model_type).unwrap_or_default();
            let others: Vec<&str> = known.map(Self::model_type).collect();
            unsupported(name, format!("{first} (Mistral too), {}", others.join(", ")))
        })
    }
}

impl Biased {
    /// Whether `attention_bias` decides about biases, on o too.
    pub fn optional_attention(self) -> bool {
        matches!(self, Self::Attention | Self::AttentionAndMlp)
    }

    /// Whether `mlp_bias` decides about biases of the MLP; other families have none.
    pub fn optional_mlp(self) -> bool {
        self == Self::AttentionAndMlp
    }
}

fn unsupported(name: &str, supported: String) -> ModelError {
    ModelError::Unsupported {
        what: format!("architecture \"{name}\""),
        found_in: None,
        hint: format!("supported architectures: {supported}"),
    }
}
