//! A model's hyper-parameters from a file's metadata.

use std::path::Path;

use candle_core::quantized::gguf_file::Content;

use super::metadata::Metadata;
use super::{rope, tensors, unsupported, window};
use crate::config::{Architecture, Biased, ModelConfig};
use crate::error::{ModelError, Result};

/// The model's hyper-parameters; the file's tensors are those of such a model.
///
/// # Errors
/// An unsupported architecture or option (named), a missing, mistyped or contradictory value; tensors of another model.
pub fn config(path: &Path, content: &Content) -> Result<ModelConfig> {
    let metadata = Metadata::new(path, content);
    let key = "general.architecture";
    let name = metadata.required(key, metadata.text(key)?)?;
    let architecture = Architecture::from_gguf(name).map_err(|error| match error {
        ModelError::Unsupported { what, hint, .. } => unsupported(path, what, hint),
        other => other,
    })?;
    let of = |key: &str| format!("{name}.{key}");
    let required = |key: &str| {
        let key = of(key);
        metadata.required(&key, metadata.size(&key)?)
    };
    refuse_other_arithmetic(path, &metadata, name)?;

    let num_hidden_layers = required("block_count")?;
    tensors::check_layers(path, content, &of("block_count"), num_hidden_layers)?;
    let of_layers = |key: &str| metadata.size_of_layers(&of(key), num_hidden_layers);
    let required_of_layers = |key: &str| metadata.required(&of(key), of_layers(key)?);

    let hidden_size = required("embedding_length")?;
    let num_attention_heads = required_of_layers("attention.head_count")?;
    let head_dim = head_dim(path, &metadata, name, hidden_size, num_attention_heads)?;

    let max_position_embeddings = required("context_length")?;
    let sizes = (num_hidden_layers, max_position_embeddings);
    let sliding = window::sliding(path, &metadata, architecture, name, sizes)?;

    let vocab_size = vocab_size(path, content, &metadata)?;
    let token = |which: &str| {
        let most = u32::try_from(vocab_size).unwrap_or(u32::MAX) - 1;
        metadata.integer(&format!("tokenizer.ggml.{which}_token_id"), 0..=most)
    };

    let key = of("attention.layer_norm_rms_epsilon");
    let rms_norm_eps = match metadata.float(&key)? {
        None => 1e-5,
        Some(eps) if (0.0..1.0).contains(&eps) => round_f32(eps),
        Some(_) => return Err(metadata.refuse(&key, "expected a small number from 0")),
    };
    let sizes = (head_dim, max_position_embeddings);
    let rope = rope::rope(path, content, &metadata, architecture, sizes)?;
    let has = |tensor: &str| content.tensor_infos.contains_key(tensor);
    for which in ["eos", "eot"] {
        token(which)?;
    }
    let biased = architecture.family().biased;
    let heads = (hidden_size, num_attention_heads, head_dim);
    let config = ModelConfig {
        architecture,
        hidden_size,
        intermediate_size: required_of_layers("feed_forward_length")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: of_layers("attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        vocab_size,
        rms_norm_eps,
        rope_theta: rope.theta,
        rope_scaling: rope.scaling,
        partial_rotary_factor: rope.partial_rotary_factor,
        query_pre_attn_scalar: query_scalar(architecture, num_hidden_layers, heads),
        sliding,
        max_position_embeddings,
        tie_word_embeddings: !has("output.weight"),
        // A Qwen2 is not one without.
        attention_bias: biased == Biased::Qkv
            || (biased.optional_attention() && has("blk.0.attn_q.bias")),
        attention_output_bias: biased.optional_attention() && has("blk.0.attn_output.bias"),
        mlp_bias: biased.optional_mlp() && has("blk.0.ffn_gate.bias"),
        bos_token_id: token("bos")?,
        eos_token_ids: crate::tokenizer::end_of_generation(content),
    };
    config.validate().map_err(|error| in_file(error, path))?;
    tensors::check(path, content, &config)?;
    Ok(config)
}

/// Channels of a head: those of keys, which values must have too.
fn head_dim(
    path: &Path,
    metadata: &Metadata<'_>,
    architecture: &str,
    hidden_size: usize,
    heads: usize,
) -> Result<usize> {
    let of = |key: &str| format!("{architecture}.{key}");
    let head_dim = match metadata.size(&of("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let reason = format!("no divisor of {} {hidden_size}", of("embedding_length"));
            return Err(metadata.refuse(&of("attention.head_count"), &reason));
        }
    };
    let key = of("attention.value_length");
    if metadata.size(&key)?.is_some_and(|value_length| value_length != head_dim) {
        let what = format!("a model whose values are not as wide as its keys ({key})");
        return Err(unsupported(path, what, "use a model whose heads are of one width"));
    }
    Ok(head_dim)
}

/// Rows of the embedding, as many as the tokenizer has tokens.
fn vocab_size(path: &Path, content: &Content, metadata: &Metadata<'_>) -> Result<usize> {
    let rows = tensors::vocabulary(path, content)?;
    match metadata.texts("tokenizer.ggml.tokens")? {
        Some(tokens) if tokens != rows => Err(ModelError::corrupt(
            path,
            format!("token_embd.weight has {rows} rows for tokenizer.ggml.tokens' {tokens} tokens"),
        )),
        _ => Ok(rows),
    }
}

fn in_file(error: ModelError, path: &Path) -> ModelError {
    match error {
        ModelError::Invalid(reason) => ModelError::corrupt(path, reason),
        other => other,
    }
}

/// llama.cpp knows Gemma 3's largest model by its layers, and scales its queries by the root of the hidden size over the heads.
const OTHER_SCALE_LAYERS: usize = 62;

/// What queries are scaled by the root of, where it is not the head's channels.
fn query_scalar(
    architecture: Architecture,
    layers: usize,
    (hidden_size, heads, head_dim): (usize, usize, usize),
) -> Option<f64> {
    let scaled = architecture.family().query_pre_attn_scalar.is_some();
    let scalar = hidden_size / heads;
    (scaled && layers == OTHER_SCALE_LAYERS && scalar != head_dim).then_some(scalar as f64)
}

/// An error if a key asks for arithmetic that is not done here.
fn refuse_other_arithmetic(path: &Path, metadata: &Metadata<'_>, name: &str) -> Result<()> {
    let refused = |key: String| {
        unsupported(path, format!("a model with {key}"), "use a model that computes without it")
    };
    // Numbers, with those that change nothing.
    for (key, neutral) in [
        ("attention.scale", [0.0, 0.0]),
        ("attention.clamp_kqv", [0.0, 0.0]),
        ("attention.max_alibi_bias", [0.0, 0.0]),
        ("attn_logit_softcapping", [0.0, 0.0]),
        ("final_logit_softcapping", [0.0, 0.0]),
        ("logit_scale", [0.0, 1.0]),
        ("residual_scale", [0.0, 1.0]),
        ("embedding_scale", [0.0, 1.0]),
    ] {
        let key = format!("{name}.{key}");
        if metadata.float(&key)?.is_some_and(|number| !neutral.contains(&number)) {
            return Err(refused(key));
        }
    }
    for key in ["expert_count", "expert_used_count"] {
        let key = format!("{name}.{key}");
        if metadata.integer(&key, 0..=u32::MAX)?.is_some_and(|experts| experts > 0) {
            return Err(refused(key));
        }
    }
    let key = format!("{name}.attention.causal");
    if metadata.flag(&key)? == Some(false) {
        return Err(refused(key));
    }
    Ok(())
}

/// The shortest decimal that is this f32: GGUF stores 1e-5 as 9.99999974e-6.
pub(super) fn round_f32(x: f64) -> f64 {
    (x as f32).to_string().parse().unwrap_or(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gemma 3 of 1, 4, 12 and 27 billion weights, by their own sizes.
    #[test]
    fn the_largest_gemma_alone_has_another_scale() {
        let scalar = |layers, sizes| query_scalar(Architecture::Gemma3, layers, sizes);
        assert_eq!(scalar(26, (1152, 4, 256)), None);
        assert_eq!(scalar(34, (2560, 8, 256)), None);
        assert_eq!(scalar(48, (3840, 16, 256)), None);
        assert_eq!(scalar(62, (5376, 32, 128)), Some(168.0));
        assert_eq!(query_scalar(Architecture::Llama, 62, (5376, 32, 128)), None);
    }
}
