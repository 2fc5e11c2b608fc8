//! GGUF files: everything in one is checked against the file and the rest of it before it is used.
//!
//! [`open`] reads the directory (`directory`), [`config()`] the metadata (`metadata` types each value, `rope` has those of RoPE) and
//! whether the tensors are those of that model, no more, no less and of the right shapes (`tensors`).

mod config;
mod cursor;
mod directory;
mod metadata;
mod rope;
mod sampling;
mod tensors;
mod types;
mod window;

use std::path::Path;

use candle_core::quantized::gguf_file::Content;

use crate::error::{ModelError, Result};
use crate::files;

pub use config::config;
pub(crate) use metadata::Metadata;
pub use sampling::generation_config;

/// What is wrong with a header.
enum Fault {
    Damaged(String),
    Unsupported { what: String, hint: String },
}

impl Fault {
    /// The fault, in what is called `key`.
    fn of(self, key: &str) -> Self {
        match self {
            Self::Damaged(reason) => Self::Damaged(format!("{key}: {reason}")),
            other => other,
        }
    }

    fn in_file(self, path: &Path) -> ModelError {
        match self {
            Self::Damaged(reason) => ModelError::corrupt(path, reason),
            Self::Unsupported { what, hint } => unsupported(path, what, hint),
        }
    }
}

/// Reads a GGUF file's directory, of which the tensor library then reads tensors without failing.
///
/// # Errors
/// A file that is not GGUF, damaged or truncated; a tensor in a format that has no reader.
pub fn open(path: &Path) -> Result<Content> {
    let file = files::open(path).map_err(ModelError::read(path))?;
    // SAFETY: the map is read-only and dropped before this function returns.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(ModelError::read(path))?;
    directory::parse(&map).map_err(|fault| fault.in_file(path))
}

fn unsupported(path: &Path, what: String, hint: impl Into<String>) -> ModelError {
    ModelError::Unsupported { what, found_in: Some(path.to_path_buf()), hint: hint.into() }
}

/// Undoes the interleaved order in which Llama GGUF files store q and k rows: the stored row of each row in half
/// rotation's order. Nothing if so many rows are no heads of whole pairs.
pub fn row_order(rows: usize, heads: usize) -> Option<impl Iterator<Item = usize>> {
    let half = rows.checked_div(heads)? / 2;
    (half > 0 && half * 2 * heads == rows).then(|| {
        (0..rows).map(move |row| {
            let (head, pair, channel) = (row / (2 * half), row / half % 2, row % half);
            (head * half + channel) * 2 + pair
        })
    })
}
