//! Files of sessions: messages, the state's tokens, and the state, tied to a model.
//!
//! A session is a safetensors file with a digest ([`crate::seal`]). docs/files.md lists its tensors.

use std::collections::HashMap;
use std::path::Path;

use blake3::Hasher;
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use still_attention::RowDtype;

use super::{ChatSession, Generated};
use crate::chat::Message;
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::tensor_file::{Entry, read_tensors, replace_tensors};

/// The current format.
const FORMAT: u32 = 3;

/// The earliest format that is read. Its hybrid layers have more rows and scores than are needed.
const EARLIEST: u32 = 2;

/// The saved parts of a session but its state.
#[derive(Debug)]
pub(super) struct Saved {
    pub rows: RowDtype,
    pub messages: Vec<Message>,
    pub document: Option<String>,
    pub tokens: Vec<u32>,
    pub generated: Option<Generated>,
}

/// The JSON of a session.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    format: u32,
    /// [`identity`] of the model.
    model: String,
    rows: RowDtype,
}

/// Names of the tensors.
const HEADER: &str = "session";
const MESSAGES: &str = "messages";
const DOCUMENT: &str = "document";
const TOKENS: &str = "tokens";
const GENERATED_TEXT: &str = "generated.text";
const GENERATED_TOKENS: &str = "generated.tokens";

/// Writes a session atomically.
pub(super) fn write(path: &Path, session: &ChatSession) -> Result<()> {
    let ChatSession { rows, messages, tokens, cache, .. } = session;
    let mut entries = entries(session.identity()?, *rows, messages, tokens, cache.save()?)?;
    if let Some(document) = &session.document {
        entries.push(text_entry(DOCUMENT, document)?);
    }
    if let Some(Generated { text, tokens }) = &session.generated {
        entries.push(text_entry(GENERATED_TEXT, text)?);
        entries.push(ids_entry(GENERATED_TOKENS, tokens)?);
    }
    replace_tensors(path, entries)
}

/// What every session has.
pub(super) fn entries(
    identity: &str,
    rows: RowDtype,
    messages: &[Message],
    tokens: &[u32],
    state: HashMap<String, Tensor>,
) -> Result<Vec<Entry<'static>>> {
    let header = json(&Header { format: FORMAT, model: identity.to_owned(), rows })?;
    let mut entries = vec![
        text_entry(HEADER, &header)?,
        text_entry(MESSAGES, &json(&messages)?)?,
        ids_entry(TOKENS, tokens)?,
    ];
    entries.extend(state.into_iter().map(|(name, tensor)| Entry::of(name, tensor)));
    Ok(entries)
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|error| ModelError::Invalid(format!("a session cannot be written: {error}")))
}

fn text_entry(name: &str, text: &str) -> Result<Entry<'static>> {
    let bytes = Tensor::from_slice(text.as_bytes(), text.len(), &Device::Cpu)?;
    Ok(Entry::of(name.into(), bytes))
}

fn ids_entry(name: &str, ids: &[u32]) -> Result<Entry<'static>> {
    Ok(Entry::of(name.into(), Tensor::from_slice(ids, ids.len(), &Device::Cpu)?))
}

/// Reads a session of the model that is `identity`, and the tensors of the state.
pub(super) fn read(path: &Path, identity: &str) -> Result<(Saved, HashMap<String, Tensor>)> {
    let read = read_tensors(path, true).and_then(|tensors| parse(path, tensors, identity));
    read.map_err(of_session)
}

/// The advice on a damaged file is of models, which can be had again. What a session has read can only be read again.
fn of_session(error: ModelError) -> ModelError {
    let ModelError::Corrupt { path, reason, .. } = error else { return error };
    let (reason, hint) = match is_one(&path) {
        true => (reason, "remove the file, and read the document again"),
        false => (
            format!("not a session, or incomplete: {reason}"),
            "name a file that `still ask --session`, `still chat --session` or /save wrote",
        ),
    };
    ModelError::Corrupt { path, reason, hint: hint.into() }
}

/// [`read`] of the tensors of a file, which errors call `path`.
pub(super) fn parse(
    path: &Path,
    tensors: HashMap<String, Tensor>,
    identity: &str,
) -> Result<(Saved, HashMap<String, Tensor>)> {
    let mut parts = Parts { path, tensors };
    let Some(header) = parts.text(HEADER)? else {
        return Err(parts.damaged(format!("not a session: it has no {HEADER:?}")));
    };
    // Before anything else is looked at, which other formats may have or not.
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let Format { format } = parts.parse(HEADER, &header)?;
    if !(EARLIEST..=FORMAT).contains(&format) {
        return Err(ModelError::Unsupported {
            what: format!("format {format} of sessions"),
            found_in: Some(path.into()),
            hint: format!(
                "this program reads formats {EARLIEST} to {FORMAT}: remove the file, and read the document again"
            ),
        });
    }
    let Header { model, rows, .. } = parts.parse(HEADER, &header)?;
    if model != identity {
        return Err(ModelError::Unsupported {
            what: "a session of another model".into(),
            found_in: Some(path.into()),
            hint: "use the model and student that the session was saved from, or name another file"
                .into(),
        });
    }
    let missing = |name: &str| format!("a session without {name:?}");
    let messages = parts.text(MESSAGES)?.ok_or_else(|| parts.damaged(missing(MESSAGES)))?;
    let messages: Vec<Message> = parts.parse(MESSAGES, &messages)?;
    let tokens = parts.ids(TOKENS)?.ok_or_else(|| parts.damaged(missing(TOKENS)))?;
    let document = parts.text(DOCUMENT)?;
    let generated = match (parts.text(GENERATED_TEXT)?, parts.ids(GENERATED_TOKENS)?) {
        (Some(text), Some(tokens)) => Some(Generated { text, tokens }),
        (None, None) => None,
        _ => {
            return Err(
                parts.damaged(format!("{GENERATED_TEXT:?} and its tokens are not both there"))
            );
        }
    };
    parts.check_numbers()?;
    Ok((Saved { rows, messages, document, tokens, generated }, parts.tensors))
}

/// Whether a file has what a session has, damaged or not.
pub(super) fn is_one(path: &Path) -> bool {
    let Ok(file) = crate::files::open(path) else { return false };
    // SAFETY: the map is read-only and ends with this function; nobody cuts the file short meanwhile.
    let Ok(map) = (unsafe { memmap2::Mmap::map(&file) }) else { return false };
    let header = safetensors::SafeTensors::read_metadata(&map);
    let has = |name: &str| header.as_ref().is_ok_and(|(_, header)| header.info(name).is_some());
    has(HEADER) && has(TOKENS)
}

/// Tensors of a file, taken out one by one.
struct Parts<'a> {
    path: &'a Path,
    tensors: HashMap<String, Tensor>,
}

impl Parts<'_> {
    fn damaged(&self, what: String) -> ModelError {
        ModelError::corrupt(self.path, what)
    }

    fn take(&mut self, name: &str, dtype: DType) -> Result<Option<Tensor>> {
        match self.tensors.remove(name) {
            Some(tensor) if tensor.dtype() != dtype => {
                let found = tensor.dtype().as_str();
                Err(self.damaged(format!("{name:?} is {found}, not {}", dtype.as_str())))
            }
            found => Ok(found),
        }
    }

    fn text(&mut self, name: &str) -> Result<Option<String>> {
        let Some(bytes) = self.take(name, DType::U8)? else { return Ok(None) };
        let bytes = bytes.flatten_all()?.to_vec1::<u8>()?;
        let text = String::from_utf8(bytes);
        text.map(Some).map_err(|_| self.damaged(format!("its {name:?} is not UTF-8")))
    }

    fn ids(&mut self, name: &str) -> Result<Option<Vec<u32>>> {
        let Some(ids) = self.take(name, DType::U32)? else { return Ok(None) };
        Ok(Some(ids.flatten_all()?.to_vec1()?))
    }

    /// An error if the state has values that are no numbers: it would answer as damaged weights do. Scores may be none, and only
    /// order tokens.
    fn check_numbers(&self) -> Result<()> {
        for (name, tensor) in &self.tensors {
            if name.ends_with("score") || !tensor.dtype().is_float() {
                continue;
            }
            let values = tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            if !values.into_iter().all(f64::is_finite) {
                return Err(self.damaged(format!("its {name:?} has values that are no numbers")));
            }
        }
        Ok(())
    }

    fn parse<T: for<'de> Deserialize<'de>>(&self, name: &str, text: &str) -> Result<T> {
        serde_json::from_str(text)
            .map_err(|error| self.damaged(format!("its {name:?} is not a session's: {error}")))
    }
}

/// BLAKE3 over all that a state depends on: base weights, configuration, and what a student has learned.
pub(super) fn identity(model: &Model) -> Result<String> {
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
