//! Data files: JSON lines, whose errors name file and line.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use still_model::files::read;

use crate::error::{EvalError, Result};

/// Reads every line of a file as a `T` and makes something of it; the index is that of the record.
///
/// # Errors
/// A file that is missing, unreadable, empty or not UTF-8, a line that is not a `T` or that `make` refuses.
pub fn read_lines<T: DeserializeOwned, U>(
    path: &Path,
    mut make: impl FnMut(usize, T) -> std::result::Result<U, String>,
) -> Result<Vec<U>> {
    let bytes = read(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => EvalError::NoData { path: path.to_path_buf() },
        _ => EvalError::Io { action: "cannot read", path: path.to_path_buf(), source },
    })?;
    let mut records = Vec::new();
    for (line, bytes) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let wrong =
            |reason: String| EvalError::Data { path: path.to_path_buf(), line: line + 1, reason };
        let text = str::from_utf8(bytes).map_err(|_| wrong("not UTF-8".into()))?;
        if text.trim().is_empty() {
            continue;
        }
        let record = serde_json::from_str(text).map_err(|error| {
            let cut = if error.is_eof() { "the line is cut short: " } else { "" };
            wrong(format!("{cut}{}", without_line(&error.to_string())))
        })?;
        records.push(make(records.len(), record).map_err(wrong)?);
    }
    if records.is_empty() {
        return Err(EvalError::Data {
            path: path.to_path_buf(),
            line: 1,
            reason: "no items".into(),
        });
    }
    Ok(records)
}

/// The parser counts lines from the line it was given.
fn without_line(error: &str) -> &str {
    error.split(" at line ").next().unwrap_or(error)
}

/// A question, its choices and the index of the right one.
#[derive(Debug, Deserialize)]
pub struct ChoiceRecord {
    pub query: String,
    pub choices: Vec<String>,
    pub gold: usize,
    /// Only MMLU has it.
    #[serde(default)]
    pub subject: Option<String>,
}

impl ChoiceRecord {
    /// Itself, unless there is nothing to choose or no right choice.
    pub fn checked(self) -> std::result::Result<Self, String> {
        check_gold(self.gold, self.choices.len())?;
        match self.choices.iter().position(String::is_empty) {
            Some(empty) => Err(format!("choice {empty} is empty")),
            None => Ok(self),
        }
    }
}

/// An error unless there are at least two choices and `gold` is one of them.
pub fn check_gold(gold: usize, choices: usize) -> std::result::Result<(), String> {
    if choices < 2 {
        return Err(format!("{choices} choices leave nothing to choose"));
    }
    if gold >= choices {
        return Err(format!("gold is {gold}, of {choices} choices the last is {}", choices - 1));
    }
    Ok(())
}
