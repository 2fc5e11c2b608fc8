//! From what a user types to files.

use std::path::{Path, PathBuf};

use super::OnFetch;
use crate::error::{ModelError, Result};

/// Files of a model.
#[derive(Debug)]
pub(super) enum Source {
    Gguf(PathBuf),
    Directory(PathBuf),
}

/// A model that is built in, else a path if it exists, else a hub id if it looks like one.
pub(super) fn resolve(model: &str, on_fetch: &OnFetch) -> Result<Source> {
    if let Some(source) = super::built_in::resolve(model)? {
        return Ok(source);
    }
    let path = Path::new(model);
    if path.is_dir() {
        refuse_special(path)?;
        return Ok(Source::Directory(path.to_path_buf()));
    }
    let previous = super::target::previous_path(path);
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
    if let Some(kind) = path.metadata().ok().as_ref().and_then(crate::files::kind) {
        return Err(ModelError::Unsupported {
            what: format!("{model} is {kind}, which"),
            found_in: None,
            hint: "give a directory with config.json, or a .gguf file".into(),
        });
    }
    if looks_like_hub_id(model) {
        return Ok(Source::Directory(super::hub::fetch(model, on_fetch)?));
    }
    Err(ModelError::NotFound {
        what: format!("no model at {model}"),
        hint: format!(
            "give a directory with config.json, a .gguf file, a hub id such as org/name, or a built-in model: {}",
            super::built_in::built_in_names().join(", ")
        ),
    })
}

/// An error if anything in a model's directory is a pipe, a socket or a device: opening one may wait forever.
fn refuse_special(dir: &Path) -> Result<()> {
    for path in dir.read_dir().map_err(ModelError::read(dir))?.flatten().map(|entry| entry.path()) {
        match path.metadata().ok().as_ref().and_then(crate::files::kind) {
            None | Some("a directory") => {}
            Some(kind) => {
                return Err(ModelError::Corrupt {
                    reason: format!("it is {kind}, not a file"),
                    path,
                    hint: "a model's directory holds regular files: replace or remove it".into(),
                });
            }
        }
    }
    Ok(())
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
