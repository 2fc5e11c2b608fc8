//! Whether a file's tensors are those of its model.

use std::collections::HashSet;
use std::path::Path;

use candle_core::quantized::gguf_file::Content;

use super::unsupported;
use crate::checkpoint::names;
use crate::checkpoint::shapes::gguf_shapes;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};

const EMBEDDING: &str = "token_embd.weight";

/// Rows of the embedding.
pub(super) fn vocabulary(path: &Path, content: &Content) -> Result<usize> {
    let embedding = content
        .tensor_infos
        .get(EMBEDDING)
        .ok_or_else(|| ModelError::corrupt(path, format!("tensor {EMBEDDING} is missing")))?;
    match *embedding.shape.dims() {
        [rows, _] => Ok(rows),
        ref dims => Err(ModelError::corrupt(
            path,
            format!("tensor {EMBEDDING} of shape {dims:?} is no matrix"),
        )),
    }
}

/// An error unless there are tensors of `layers` layers, which are then few enough to be counted through.
pub(super) fn check_layers(path: &Path, content: &Content, key: &str, layers: usize) -> Result<()> {
    let found: HashSet<usize> =
        content.tensor_infos.keys().filter_map(|name| layer(name)).collect();
    match found.len() == layers && found.iter().all(|&layer| layer < layers) {
        true => Ok(()),
        false => Err(ModelError::corrupt(
            path,
            format!("{key} is {layers}, but the file has tensors of {} layers", found.len()),
        )),
    }
}

/// An error unless the file has every tensor of `config`'s model, each of its shape, and nothing else.
pub(super) fn check(path: &Path, content: &Content, config: &ModelConfig) -> Result<()> {
    let mut known = HashSet::new();
    known.extend(super::rope::factor_tensors(config).map(str::to_owned));
    for (stored, shape) in gguf_shapes(config) {
        let Some(info) = content.tensor_infos.get(&stored) else {
            let name = names::from_gguf(config.architecture, &stored).unwrap_or_default();
            return Err(ModelError::corrupt(path, format!("tensor {stored}: {name} is missing")));
        };
        let found = info.shape.dims();
        if found != shape {
            return Err(ModelError::Corrupt {
                path: path.to_path_buf(),
                reason: format!(
                    "tensor {stored} has shape {found:?}, the metadata needs {shape:?}"
                ),
                hint:
                    "the tensors do not belong to this metadata: fetch or convert the model again"
                        .into(),
            });
        }
        known.insert(stored);
    }
    let mut unread: Vec<&str> = content
        .tensor_infos
        .keys()
        .map(String::as_str)
        .filter(|name| !known.contains(*name))
        .collect();
    unread.sort_unstable();
    match unread.first() {
        None => Ok(()),
        Some(first) => Err(unsupported(
            path,
            format!(
                "a {} model with {} tensors that it should not have, such as {first},",
                config.architecture.model_type(),
                unread.len()
            ),
            "without them it would compute something else: use a model of a supported kind",
        )),
    }
}

/// The layer that a tensor belongs to.
fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}
