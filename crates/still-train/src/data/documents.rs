//! Files as they come: one document of plain text, or one a line.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use super::chat::Conversation;
use super::instruction::Instruction;
use super::kind::Kind;
use super::line::{Messages, Text, fields};
use crate::error::{Result, TrainError};

/// Text that is held at a time while lines are read, in bytes.
pub(super) const BATCH_BYTES: usize = 4 << 20;

/// What a document is read from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// Where it is in its file, as in "line 3".
    pub place: String,
    pub json: String,
}

/// A line's document.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Document {
    Text(String),
    Conversation(Conversation),
    Instruction(Instruction),
}

pub(super) fn data_error(path: &Path, what: String, hint: &str) -> TrainError {
    TrainError::Data { path: path.to_path_buf(), what, hint: hint.into() }
}

/// Lines that are not blank, numbered from 1, a few megabytes at a time.
///
/// # Errors
/// A line that is longer than `most` bytes, is not UTF-8 or cannot be decompressed, by its number; an error of `each`.
pub(super) fn for_each_batch(
    path: &Path,
    kind: Kind,
    most: usize,
    each: &mut dyn FnMut(Vec<Entry>) -> Result<()>,
) -> Result<()> {
    let mut reader = BufReader::new(kind.open(path)?);
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for number in 1.. {
        let mut line = Vec::new();
        // The limit is on what is read, not on what has been.
        let read = (&mut reader).take(most as u64 + 1).read_until(b'\n', &mut line);
        let read = read.map_err(|error| {
            let too_much = error.to_string().contains("too much memory");
            let hint = match too_much {
                true => "its window is over 128 MiB: compress it again without --long",
                false => "the file is damaged or incomplete",
            };
            data_error(path, format!("line {number}: {error}"), hint)
        })?;
        if read == 0 {
            break;
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if line.len() > most {
            return Err(data_error(
                path,
                format!("line {number} is longer than {most} bytes (data.max_line_bytes)"),
                "each line must hold one document: divide it, or raise the limit with --set data.max_line_bytes=N",
            ));
        }
        let line = String::from_utf8(line).map_err(|error| {
            let at = error.utf8_error().valid_up_to() + 1;
            let what = format!("line {number}: not UTF-8 at its byte {at}");
            data_error(path, what, "convert the file to UTF-8")
        })?;
        if line.trim().is_empty() {
            continue;
        }
        bytes += line.len();
        batch.push(Entry { place: format!("line {number}"), json: line });
        if bytes >= BATCH_BYTES {
            each(std::mem::take(&mut batch))?;
            bytes = 0;
        }
    }
    each(batch)
}

/// What a line holds: text in `field` or, without such a field, a conversation in `messages` or an instruction and its output,
/// whose line may have `most` bytes.
pub(super) fn parse_line(
    path: &Path,
    Entry { place, json: line }: &Entry,
    field: &str,
    most: usize,
) -> Result<Document> {
    let fail = |what: String| {
        let hint = format!(
            "each line or row must have a string \"{field}\" (data.text_field), with \"messages\": a list of \
             {{\"role\": …, \"content\": …}}, or with \"instruction\" and \"output\""
        );
        data_error(path, format!("{place}: {what}"), &hint)
    };
    let too_long = |what: &str| {
        let what = format!(
            "{place}: {what} of {} bytes; at most {most} are tokenized at once (data.max_word_bytes)",
            line.len()
        );
        let hint = "divide it, or raise the limit with --set data.max_word_bytes=N";
        data_error(path, what, hint)
    };
    let fields = fields(line, field, most).map_err(fail)?;
    match (fields.text, fields.messages) {
        (Some(Text::Is(text)), _) => Ok(Document::Text(text)),
        (Some(Text::IsNot), _) => Err(fail(format!("\"{field}\" is not a string"))),
        (None, Some(Messages::Are(messages))) => {
            Conversation::new(messages, fields.beside).map(Document::Conversation).map_err(fail)
        }
        (None, Some(Messages::TooLong)) => Err(too_long("a conversation")),
        (None, None) => match fields.instruction {
            found if found.is_empty() => {
                Err(fail(format!("neither \"{field}\" nor \"messages\" nor \"instruction\"")))
            }
            found if found.values().any(Option::is_none) => Err(too_long("an instruction")),
            mut found => {
                let mut text = |key: &str| match found.remove(key).flatten() {
                    Some(Value::String(text)) => Ok(text),
                    // Not every line has an input.
                    None | Some(Value::Null) if key == "input" => Ok(String::new()),
                    Some(_) => Err(fail(format!("\"{key}\" is not a string"))),
                    None => Err(fail(format!("an instruction without \"{key}\""))),
                };
                Ok(Document::Instruction(Instruction {
                    instruction: text("instruction")?,
                    input: text("input")?,
                    output: text("output")?,
                }))
            }
        },
    }
}
