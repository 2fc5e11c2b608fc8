//! One two-way table between Hugging Face's tensor names and GGUF's.

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

/// The same of families whose files hold several projections as one matrix, in place of those projections.
const FUSED: [(&str, &str); 2] = [
    ("self_attn.qkv_proj.weight", "attn_qkv.weight"),
    ("mlp.gate_up_proj.weight", "ffn_up.weight"),
];

/// [`to_gguf`] in a file whose projections are fused.
pub(crate) fn to_fused_gguf(name: &str) -> Option<String> {
    let fused = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let found = fused.and_then(|(layer, rest)| {
        let (_, gguf) = FUSED.iter().find(|(hf, _)| *hf == rest)?;
        Some(format!("blk.{layer}.{gguf}"))
    });
    found.or_else(|| to_gguf(name).filter(|stored| !stored.ends_with("ffn_up.weight")))
}

/// [`from_gguf`] in a file whose projections are fused.
pub(crate) fn from_fused_gguf(name: &str) -> Option<String> {
    let fused = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let found = fused.and_then(|(layer, rest)| {
        let (hf, _) = FUSED.iter().find(|(_, gguf)| *gguf == rest)?;
        Some(format!("model.layers.{layer}.{hf}"))
    });
    found.or_else(|| from_gguf(name))
}

/// GGUF's name of a Hugging Face tensor.
pub fn to_gguf(name: &str) -> Option<String> {
    if let Some((_, gguf)) = GLOBAL.iter().find(|(hf, _)| *hf == name) {
        return Some((*gguf).to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, gguf) = LAYER.iter().find(|(hf, _)| *hf == rest)?;
    Some(format!("blk.{layer}.{gguf}"))
}

/// Hugging Face's name of a GGUF tensor.
pub fn from_gguf(name: &str) -> Option<String> {
    if let Some((hf, _)) = GLOBAL.iter().find(|(_, gguf)| *gguf == name) {
        return Some((*hf).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (hf, _) = LAYER.iter().find(|(_, gguf)| *gguf == rest)?;
    Some(format!("model.layers.{layer}.{hf}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_two_way() {
        let layers = LAYER.iter().map(|(hf, _)| format!("model.layers.17.{hf}"));
        for name in GLOBAL.iter().map(|(hf, _)| (*hf).to_owned()).chain(layers) {
            assert_eq!(from_gguf(&to_gguf(&name).unwrap()).unwrap(), name);
        }
        for (hf, _) in FUSED {
            let name = format!("model.layers.3.{hf}");
            assert_eq!(from_fused_gguf(&to_fused_gguf(&name).unwrap()).unwrap(), name);
        }
        assert_eq!(to_fused_gguf("model.layers.3.mlp.up_proj.weight"), None);
        assert_eq!(to_gguf("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
        assert_eq!(from_gguf("rope_freqs.weight"), None);
    }
}
