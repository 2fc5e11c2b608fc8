//! Files of one JSON object a line that may still be growing.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::Context;
use serde::de::DeserializeOwned;

use crate::errors::user;

/// Every line of a file; nothing if there is no such file.
///
/// # Errors
/// A line that is not what it should be, by its number. A last one without a line end is not complete, and left out if
/// it cannot be read.
pub fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<Vec<T>>> {
    let bytes = match still_model::files::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", path.display()));
        }
    };
    parse(&bytes, path).map(Some)
}

/// The lines of a part of the file `path`.
///
/// # Errors
/// As [`read`].
fn parse<T: DeserializeOwned>(bytes: &[u8], path: &Path) -> anyhow::Result<Vec<T>> {
    let mut items = Vec::new();
    for (n, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match serde_json::from_slice(line) {
            Ok(item) => items.push(item),
            Err(_) if !line.ends_with(b"\n") => {}
            Err(error) => {
                // Columns are counted in the line alone.
                let error = error.to_string();
                let what = error.split(" at line ").next().unwrap_or(&error);
                return Err(user(
                    format!("{} line {}: {what}", path.display(), n + 1),
                    "the line is damaged: fix it, or delete it",
                ));
            }
        }
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(text: &str) -> anyhow::Result<Vec<u32>> {
        parse(text.as_bytes(), Path::new("log.jsonl"))
    }

    #[test]
    fn a_line_cut_off_is_left_out() {
        assert_eq!(numbers("1\n2\n[").unwrap(), [1, 2]);
        assert_eq!(numbers("1\n\n2").unwrap(), [1, 2]);
        assert!(numbers("").unwrap().is_empty());
    }

    #[test]
    fn a_damaged_line_is_named() {
        let error = numbers("1\n2\nx\n4\n").unwrap_err().to_string();
        assert_eq!(error, "log.jsonl line 3: expected value");
    }
}
