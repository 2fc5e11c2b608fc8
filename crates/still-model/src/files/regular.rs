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

/// Most bytes of a file that is read whole.
const MOST: u64 = 1 << 30;

/// Reads a regular file of at most 1 GiB.
///
/// # Errors
/// As [`open`]; if it cannot be read, or is larger ([`io::ErrorKind::OutOfMemory`]).
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    let too_large = || Err(io::Error::new(io::ErrorKind::OutOfMemory, "it has more than 1 GiB"));
    if file.metadata()?.len() > MOST {
        return too_large();
    }
    let mut bytes = Vec::new();
    // It may grow while it is read, and some files of the system say that they are empty.
    file.take(MOST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST { too_large() } else { Ok(bytes) }
}

/// Reads a regular file of UTF-8 text.
///
/// # Errors
/// As [`read`]; if it is not UTF-8.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|_| {
        io::Error::new(io::ErrorKind::InvalidData, "stream did not contain valid UTF-8")
    })
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
