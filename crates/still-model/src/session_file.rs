//! Files of sessions: what a model has read and the state after it, tied to the model.
//!
//! A session is a safetensors file with a digest ([`crate::seal`]): `session` holds JSON (`format`, `model`, `rows`, `system`),
//! `text` the document, both as bytes of UTF-8, `tokens` the ids that the state has read, and `layers.…` the state
//! ([`Cache::save`]).

use std::collections::HashMap;
use std::path::Path;

use blake3::Hasher;
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use still_attention::RowDtype;

use crate::cache::Cache;
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::tensor_file::{Entry, read_tensors, replace_tensors};

/// The format that is written and read.
const FORMAT: u32 = 1;

/// What a model has read.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    /// The document.
    pub text: String,
    /// The system message before it.
    pub system: Option<String>,
    /// How the state stores exact rows.
    pub rows: RowDtype,
    /// What the state has read.
    pub tokens: Vec<u32>,
}

/// The JSON of a session.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    format: u32,
    /// [`identity`] of the model.
    model: String,
    rows: RowDtype,
    system: Option<String>,
}

/// Writes a session in a single step.
pub(crate) fn write(path: &Path, model: &Model, session: &Session, cache: &Cache) -> Result<()> {
    let Session { text, system, rows, tokens } = session;
    let header =
        Header { format: FORMAT, model: identity(model)?, rows: *rows, system: system.clone() };
    let header = serde_json::to_string(&header)
        .map_err(|error| ModelError::Invalid(format!("a session's header: {error}")))?;
    let bytes = |text: &str| Tensor::from_slice(text.as_bytes(), text.len(), &Device::Cpu);
    let tokens = Tensor::from_slice(tokens, tokens.len(), &Device::Cpu)?;
    let mut entries = vec![
        Entry::of("session".into(), bytes(&header)?),
        Entry::of("text".into(), bytes(text)?),
        Entry::of("tokens".into(), tokens),
    ];
    entries.extend(cache.save()?.into_iter().map(|(name, tensor)| Entry::of(name, tensor)));
    replace_tensors(path, entries)
}

/// Reads a session of `model`, and the tensors of the state.
pub(crate) fn read(path: &Path, model: &Model) -> Result<(Session, HashMap<String, Tensor>)> {
    let mut tensors = read_tensors(path, true)?;
    let damaged = |what: String| ModelError::corrupt(path, what);
    let mut take = |name: &str, dtype: DType| {
        let tensor = tensors.remove(name).filter(|tensor| tensor.dtype() == dtype);
        tensor.ok_or_else(|| damaged(format!("not a session: it has no {name:?}")))
    };
    let mut text = |name: &str| {
        let bytes = take(name, DType::U8)?.flatten_all()?.to_vec1::<u8>()?;
        String::from_utf8(bytes).map_err(|_| damaged(format!("its {name:?} is not UTF-8")))
    };
    let header = text("session")?;
    let header: Header = serde_json::from_str(&header)
        .map_err(|error| damaged(format!("not a session that this program reads: {error}")))?;
    if header.format != FORMAT {
        return Err(ModelError::Unsupported {
            what: format!("format {} of sessions", header.format),
            found_in: Some(path.into()),
            hint: format!("this program reads format {FORMAT}: read the document again"),
        });
    }
    if header.model != identity(model)? {
        return Err(ModelError::Unsupported {
            what: "a session of another model".into(),
            found_in: Some(path.into()),
            hint: "use the model and student that read the document, or name another file".into(),
        });
    }
    let text = text("text")?;
    let tokens = take("tokens", DType::U32)?.flatten_all()?.to_vec1()?;
    Ok((Session { text, system: header.system, rows: header.rows, tokens }, tensors))
}

/// BLAKE3 over all that a state depends on: base weights, configuration, and what a student has learned.
fn identity(model: &Model) -> Result<String> {
    let mut hasher = Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(model.base.sha256()?.as_bytes());
    add(model.config().to_hf_json().to_string().as_bytes());
    if let Some(student) = &model.student {
        let still = serde_json::to_string(&student.config)
            .map_err(|error| ModelError::Invalid(format!("a student's configuration: {error}")))?;
        add(still.as_bytes());
        let mut tensors = student.checkpoint_tensors()?;
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, tensor) in tensors {
            add(name.as_bytes());
            let values = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let values = values.flatten_all()?.to_vec1::<f32>()?;
            add(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}
