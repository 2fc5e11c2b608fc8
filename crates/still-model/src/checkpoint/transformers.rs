//! What lets Hugging Face's transformers open a full student: the code of its model next to its weights, and weights under the
//! names that files of its base have.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use serde_json::{Value, json};

use super::names::StoredRows;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::files::read_to_string;
use crate::tensor_file::Entry;
use crate::tokenizer::Tokenizer;

/// The code, by the names of its files. A second statement of the method, in PyTorch; its tests lie next to it.
pub(super) const CODE: [(&str, &str); 3] = [
    (
        "configuration_still.py",
        include_str!("../../python/still_transformers/configuration_still.py"),
    ),
    ("hybrid_attention.py", include_str!("../../python/still_transformers/hybrid_attention.py")),
    ("modeling_still.py", include_str!("../../python/still_transformers/modeling_still.py")),
];
/// The model card.
pub(super) const CARD_FILE: &str = "README.md";
/// Before the digest of a card that nobody has edited: at its end, where Markdown shows nothing.
const CARD_MARK: &str = "\n<!-- still export, blake3 ";
/// Which classes transformers takes from the code.
pub(super) const CLASSES_KEY: &str = "auto_map";

pub(super) fn classes() -> Value {
    json!({
        "AutoConfig": "configuration_still.StillConfig",
        "AutoModelForCausalLM": "modeling_still.StillForCausalLM",
    })
}

pub(super) fn write_code(dir: &Path) -> Result<()> {
    CODE.iter().try_for_each(|(name, code)| {
        let path = dir.join(name);
        std::fs::write(&path, code).map_err(ModelError::write(&path))
    })
}

/// A model card with a mark, so that a card that somebody edited is told from one that may be replaced.
pub(super) fn marked_card(text: &str) -> String {
    format!("{text}{CARD_MARK}{} -->\n", blake3::hash(text.as_bytes()))
}

/// Whether a file is a model card as it was written.
pub(super) fn is_own_card(path: &Path) -> bool {
    let text = read_to_string(path).unwrap_or_default();
    text.rsplit_once(CARD_MARK).is_some_and(|(before, _)| marked_card(before) == text)
}

/// Weights under the names that files of the family have: Phi-3's hold several projections as one matrix.
pub(super) fn as_stored<'a>(config: &ModelConfig, entries: Vec<Entry<'a>>) -> Vec<Entry<'a>> {
    let stored = StoredRows::of(config);
    let (mut whole, mut parts) = (Vec::new(), BTreeMap::<String, Vec<_>>::new());
    for entry in entries {
        match stored.find(entry.name()) {
            None => whole.push(entry),
            Some((name, _, rows)) => parts.entry(name).or_default().push((rows.start, entry)),
        }
    }
    whole.extend(parts.into_iter().map(|(name, mut parts)| {
        parts.sort_by_key(|(first, _)| *first);
        let dtype = parts[0].1.dtype();
        let mut shape = parts[0].1.shape().to_vec();
        shape[0] = parts.iter().map(|(_, part)| part.shape()[0]).sum();
        let values = move || {
            let rows = parts.iter().map(|(_, part)| part.tensor());
            Ok(Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)?)
        };
        Entry::new(name, dtype, shape, values)
    }));
    whole
}

/// A tokenizer's configuration with what transformers wants of it where no model is known by that name: a class, and which
/// tokens are special.
pub(super) fn tokenizer_config(config: &Value, ids: &ModelConfig, tokenizer: &Tokenizer) -> Value {
    const CLASS: &str = "tokenizer_class";
    let mut config = if config.is_object() { config.clone() } else { json!({}) };
    if config[CLASS].is_null() {
        config[CLASS] = "PreTrainedTokenizerFast".into();
        // That class alone gives more, which no such model takes.
        config["model_input_names"] = json!(["input_ids", "attention_mask"]);
    }
    let ends = [("bos_token", ids.bos_token_id), ("eos_token", ids.eos_token_ids.first().copied())];
    for (key, id) in ends {
        // Null is an answer too.
        if let Some(id) = id
            && config.get(key).is_none()
        {
            config[key] = tokenizer.token_text(id).into();
        }
    }
    // A batch is padded with some token; no model reads which.
    if config.get("pad_token").is_none()
        && let Some(end) = config.get("eos_token").cloned()
    {
        config["pad_token"] = end;
    }
    config
}
