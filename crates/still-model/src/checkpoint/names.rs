//! One two-way table between Hugging Face's tensor names and GGUF's.

use std::ops::Range;

use crate::config::{Architecture, ModelConfig};

/// `(Hugging Face, GGUF)` outside the layers.
const GLOBAL: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// `(Hugging Face, GGUF)` inside layer `N`, after `model.layers.N.` and `blk.N.`.
const LAYER: [(&str, &str); 18] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("self_attn.q_proj.bias", "attn_q.bias"),
    ("self_attn.k_proj.bias", "attn_k.bias"),
    ("self_attn.v_proj.bias", "attn_v.bias"),
    ("self_attn.o_proj.bias", "attn_output.bias"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
    ("mlp.gate_proj.bias", "ffn_gate.bias"),
    ("mlp.up_proj.bias", "ffn_up.bias"),
    ("mlp.down_proj.bias", "ffn_down.bias"),
];

/// Rows of files that hold several projections as one matrix, in place of those projections.
const FUSED: [(&str, &str); 2] = [
    ("self_attn.qkv_proj.weight", "attn_qkv.weight"),
    ("mlp.gate_up_proj.weight", "ffn_up.weight"),
];

/// Rows of families with a norm after attention and MLP, too: what others call `post_attention_layernorm` has another name.
const POST_NORMS: [(&str, &str); 3] = [
    ("post_attention_layernorm.weight", "post_attention_norm.weight"),
    ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
];

/// Rows in which a family differs: they replace those of [`LAYER`] that share a name with them.
fn family_rows(architecture: Architecture) -> &'static [(&'static str, &'static str)] {
    match architecture {
        Architecture::Llama | Architecture::Mistral => &[],
        Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Gemma => &[],
        Architecture::Phi3 => &FUSED,
        Architecture::Gemma3 => &POST_NORMS,
    }
}

/// Which rows of which stored tensor a tensor is, where a family's files may have it otherwise than by its own name.
pub struct StoredRows {
    architecture: Architecture,
    queries: usize,
    keys: usize,
    intermediate: usize,
}

impl StoredRows {
    /// Of a model's files.
    pub fn of(config: &ModelConfig) -> Self {
        Self {
            architecture: config.architecture,
            queries: config.num_attention_heads.saturating_mul(config.head_dim),
            keys: config.num_key_value_heads.saturating_mul(config.head_dim),
            intermediate: config.intermediate_size,
        }
    }

    /// The stored tensor, its rows in all, and the tensor's own.
    pub fn find(&self, name: &str) -> Option<(String, usize, Range<usize>)> {
        let &Self { queries: q, keys: k, intermediate: i, .. } = self;
        let rows: &[(&str, &str, usize, Range<usize>)] = match self.architecture {
            Architecture::Phi3 => &[
                ("self_attn.q_proj.weight", FUSED[0].0, q + 2 * k, 0..q),
                ("self_attn.k_proj.weight", FUSED[0].0, q + 2 * k, q..q + k),
                ("self_attn.v_proj.weight", FUSED[0].0, q + 2 * k, q + k..q + 2 * k),
                ("mlp.gate_proj.weight", FUSED[1].0, 2 * i, 0..i),
                ("mlp.up_proj.weight", FUSED[1].0, 2 * i, i..2 * i),
            ],
            _ => &[],
        };
        rows.iter().find_map(|(part, stored, all, rows)| {
            Some((format!("{}{stored}", name.strip_suffix(part)?), *all, rows.clone()))
        })
    }
}

/// What a family's files may have inside a layer.
fn layer_rows(
    architecture: Architecture,
) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    let rows = family_rows(architecture);
    let replaced = move |(hf, gguf): &(&str, &str)| {
        rows.iter().any(|(other_hf, other_gguf)| hf == other_hf || gguf == other_gguf)
    };
    rows.iter().chain(LAYER.iter().filter(move |row| !replaced(row)))
}

/// GGUF's name of a Hugging Face tensor, as the files of a family have it.
pub fn to_gguf(architecture: Architecture, name: &str) -> Option<String> {
    if let Some((_, gguf)) = GLOBAL.iter().find(|(hf, _)| *hf == name) {
        return Some((*gguf).to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, gguf) = layer_rows(architecture).find(|(hf, _)| *hf == rest)?;
    Some(format!("blk.{layer}.{gguf}"))
}

/// Hugging Face's name of a GGUF tensor of a family's file.
pub fn from_gguf(architecture: Architecture, name: &str) -> Option<String> {
    if let Some((hf, _)) = GLOBAL.iter().find(|(_, gguf)| *gguf == name) {
        return Some((*hf).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (hf, _) = layer_rows(architecture).find(|(_, gguf)| *gguf == rest)?;
    Some(format!("model.layers.{layer}.{hf}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_two_way() {
        for architecture in Architecture::ALL {
            let layers = layer_rows(architecture).map(|(hf, _)| format!("model.layers.17.{hf}"));
            for name in GLOBAL.iter().map(|(hf, _)| (*hf).to_owned()).chain(layers) {
                let stored = to_gguf(architecture, &name).unwrap();
                assert_eq!(from_gguf(architecture, &stored).unwrap(), name, "{architecture:?}");
            }
            assert_eq!(to_gguf(architecture, "model.layers.0.self_attn.rotary_emb.inv_freq"), None);
            assert_eq!(from_gguf(architecture, "rope_freqs.weight"), None);
        }
        for (hf, gguf) in LAYER {
            let stored = to_gguf(Architecture::Llama, &format!("model.layers.17.{hf}"));
            assert_eq!(stored.unwrap(), format!("blk.17.{gguf}"));
        }
        for (hf, gguf) in FUSED {
            let stored = to_gguf(Architecture::Phi3, &format!("model.layers.3.{hf}"));
            assert_eq!(stored.unwrap(), format!("blk.3.{gguf}"));
        }
        for (hf, gguf) in POST_NORMS {
            let stored = to_gguf(Architecture::Gemma3, &format!("model.layers.3.{hf}"));
            assert_eq!(stored.unwrap(), format!("blk.3.{gguf}"));
        }
        assert_eq!(to_gguf(Architecture::Phi3, "model.layers.3.mlp.up_proj.weight"), None);
    }
}
