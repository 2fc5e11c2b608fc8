//! From what a user types to files.

use std::path::{Path, PathBuf};

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
        return Ok(Source::Directory(super::hub::fetch(model)?));
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
