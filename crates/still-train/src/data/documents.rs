//! Files as they come: one document of plain text, or one a line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;
use still_model::Message;

use crate::error::{Result, TrainError};

/// Text that is held at a time while lines are read, in bytes.
const BATCH_BYTES: usize = 4 << 20;

/// What a file's name says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `.txt`: one document.
    Text,
    /// `.jsonl`: one document a line.
    Lines,
    /// `.jsonl.zst`: the same, compressed.
    CompressedLines,
    /// `.bin`: token ids.
    Tokens,
}

impl Kind {
    pub fn of(path: &Path) -> Result<Self> {
        let name =
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let kinds = [
            (".txt", Self::Text),
            (".jsonl", Self::Lines),
            (".jsonl.zst", Self::CompressedLines),
            (".bin", Self::Tokens),
        ];
        kinds
            .into_iter()
            .find(|(ending, _)| name.ends_with(ending))
            .map(|(_, kind)| kind)
            .ok_or_else(|| {
                data_error(
                    path,
                    "unknown kind of file".into(),
                    "give .txt, .jsonl, .jsonl.zst or .bin",
                )
            })
    }
}

/// A line's document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Document {
    Text(String),
    Conversation(Vec<Message>),
}

pub(super) fn data_error(path: &Path, what: String, hint: &str) -> TrainError {
    TrainError::Data { path: path.to_path_buf(), what, hint: hint.into() }
}

/// The whole of a `.txt`.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(TrainError::read(path))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        data_error(path, format!("not UTF-8 at byte {at}"), "convert the file to UTF-8")
    })
}

/// Lines that are not blank, numbered from 1, a few megabytes at a time.
pub(super) fn for_each_batch(
    path: &Path,
    kind: Kind,
    each: &mut dyn FnMut(Vec<(usize, String)>) -> Result<()>,
) -> Result<()> {
    let file = File::open(path).map_err(TrainError::read(path))?;
    let reader: Box<dyn Read> = match kind {
        Kind::CompressedLines => {
            Box::new(zstd::Decoder::new(file).map_err(TrainError::read(path))?)
        }
        _ => Box::new(file),
    };
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for (number, line) in BufReader::new(reader).lines().enumerate() {
        let line = line.map_err(|error| {
            let what = format!("line {}: {error}", number + 1);
            data_error(path, what, "the file is damaged or incomplete")
        })?;
        if line.trim().is_empty() {
            continue;
        }
        bytes += line.len();
        batch.push((number + 1, line));
        if bytes >= BATCH_BYTES {
            each(std::mem::take(&mut batch))?;
            bytes = 0;
        }
    }
    each(batch)
}

/// What a line holds: text in `field` or, without such a field, a conversation in `messages`.
pub(super) fn parse_line(path: &Path, number: usize, line: &str, field: &str) -> Result<Document> {
    let fail = |what: String| {
        let hint = format!(
            "each line must be a JSON object with a string \"{field}\" (data.text_field), or with \"messages\": a list of \
             {{\"role\": …, \"content\": …}}"
        );
        data_error(path, format!("line {number}: {what}"), &hint)
    };
    let mut value: Value = serde_json::from_str(line).map_err(|error| fail(error.to_string()))?;
    let Some(object) = value.as_object_mut() else {
        return Err(fail("not a JSON object".into()));
    };
    match (object.remove(field), object.remove("messages")) {
        (Some(Value::String(text)), _) => Ok(Document::Text(text)),
        (Some(_), _) => Err(fail(format!("\"{field}\" is not a string"))),
        (None, Some(messages)) => serde_json::from_value(messages)
            .map(Document::Conversation)
            .map_err(|error| fail(format!("\"messages\": {error}"))),
        (None, None) => Err(fail(format!("neither \"{field}\" nor \"messages\""))),
    }
}
