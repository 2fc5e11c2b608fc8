//! The tensors of a model.

use std::collections::BTreeMap;

use super::names::{self, StoredRows};
use crate::config::ModelConfig;

/// Name, in Hugging Face's words, and shape of every tensor of a base model. Sizes whose product no machine can count are
/// those of no tensor.
pub(crate) fn shapes(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let (e, i, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let q = config.num_attention_heads.saturating_mul(d);
    let kv = config.num_key_value_heads.saturating_mul(d);
    let mut shapes =
        BTreeMap::from([("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, e])]);
    shapes.insert("model.norm.weight".into(), vec![e]);
    if !config.tie_word_embeddings {
        shapes.insert("lm_head.weight".into(), vec![config.vocab_size, e]);
    }
    for n in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: Vec<usize>| {
            shapes.insert(format!("model.layers.{n}.{name}"), shape);
        };
        add("input_layernorm.weight", vec![e]);
        let family = config.architecture.family();
        add(&format!("{}.weight", family.mlp_norm()), vec![e]);
        if family.post_norms {
            add("post_attention_layernorm.weight", vec![e]);
            add("post_feedforward_layernorm.weight", vec![e]);
        }
        let (attention, output, mlp) =
            (config.attention_bias, config.attention_output_bias, config.mlp_bias);
        for (name, out, inner, biased) in [
            ("self_attn.q_proj", q, e, attention),
            ("self_attn.k_proj", kv, e, attention),
            ("self_attn.v_proj", kv, e, attention),
            ("self_attn.o_proj", e, q, output),
            ("mlp.gate_proj", i, e, mlp),
            ("mlp.up_proj", i, e, mlp),
            ("mlp.down_proj", e, i, mlp),
        ] {
            add(&format!("{name}.weight"), vec![out, inner]);
            if biased {
                add(&format!("{name}.bias"), vec![out]);
            }
        }
        if family.qk_norm {
            add("self_attn.q_norm.weight", vec![d]);
            add("self_attn.k_norm.weight", vec![d]);
        }
    }
    shapes
}

/// [`shapes`] as files have them, under the names of llama.cpp: with projections that a family fuses as one matrix.
pub(crate) fn gguf_shapes(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let stored = StoredRows::of(config);
    let mut all: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (name, shape) in shapes(config) {
        let (name, shape) = match stored.find(&name) {
            Some((whole, rows, _)) => (whole, vec![rows, shape[1]]),
            None => (name, shape),
        };
        all.extend(names::to_gguf(config.architecture, &name).map(|name| (name, shape)));
    }
    all
}
