//! Keys that change what a decoder computes in some family of models, and are not computed here.
//!
//! A configuration has hundreds of keys that say nothing about its arithmetic, so unknown keys are passed over. The ones
//! here are refused unless their value changes nothing, whatever the family: a file that carries one means it.

use serde_json::Value;

use super::ModelConfig;
use super::read::Table;
use crate::error::Result;

/// The value of a key that changes nothing. Absent and null always do.
#[derive(Clone, Copy)]
enum Neutral {
    /// False, zero, an empty list or text.
    Off,
    /// This number.
    Number(f64),
    /// This text.
    Text(&'static str),
    /// What logits are multiplied by: `head_dim^-0.5` in most families.
    AttentionScale,
    /// What queries are scaled by the root of: the `head_dim` in most families.
    QueryScalar,
    /// `head_dim`.
    HeadDim,
    /// `hidden_size`.
    HiddenSize,
    /// `rope_theta`.
    Theta,
    /// None but absence.
    Absent,
}

use Neutral::{Absent, AttentionScale, HeadDim, HiddenSize, Number, Off, QueryScalar, Text, Theta};

/// The base of layers with a sliding window: read where a family has such layers.
const LOCAL_BASE: &str = "rope_local_base_freq";

const KEYS: [(&str, Neutral); 75] = [
    // Factors along the residual stream and at its ends (Granite, Cohere, MiniCPM, Falcon-H1, Gemma).
    ("residual_multiplier", Number(1.0)),
    ("embedding_multiplier", Number(1.0)),
    ("logits_scaling", Number(1.0)),
    ("logit_scale", Number(1.0)),
    ("lm_head_multiplier", Number(1.0)),
    ("attention_in_multiplier", Number(1.0)),
    ("attention_out_multiplier", Number(1.0)),
    ("key_multiplier", Number(1.0)),
    ("mlp_multipliers", Absent),
    ("scale_emb", Number(1.0)),
    ("scale_depth", Absent),
    ("dim_model_base", HiddenSize),
    ("embedding_scale", Number(1.0)),
    ("scale_embeddings", Off),
    ("scale_embedding", Off),
    ("normalize_embedding", Off),
    ("mup_embedding_multiplier", Number(1.0)),
    ("mup_width_multiplier", Number(1.0)),
    ("use_mup", Off),
    // The logits of attention.
    ("attention_multiplier", AttentionScale),
    ("softmax_scale", AttentionScale),
    ("query_pre_attn_scalar", QueryScalar),
    ("attn_logit_softcapping", Off),
    ("attn_logit_softcap", Off),
    ("final_logit_softcapping", Off),
    ("final_logit_softcap", Off),
    ("logits_soft_cap", Off),
    ("attn_temperature_tuning", Off),
    ("use_logn_attn", Off),
    ("clip_qkv", Off),
    ("attention_sink", Off),
    ("use_attention_sinks", Off),
    // Who attends to what.
    ("attention_chunk_size", Off),
    ("use_cla", Off),
    ("cla_share_factor", Number(1.0)),
    ("num_kv_shared_layers", Off),
    ("cross_attention_layers", Off),
    ("add_cross_attention", Off),
    ("is_encoder_decoder", Off),
    ("alibi", Off),
    ("use_alibi", Off),
    ("use_bidirectional_attention", Off),
    ("parallel_attn", Off),
    ("parallel_residual", Off),
    ("use_parallel_residual", Off),
    ("use_mamba", Off),
    ("kv_lora_rank", Off),
    ("q_lora_rank", Off),
    // Rotation.
    ("rope_interleaved", Off),
    ("rope_interleave", Off),
    ("rope_ratio", Number(1.0)),
    (LOCAL_BASE, Theta),
    ("local_rope_theta", Theta),
    ("global_rope_theta", Theta),
    ("rotary_emb_base", Theta),
    ("rotary_dim", HeadDim),
    ("rotary_emb_fraction", Number(1.0)),
    ("use_mrope", Off),
    ("use_dynamic_ntk", Off),
    ("position_embedding_type", Text("rope")),
    // Experts.
    ("num_experts", Off),
    ("num_local_experts", Off),
    ("n_routed_experts", Off),
    ("n_shared_experts", Off),
    ("moe_num_experts", Off),
    ("moe_intermediate_size", Off),
    // Norms.
    ("qk_layernorm", Off),
    ("norm_after", Off),
    ("use_post_norm", Off),
    ("sandwich_norm", Off),
    ("add_unit_offset", Off),
    ("rms_norm_add_unit_offset", Off),
    // A model of which the decoder is one part.
    ("text_config", Absent),
    ("vision_config", Absent),
    ("audio_config", Absent),
];

/// An error that names a key whose value is not neutral.
pub(super) fn refuse(table: &Table<'_>, config: &ModelConfig) -> Result<()> {
    for (key, neutral) in KEYS {
        let Some(value) = table.value(key) else { continue };
        let family = config.architecture.family();
        if key == LOCAL_BASE && family.local_rope_theta.is_some() {
            continue;
        }
        if !neutral.is(value, config) {
            return Err(table.unsupported(
                key,
                format!(
                    "what this key asks for is not computed here; supported: {}",
                    neutral.named(config)
                ),
            ));
        }
    }
    for key in ["qk_norm", "use_qk_norm"] {
        if table.flag(key)?.is_some_and(|normed| normed != config.architecture.family().qk_norm) {
            return Err(table.unsupported(
                key,
                format!(
                    "a {} model {} norms on the heads of queries and keys",
                    config.architecture.model_type(),
                    if config.architecture.family().qk_norm { "has" } else { "has no" }
                ),
            ));
        }
    }
    refuse_unrotated_layers(table, config)
}

/// SmolLM3's layers without RoPE.
fn refuse_unrotated_layers(table: &Table<'_>, config: &ModelConfig) -> Result<()> {
    const HINT: &str = "supported: every layer rotates its queries and keys";
    const LAYERS: &str = "no_rope_layers";
    const INTERVAL: &str = "no_rope_layer_interval";
    // One for each layer that does rotate, for all the key's name.
    if let Some(rotated) = table.sizes(LAYERS, 0..=1)? {
        return match rotated.iter().take(config.num_hidden_layers).all(|&rotated| rotated == 1) {
            true => Ok(()),
            false => Err(table.unsupported(LAYERS, HINT)),
        };
    }
    match table.size(INTERVAL, 0..=usize::MAX)? {
        Some(interval) if interval <= config.num_hidden_layers => {
            Err(table.unsupported(INTERVAL, HINT))
        }
        _ => Ok(()),
    }
}

/// What a model's queries are scaled by the root of.
fn query_scalar(config: &ModelConfig) -> f64 {
    config.query_pre_attn_scalar.unwrap_or(config.head_dim as f64)
}

impl Neutral {
    fn is(self, value: &Value, config: &ModelConfig) -> bool {
        let number = |expected: f64| {
            value.as_f64().is_some_and(|x| (x - expected).abs() <= 1e-6 * expected.abs())
        };
        match self {
            Off => match value {
                Value::Bool(on) => !on,
                Value::Number(n) => n.as_f64() == Some(0.0),
                Value::Array(list) => list.is_empty(),
                Value::String(text) => text.is_empty(),
                _ => false,
            },
            Number(expected) => number(expected),
            Text(expected) => value == expected,
            AttentionScale => number(query_scalar(config).powf(-0.5)),
            QueryScalar => number(query_scalar(config)),
            HeadDim => number(config.head_dim as f64),
            HiddenSize => number(config.hidden_size as f64),
            Theta => number(config.rope_theta),
            Absent => false,
        }
    }

    fn named(self, config: &ModelConfig) -> String {
        match self {
            Off => "null, false or 0".into(),
            Number(expected) => expected.to_string(),
            Text(expected) => format!("\"{expected}\""),
            AttentionScale => {
                format!("{:?}, which is head_dim^-0.5", query_scalar(config).powf(-0.5))
            }
            QueryScalar | HeadDim => format!("{}, the head_dim", config.head_dim),
            HiddenSize => format!("{}, the hidden_size", config.hidden_size),
            Theta => format!("{}, the rope_theta", config.rope_theta),
            Absent => "null".into(),
        }
    }
}
