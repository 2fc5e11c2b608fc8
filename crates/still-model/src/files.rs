//! Files that are complete or not there: written beside, synced, then renamed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use candle_core::Tensor;

/// A new directory in `parent` that is removed unless it is kept: what is complete is renamed from there.
///
/// Unlike the usual temporary directory, others may read it, as far as the umask allows.
///
/// # Errors
/// If it cannot be made.
pub fn staging_dir(parent: &Path, prefix: &str) -> io::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(parent)
}

/// Makes the data of a directory's files reach the disk, as it must before a rename does.
///
/// # Errors
/// If a file cannot be opened or synced.
pub fn sync_files(dir: &Path) -> io::Result<()> {
    for entry in dir.read_dir()? {
        File::open(entry?.path())?.sync_all()?;
    }
    Ok(())
}

/// Replaces one file by `bytes` in a single step.
///
/// # Errors
/// If it cannot be written; what stood there before is then untouched.
pub fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_file_with(path, |file| file.write_all(bytes))
}

/// Replaces one file by what `write` writes, in a single step.
///
/// # Errors
/// Of `write`; if the file cannot be written. What stood there before is then untouched.
pub fn write_file_with(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    // As any new file, not private as temporary files are.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(parent.unwrap_or(".".as_ref()))?;
    let mut writer = BufWriter::new(file.as_file());
    write(&mut writer)?;
    writer.flush()?;
    drop(writer);
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

/// Writes a safetensors file, in the dialect that every reader takes (`format: pt`).
///
/// # Errors
/// If it cannot be written.
pub fn save_tensors(path: &Path, tensors: &HashMap<String, Tensor>) -> io::Result<()> {
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(error) => error,
        other => io::Error::other(other.to_string()),
    })
}

/// What the user can do about a file that could not be read or written, if the kind of error tells.
pub fn io_hint(kind: io::ErrorKind) -> Option<&'static str> {
    Some(match kind {
        io::ErrorKind::NotFound => "check the path",
        io::ErrorKind::PermissionDenied => "check the file's permissions",
        io::ErrorKind::FileTooLarge => "raise the limit on file sizes (ulimit -f)",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some disk space; what was saved before is untouched"
        }
        io::ErrorKind::IsADirectory => "a file is needed here, not a directory",
        io::ErrorKind::InvalidData => "the file must be UTF-8 text",
        _ => return None,
    })
}
