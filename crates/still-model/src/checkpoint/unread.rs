//! Every tensor of a model's files is read, or the model is refused: what nobody reads would have changed what it computes.

use super::Weights;
use super::weights::{GgufSource, Source};
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};

/// Names shown of many.
const SHOWN: usize = 4;
/// GGUF tensors that are read with the configuration, not as weights.
const READ_WITH_GGUF_CONFIG: [&str; 3] =
    ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];
/// Ends of names that are recomputed from the configuration.
const RECOMPUTED: [&str; 1] = ["rotary_emb.inv_freq"];
/// Ends of names of scales that are for activations and a KV cache of 8 bits: here both keep their precision.
const RUNTIME_SCALES: [&str; 8] = [
    ".input_scale",
    ".activation_scale",
    ".self_attn.q_scale",
    ".self_attn.k_scale",
    ".self_attn.v_scale",
    ".q_proj.output_scale",
    ".k_proj.output_scale",
    ".v_proj.output_scale",
];
const HEAD: &str = "lm_head.weight";
const EMBEDDINGS: &str = "model.embed_tokens.weight";

impl Weights {
    /// An error that names tensors that nothing has read, when all that a model needs has been.
    ///
    /// # Errors
    /// Names the first of them and says how many there are.
    pub(crate) fn check_all_read(&self, config: &ModelConfig) -> Result<()> {
        for source in &self.sources {
            match source {
                Source::Memory(_) | Source::Packed(_) => {}
                Source::Safetensors { files, quantization } => {
                    let allowed = |name: &str| {
                        RECOMPUTED.iter().any(|end| name.ends_with(end))
                            || (quantization.is_some()
                                && RUNTIME_SCALES.iter().any(|end| name.ends_with(end)))
                            || (name == HEAD && config.tie_word_embeddings)
                    };
                    let unread: Vec<&str> = files
                        .tensors()
                        // A tensor without values says nothing.
                        .filter(|(name, stored)| stored.elements() > 0 && !self.was_read(name))
                        .map(|(name, _)| name)
                        .filter(|name| !allowed(name))
                        .collect();
                    if let Some(&first) = unread.first() {
                        let path = files.get(first).map_or(files.path(), |stored| stored.path);
                        return Err(refusal(path, &unread, config));
                    }
                    if config.tie_word_embeddings {
                        check_tied(self, source)?;
                    }
                }
                Source::Gguf(source) => {
                    let unread = unread_in_gguf(self, source);
                    let unread: Vec<&str> = unread.iter().map(String::as_str).collect();
                    if !unread.is_empty() {
                        return Err(refusal(&source.path, &unread, config));
                    }
                }
            }
        }
        Ok(())
    }
}

/// A head next to embeddings that serve as the head has to be the same.
fn check_tied(weights: &Weights, source: &Source) -> Result<()> {
    let Source::Safetensors { files, .. } = source else { return Ok(()) };
    let Some(head) = files.get(HEAD).filter(|_| !weights.was_read(HEAD)) else { return Ok(()) };
    let same = files.get(EMBEDDINGS).is_some_and(|embeddings| {
        (embeddings.dtype, embeddings.shape) == (head.dtype, head.shape)
            && embeddings.bytes == head.bytes
    });
    if same {
        return Ok(());
    }
    Err(ModelError::Corrupt {
        path: head.path.to_path_buf(),
        reason: format!(
            "{HEAD} is not {EMBEDDINGS}, but config.json has \"tie_word_embeddings\": true"
        ),
        hint: "if the head is its own, say \"tie_word_embeddings\": false in config.json".into(),
    })
}

fn unread_in_gguf(weights: &Weights, source: &GgufSource) -> Vec<String> {
    let read = |stored: &str| {
        source.layout.name(stored).is_some_and(|name| weights.was_read(&name))
            || READ_WITH_GGUF_CONFIG.contains(&stored)
    };
    let mut unread: Vec<String> =
        source.content.tensor_infos.keys().filter(|stored| !read(stored)).cloned().collect();
    unread.sort_unstable();
    unread
}

/// The error of tensors that nothing reads.
fn refusal(path: &std::path::Path, unread: &[&str], config: &ModelConfig) -> ModelError {
    let layers = config.num_hidden_layers;
    let beyond: Vec<&str> =
        unread.iter().copied().filter(|name| layer(name).is_some_and(|n| n >= layers)).collect();
    let (reason, hint) = if beyond.is_empty() {
        (
            format!(
                "holds {} that this model does not have: {}",
                counted(unread.len()),
                listed(unread)
            ),
            hint(unread),
        )
    } else {
        (
            format!(
                "holds {} of layers beyond the {layers} of the configuration: {}",
                counted(beyond.len()),
                listed(&beyond)
            ),
            "the configuration's num_hidden_layers (block_count in GGUF) does not belong to these weights",
        )
    };
    ModelError::Corrupt { path: path.to_path_buf(), reason, hint: hint.into() }
}

fn counted(tensors: usize) -> String {
    if tensors == 1 { "a tensor".into() } else { format!("{tensors} tensors") }
}

fn listed(names: &[&str]) -> String {
    let shown = names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The layer that a tensor is part of, by either format's names.
fn layer(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("model.layers.").or_else(|| name.strip_prefix("blk."))?;
    rest.split('.').next()?.parse().ok()
}

/// What to do, by what the names look like.
fn hint(unread: &[&str]) -> &'static str {
    let any =
        |parts: &[&str]| unread.iter().any(|name| parts.iter().any(|part| name.contains(part)));
    if any(&[".lora_A.", ".lora_B."]) {
        "these are low-rank updates, and config.json has no \"still_lora\" that says how they are scaled"
    } else if any(&[".feature_map_", ".g_proj.", ".log_lambda", ".window_factor"]) {
        "these are a student's, and the section \"still\" of config.json does not speak of them"
    } else if any(&["_scale", "zero_point", "qweight", "qzeros", "g_idx", "absmax", "quant_"]) {
        "these belong to quantized weights, and config.json has no quantization_config that explains them"
    } else if any(&[".bias"]) {
        "these are biases that the configuration does not speak of (attention_bias, mlp_bias)"
    } else {
        "the weights are those of another kind of model, or the configuration is"
    }
}
