//! Reading what a user names, if it is a file: opening a pipe waits for whoever writes it, and a device never ends.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Opens a regular file.
///
/// # Errors
/// If it is not there, something else (named), or cannot be opened.
pub fn open(path: &Path) -> io::Result<File> {
    check_regular(path)?;
    File::open(path)
}

/// Reads a regular file.
///
/// # Errors
/// As [`open`]; if it cannot be read.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads a regular file of UTF-8 text.
///
/// # Errors
/// As [`read`]; if it is not UTF-8.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

/// An error unless `path` is a regular file, or a link to one.
///
/// # Errors
/// What it is instead, as [`io::ErrorKind::IsADirectory`] or [`io::ErrorKind::InvalidInput`].
pub fn check_regular(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    match kind(&metadata) {
        None => Ok(()),
        Some("a directory") => Err(io::ErrorKind::IsADirectory.into()),
        Some(kind) => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {kind}, not a file")))
        }
    }
}

/// What something is that is no regular file.
pub fn kind(metadata: &std::fs::Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return None;
    }
    if kind.is_dir() {
        return Some("a directory");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return Some("a named pipe");
        }
        if kind.is_socket() {
            return Some("a socket");
        }
        if kind.is_char_device() || kind.is_block_device() {
            return Some("a device");
        }
    }
    Some("something else")
}
