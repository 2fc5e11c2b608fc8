//! Directories with `config.json`, safetensors and a tokenizer: base models, full and delta students.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::student::{BASE_KEY, DELTA_FILE, Sections};
use super::{BaseIdentity, Checkpoint, Weights, authors};
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::tokenizer::Tokenizer;

pub(super) fn open(source: &str, dir: &Path) -> Result<Checkpoint> {
    if authors::has_adapter(dir) {
        return authors::open_with_adapter(source, dir);
    }
    let path = dir.join("config.json");
    if !path.exists() {
        return Err(ModelError::NotFound {
            what: format!("{} has no config.json", dir.display()),
            hint: "give a directory with config.json, *.safetensors and tokenizer.json".into(),
        });
    }
    let json = read_json(&path)?;
    if authors::is_theirs(&json) {
        return authors::open(source, dir, &json);
    }
    let Sections { still, lora, recipe, base } = Sections::read(&json, &path)?;
    if let Some(base) = base {
        let base = open_base(&path, &base)?;
        let weights = base.weights.overlaid(Weights::from_safetensors(&[dir.join(DELTA_FILE)])?);
        return Ok(Checkpoint { weights, still, lora, recipe, ..base });
    }
    let dense = open_dense(source, dir, &json, &path)?;
    Ok(Checkpoint { still, lora, recipe, ..dense })
}

/// A directory of weights whose `config.json`, at `path`, holds `json`, as the dense model that it describes.
pub(super) fn open_dense(
    source: &str,
    dir: &Path,
    json: &Value,
    path: &Path,
) -> Result<Checkpoint> {
    let mut config = ModelConfig::from_hf_json(json).map_err(|error| in_file(error, path))?;
    let generation = dir.join("generation_config.json");
    if generation.exists() {
        add_end_tokens(&mut config, &read_json(&generation)?);
    }
    let files = weight_files(dir)?;
    let weights = Weights::from_safetensors(&files)?;
    Ok(Checkpoint {
        config,
        weights,
        tokenizer: Tokenizer::from_hf_dir(dir)?,
        still: None,
        lora: None,
        recipe: None,
        base: BaseIdentity { source: source.to_owned(), files },
    })
}

/// The base of a delta student, checked against the recorded hash.
fn open_base(path: &Path, json: &Value) -> Result<Checkpoint> {
    let text = |key: &str| {
        json[key]
            .as_str()
            .ok_or_else(|| ModelError::corrupt(path, format!("{BASE_KEY}.{key} is missing")))
    };
    let (source, expected) = (text("source")?, text("sha256")?);
    let base = Checkpoint::open(source).map_err(|error| ModelError::NotFound {
        what: format!("the base of this student could not be opened: {error}"),
        hint: format!(
            "put the base back at {source}, or edit {BASE_KEY}.source in {}",
            path.display()
        ),
    })?;
    let found = base.base.sha256()?;
    if found != expected {
        return Err(ModelError::Corrupt {
            path: path.to_path_buf(),
            reason: format!(
                "the base at {source} is another one: sha256 {found}, expected {expected}"
            ),
            hint: "this student was trained on other weights: give it those".into(),
        });
    }
    Ok(base)
}

/// `model.safetensors`, or the shards that the index names.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        return Err(ModelError::NotFound {
            what: format!("{} has neither model.safetensors nor an index of shards", dir.display()),
            hint: "only safetensors weights are read: convert other formats first".into(),
        });
    }
    let files: Vec<PathBuf> = shards(&index)?.into_iter().map(|shard| dir.join(shard)).collect();
    match files.iter().find(|file| !file.exists()) {
        Some(missing) => Err(ModelError::NotFound {
            what: format!("{} names {}, which is missing", index.display(), missing.display()),
            hint: "the download is incomplete: fetch the missing shard".into(),
        }),
        None => Ok(files),
    }
}

/// The shard files that an index names, sorted.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    let json = read_json(index)?;
    let map = json["weight_map"]
        .as_object()
        .ok_or_else(|| ModelError::corrupt(index, "\"weight_map\" is missing"))?;
    let mut shards: Vec<String> =
        map.values().filter_map(|v| v.as_str().map(str::to_owned)).collect();
    shards.sort_unstable();
    shards.dedup();
    // A shard is a file beside the index, never a path.
    match shards.iter().find(|shard| Path::new(shard).components().count() != 1) {
        Some(shard) => Err(ModelError::corrupt(index, format!("\"{shard}\" is not a file name"))),
        None => Ok(shards),
    }
}

fn add_end_tokens(config: &mut ModelConfig, generation: &Value) {
    let ids = match &generation["eos_token_id"] {
        Value::Array(ids) => ids.iter().filter_map(Value::as_u64).collect(),
        Value::Number(id) => id.as_u64().into_iter().collect(),
        _ => Vec::new(),
    };
    for id in ids {
        if !config.eos_token_ids.contains(&(id as u32)) {
            config.eos_token_ids.push(id as u32);
        }
    }
}

pub(super) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(ModelError::read(path))?;
    serde_json::from_str(&text)
        .map_err(|error| ModelError::corrupt(path, format!("not valid JSON: {error}")))
}

/// Names the file in an error about its contents.
pub(super) fn in_file(error: ModelError, path: &Path) -> ModelError {
    match error {
        ModelError::Invalid(reason) => ModelError::Corrupt {
            path: path.to_path_buf(),
            reason,
            hint: "the configuration contradicts itself or lacks a value".into(),
        },
        ModelError::Unsupported { what, hint, .. } => {
            ModelError::Unsupported { what, hint, found_in: Some(path.to_path_buf()) }
        }
        other => other,
    }
}
