//! Checkpoints of STILL's released code: a directory after stage 1, and the PEFT adapter that stage 2 leaves.
//!
//! Their `config.json` is a Llama's with `model_type: "still"`, as ours is too; ours says `still_format`. What they call their
//! tensors is what we call ours (`learned_names`), so that only the configuration has to be found out.

mod adapter;
mod attention;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::form::{self, Form};
use super::safetensors_dir::{open_full, read_json};
use super::{Checkpoint, OnFetch, source};
use crate::error::{ModelError, Result};
use adapter::Adapter;
pub(super) use adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};

/// Whether a directory holds an adapter, next to weights or alone.
pub(super) fn has_adapter(dir: &Path) -> bool {
    dir.join(ADAPTER_CONFIG).exists()
}

/// Opens a directory of theirs whose `config.json` holds `json`: a base, feature maps, and what else its attention learned.
pub(super) fn open(source: &str, dir: &Path, json: &Value) -> Result<Checkpoint> {
    let path = dir.join("config.json");
    let mut llama = json.clone();
    llama["model_type"] = json!("llama");
    let dense = open_full(source, dir, &llama, false)?;
    let still = attention::read(json, &path, &dense)?;
    Ok(Checkpoint { still: Some(still), ..dense })
}

/// Opens a directory with an adapter: its base is the directory itself if that holds weights, else what the adapter names.
pub(super) fn open_with_adapter(
    source: &str,
    dir: &Path,
    on_fetch: &OnFetch,
) -> Result<Checkpoint> {
    let adapter = Adapter::read(dir)?;
    let base = base_of(&adapter, dir, on_fetch)?;
    let path = base.join("config.json");
    let Form::Authors(json) = form::of(read_json(&path)?, &path)? else {
        return Err(ModelError::Unsupported {
            what: format!(
                "a PEFT adapter of a model that is not from STILL's authors ({})",
                base.display()
            ),
            found_in: Some(adapter.config_path),
            hint: "merge the adapter into its base with PEFT's merge_and_unload and save that, or move the adapter's \
                   files away to use the base alone"
                .into(),
        });
    };
    if base != dir && has_adapter(&base) {
        return Err(ModelError::Unsupported {
            what: format!("an adapter of a base that has an adapter itself ({})", base.display()),
            found_in: Some(adapter.config_path),
            hint: "merge the first adapter into its base with PEFT's merge_and_unload".into(),
        });
    }
    adapter.put_on(open(source, &base, &json)?)
}

/// The directory of an adapter's base. A relative path is one from the adapter's directory or, as PEFT has it, from here.
fn base_of(adapter: &Adapter, dir: &Path, on_fetch: &OnFetch) -> Result<PathBuf> {
    let weights = ["model.safetensors", "model.safetensors.index.json"];
    if dir.join("config.json").exists() && weights.iter().any(|file| dir.join(file).exists()) {
        return Ok(dir.to_path_buf());
    }
    let failed = |what: String| {
        ModelError::NotFound {
        what: format!("{}: {what}", adapter.config_path.display()),
        hint: "set base_model_name_or_path in it to the directory that stage 1 left, or put the adapter's files beside the \
               weights"
            .into(),
    }
    };
    let Some(named) = &adapter.base else {
        return Err(failed("no base_model_name_or_path, and no weights beside it".into()));
    };
    let beside = dir.join(named);
    let base = match beside.is_dir() {
        true => beside,
        false => match source::resolve(named, on_fetch) {
            Ok(source::Source::Directory(base)) => base,
            Ok(source::Source::Gguf(_)) => {
                return Err(failed(format!("its base {named} is a GGUF file")));
            }
            Err(error) => return Err(failed(format!("its base could not be opened: {error}"))),
        },
    };
    if base.join("config.json").exists() {
        return Ok(base);
    }
    Err(failed(format!("its base {} has no config.json", base.display())))
}
