//! What sets the decoder families apart, as data. A new family is an entry here; its tensors' names are in
//! `checkpoint/names.rs`, an operation that no other family has in `decoder/layer.rs`.

pub use still_compute::rows::Activation;

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
    /// Gemma 3, its text models: layers with a sliding window among those with full attention, which alone are linearized.
    Gemma3,
    /// Gemma, the first: Llama with GELU, scaled embeddings and norms stored less one.
    Gemma,
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

/// What says whether layers attend to a sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WindowKey {
    /// `use_sliding_window` alone, which the family does not have.
    None,
    /// `sliding_window`; without the key it is this many tokens, or there is none.
    Window(Option<usize>),
    /// `layer_types`, or `use_sliding_window` with `max_window_layers`.
    ByLayer,
    /// `layer_types`, or every layer but each so-many-th. Here alone the window may be shorter than the context: linearizing leaves
    /// those layers as they are.
    Pattern { window: usize, period: usize },
}

/// What a family's files say, leave out and mean.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    /// `model_type` of a Hugging Face configuration.
    pub model_type: &'static str,
    /// `architectures[0]` of a Hugging Face configuration.
    pub class_name: &'static str,
    /// `general.architecture` of a GGUF file; llama.cpp calls a Mistral a `llama`.
    pub gguf_name: Option<&'static str>,
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
    /// `rope_theta` of a configuration that leaves it out.
    pub rope_theta: f64,
    /// The same of layers with a sliding window (`rope_local_base_freq`), where they have a rotation of their own.
    pub local_rope_theta: Option<f64>,
    /// `tie_word_embeddings` of a configuration that leaves it out.
    pub tie_word_embeddings: bool,
    /// `query_pre_attn_scalar` of a configuration that leaves it out; `None`: the family has no such key, and scales by the head's
    /// channels.
    pub query_pre_attn_scalar: Option<f64>,
    pub biased: Biased,
    pub window: WindowKey,
    /// Whether every query and key head has a norm of its own before it is rotated.
    pub qk_norm: bool,
    /// Whether `partial_rotary_factor` decides how much of each head is rotated; other families rotate all of it.
    pub partial_rotation: bool,
    pub activation: Activation,
    /// The key that Hugging Face's configurations have the activation under.
    pub activation_key: &'static str,
    /// The activation's names there, the usual one first.
    pub activation_names: &'static [&'static str],
    /// What is added to the weights of norms in Hugging Face's files; llama.cpp's have the sum.
    pub norm_offset: f64,
    /// Whether attention and MLP have a norm on what they give, too.
    pub post_norms: bool,
    /// Whether embeddings are multiplied by the root of the hidden size.
    pub scaled_embeddings: bool,
    /// What it has that no kernel on CUDA computes.
    pub missing_on_cuda: Option<&'static str>,
}

const LLAMA: Family = Family {
    model_type: "llama",
    class_name: "LlamaForCausalLM",
    gguf_name: Some("llama"),
    interleaved_in_gguf: true,
    max_position_embeddings: 2048,
    num_key_value_heads: None,
    head_dim: None,
    rms_norm_eps: 1e-6,
    rope_theta: 10_000.0,
    local_rope_theta: None,
    tie_word_embeddings: false,
    query_pre_attn_scalar: None,
    biased: Biased::AttentionAndMlp,
    window: WindowKey::None,
    qk_norm: false,
    partial_rotation: false,
    activation: Activation::Silu,
    activation_key: "hidden_act",
    activation_names: &["silu", "swish"],
    norm_offset: 0.0,
    post_norms: false,
    scaled_embeddings: false,
    missing_on_cuda: None,
};

const MISTRAL: Family = Family {
    model_type: "mistral",
    class_name: "MistralForCausalLM",
    gguf_name: None,
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
    gguf_name: Some("qwen2"),
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
    gguf_name: Some("qwen3"),
    head_dim: Some(128),
    biased: Biased::Attention,
    qk_norm: true,
    ..QWEN2
};

const PHI3: Family = Family {
    model_type: "phi3",
    class_name: "Phi3ForCausalLM",
    gguf_name: Some("phi3"),
    interleaved_in_gguf: false,
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    biased: Biased::Never,
    window: WindowKey::Window(None),
    partial_rotation: true,
    ..LLAMA
};

const GEMMA3: Family = Family {
    model_type: "gemma3_text",
    class_name: "Gemma3ForCausalLM",
    gguf_name: Some("gemma3"),
    interleaved_in_gguf: false,
    max_position_embeddings: 131_072,
    num_key_value_heads: Some(4),
    head_dim: Some(256),
    rope_theta: 1e6,
    local_rope_theta: Some(10_000.0),
    tie_word_embeddings: true,
    query_pre_attn_scalar: Some(256.0),
    biased: Biased::Attention,
    window: WindowKey::Pattern { window: 4096, period: 6 },
    qk_norm: true,
    activation: Activation::GeluTanh,
    activation_key: "hidden_activation",
    activation_names: &["gelu_pytorch_tanh"],
    norm_offset: 1.0,
    post_norms: true,
    scaled_embeddings: true,
    missing_on_cuda: Some("sliding windows"),
    ..LLAMA
};

const GEMMA: Family = Family {
    model_type: "gemma",
    class_name: "GemmaForCausalLM",
    gguf_name: Some("gemma"),
    interleaved_in_gguf: false,
    max_position_embeddings: 8192,
    num_key_value_heads: Some(16),
    head_dim: Some(256),
    tie_word_embeddings: true,
    biased: Biased::Attention,
    activation: Activation::GeluTanh,
    // The first releases' files say "gelu", and mean the tanh form.
    activation_names: &["gelu_pytorch_tanh", "gelu"],
    norm_offset: 1.0,
    scaled_embeddings: true,
    missing_on_cuda: Some("GELU"),
    ..LLAMA
};

impl Family {
    /// The norm before the MLP, where the other name is that of a norm after the attention.
    pub fn mlp_norm(&self) -> &'static str {
        match self.post_norms {
            true => "pre_feedforward_layernorm",
            false => "post_attention_layernorm",
        }
    }
}

impl Architecture {
    /// Every family.
    pub const ALL: [Self; 7] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Phi3,
        Self::Gemma3,
        Self::Gemma,
    ];

    pub(crate) fn family(self) -> &'static Family {
        match self {
            Self::Llama => &LLAMA,
            Self::Mistral => &MISTRAL,
            Self::Qwen2 => &QWEN2,
            Self::Qwen3 => &QWEN3,
            Self::Phi3 => &PHI3,
            Self::Gemma3 => &GEMMA3,
            Self::Gemma => &GEMMA,
        }
    }

    /// `model_type` of a Hugging Face configuration.
    pub fn model_type(self) -> &'static str {
        self.family().model_type
    }

    /// `general.architecture` of a GGUF file; llama.cpp calls a Mistral a `llama`.
    pub(crate) fn gguf_name(self) -> &'static str {
        self.family().gguf_name.unwrap_or(LLAMA.model_type)
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
        let mut known = Self::ALL.into_iter().filter_map(|a| a.family().gguf_name);
        let found = Self::ALL.into_iter().find(|a| a.family().gguf_name == Some(name));
        found.ok_or_else(|| {
            let first = known.next().unwrap_or_default();
            let others: Vec<&str> = known.collect();
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
