//! What a file suggests to sample by.

use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use serde_json::{Map, Value};

use super::config::round_f32;
use super::metadata::Metadata;
use crate::error::Result;

/// Keys of numbers, and their names in a `generation_config.json`.
const NUMBERS: [(&str, &str); 4] = [
    ("general.sampling.temp", "temperature"),
    ("general.sampling.top_p", "top_p"),
    ("general.sampling.min_p", "min_p"),
    ("general.sampling.penalty_repeat", "repetition_penalty"),
];

/// The `generation_config.json` that llama.cpp's converter has made `general.sampling.*` of, if there are such keys.
///
/// # Errors
/// A value of another type.
pub fn generation_config(path: &Path, content: &Content) -> Result<Option<Value>> {
    let metadata = Metadata::new(path, content);
    let mut json = Map::new();
    for (key, name) in NUMBERS {
        if let Some(number) = metadata.float(key)? {
            json.insert(name.into(), round_f32(number).into());
        }
    }
    if let Some(top_k) = metadata.integer("general.sampling.top_k", 0..=u32::MAX)? {
        json.insert("top_k".into(), top_k.into());
    }
    if json.is_empty() {
        return Ok(None);
    }
    json.insert("do_sample".into(), true.into());
    Ok(Some(json.into()))
}
