//! Directories with `config.json`, safetensors and a tokenizer: base models, full and delta students.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::form::{self, Form, StudentForm};
use super::quantization::Quantization;
use super::target::{DELTA_FILE, GENERATION_FILE};
use super::{Checkpoint, OnFetch, Role, Weights, authors, delta};
use crate::base::BaseIdentity;
use crate::config::{ModelConfig, Table};
use crate::error::{ModelError, Result};
use crate::tokenizer::Tokenizer;

pub(super) fn open(source: &str, dir: &Path, role: Role, on_fetch: &OnFetch) -> Result<Checkpoint> {
    if authors::has_adapter(dir) {
        return authors::open_with_adapter(source, dir, on_fetch);
    }
    let path = dir.join("config.json");
    if !path.exists() {
        return Err(ModelError::NotFound {
            what: format!("{} has no config.json", dir.display()),
            hint: "give a directory with config.json, *.safetensors and tokenizer.json".into(),
        });
    }
    match form::of(read_json(&path)?, &path)? {
        Form::Base(json) => open_full(source, dir, &json, false),
        Form::Student(student) => {
            if student.base.is_some() {
                role.admit_delta(&path)?;
            }
            open_student(source, dir, &path, *student, on_fetch)
        }
        Form::Authors(json) => authors::open(source, dir, &json),
    }
}

/// A student of ours, whole or a delta.
fn open_student(
    source: &str,
    dir: &Path,
    path: &Path,
    student: StudentForm,
    on_fetch: &OnFetch,
) -> Result<Checkpoint> {
    let opened = match &student.base {
        Some(record) => {
            let StudentForm { base_config, sealed, .. } = &student;
            let config = sealed.then_some(base_config);
            let base = delta::open_base(dir, path, record, config, on_fetch)?;
            student.check(&base.config, path)?;
            let file = dir.join(DELTA_FILE);
            if *sealed {
                Weights::require_digest(&file)?;
            }
            let weights = base.weights.overlaid(Weights::from_safetensors(&[file])?);
            Checkpoint { weights, ..base }
        }
        None => {
            let opened = open_full(source, dir, &student.base_config, student.sealed)?;
            student.check(&opened.config, path)?;
            opened
        }
    };
    let StudentForm { still, lora, recipe, .. } = student;
    Ok(Checkpoint { still: Some(still), lora, recipe, ..opened })
}

/// A directory with all weights and a tokenizer; `json` is the configuration of the base. With `sealed` each file of tensors must
/// have a digest.
pub(super) fn open_full(
    source: &str,
    dir: &Path,
    json: &Value,
    sealed: bool,
) -> Result<Checkpoint> {
    let path = dir.join("config.json");
    let mut config = ModelConfig::from_hf_json(json).map_err(|error| in_file(error, &path))?;
    let generation = dir.join(GENERATION_FILE);
    let generation_config = if generation.exists() { Some(read_json(&generation)?) } else { None };
    if let Some(json) = &generation_config {
        config.add_end_tokens(json).map_err(|error| in_file(error, &generation))?;
    }
    let quantization = Table::root(json).and_then(|table| Quantization::read(&table));
    let quantization = quantization.map_err(|error| in_file(error, &path))?;
    let files = weight_files(dir)?;
    if sealed {
        files.iter().try_for_each(|file| Weights::require_digest(file))?;
    }
    let weights = Weights::from_quantized_safetensors(&files, quantization)?.of_model(&config);
    Ok(Checkpoint {
        config,
        weights,
        tokenizer: Tokenizer::from_hf_dir(dir)?,
        still: None,
        lora: None,
        recipe: None,
        base: BaseIdentity { source: source.to_owned(), files, generation_config },
    })
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
    // A shard is a file next to the index, never a path.
    match shards.iter().find(|shard| Path::new(shard).components().count() != 1) {
        Some(shard) => Err(ModelError::corrupt(index, format!("\"{shard}\" is not a file name"))),
        None => Ok(shards),
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
