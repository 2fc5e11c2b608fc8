//! From what a user types to files.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiRepo};

use crate::error::{ModelError, Result};

/// Files of a model.
pub(super) enum Source {
    Gguf(PathBuf),
    Directory(PathBuf),
}

/// A path if it exists, else a hub id if it looks like one.
pub(super) fn resolve(model: &str) -> Result<Source> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(Source::Directory(path.to_path_buf()));
    }
    let previous = super::student::previous_path(path);
    if !path.exists() && previous.is_dir() {
        tracing::warn!(
            "{model} was being replaced when its save was cut off: reading what stood there before"
        );
        return Ok(Source::Directory(previous));
    }
    if path.is_file() {
        // A damaged header is told apart from a wrong file by the reader.
        let gguf = path.extension().is_some_and(|extension| extension == "gguf");
        return if gguf {
            Ok(Source::Gguf(path.to_path_buf()))
        } else {
            Err(ModelError::Unsupported {
                what: format!("the file {model}"),
                found_in: None,
                hint: "give a .gguf file, or a directory with config.json and *.safetensors".into(),
            })
        };
    }
    if looks_like_hub_id(model) {
        return Ok(Source::Directory(fetch(model)?));
    }
    Err(ModelError::NotFound {
        what: format!("no model at {model}"),
        hint: "give a directory with config.json, a .gguf file, or a hub id such as org/name"
            .into(),
    })
}

fn looks_like_hub_id(model: &str) -> bool {
    let valid = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    matches!(model.split('/').collect::<Vec<_>>()[..], [owner, name] if valid(owner) && valid(name))
        && !model.ends_with(".gguf")
}

/// Fetches a model's files into the hub cache; returns the snapshot's directory.
fn fetch(id: &str) -> Result<PathBuf> {
    let failed = |what: String| ModelError::NotFound {
        what,
        hint: "check the id and the network, or give the path of a downloaded model".into(),
    };
    let api =
        ApiBuilder::from_env().with_progress(false).with_retries(0).build().map_err(|error| {
            failed(format!("no model at {id}, and the hub cannot be used: {error}"))
        })?;
    let repo: ApiRepo = api.model(id.to_owned());
    let get = |file: &str| {
        repo.get(file).map_err(|error| {
            failed(format!(
                "no model at {id}, and {file} could not be fetched from the hub: {error}"
            ))
        })
    };
    let config = get("config.json")?;
    get("tokenizer.json")?;
    // Not every model has these.
    let _ = repo.get("tokenizer_config.json");
    let _ = repo.get("generation_config.json");
    match repo.get("model.safetensors.index.json") {
        Ok(index) => {
            for shard in super::safetensors_dir::shards(&index)? {
                get(&shard)?;
            }
        }
        Err(_) => {
            get("model.safetensors")?;
        }
    }
    Ok(config.parent().map(Path::to_path_buf).unwrap_or_default())
}
