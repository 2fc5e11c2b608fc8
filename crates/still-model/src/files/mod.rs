//! Files that are complete or not there: written under a temporary name, synced, then renamed.

mod lock;
mod regular;
mod staging;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

pub use lock::{Lock, Locking};
pub use regular::{check_regular, kind, open, read, read_to_string};
pub use staging::{Staging, parent, staging_dir, sweep};

/// A file that is being written has a name of this beginning until it is complete.
pub const WRITING: &str = ".still-writing-";

/// Makes the data of a directory's files reach the disk, as it must before a rename does.
///
/// # Errors
/// If a file cannot be opened or synced.
pub fn sync_files(dir: &Path) -> io::Result<()> {
    for entry in dir.read_dir()? {
        open(&entry?.path())?.sync_all()?;
    }
    Ok(())
}

/// The text of a file, if there is one.
///
/// # Errors
/// A file that is there and cannot be read, or is no UTF-8.
pub(crate) fn read_if_there(path: &Path) -> crate::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(crate::ModelError::corrupt(path, "not UTF-8"))
        }
        Err(error) => Err(crate::ModelError::read(path)(error)),
    }
}

/// Replaces one file by `bytes` in a single step.
///
/// # Errors
/// If it cannot be written; what stood there before is then untouched.
pub fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_file_with(path, |file| file.write_all(bytes), |_| Ok(()))
}

/// Replaces one file by what `write` writes and `finish` then changes, in a single step.
///
/// # Errors
/// Of either; if the file cannot be written. What stood there before is then untouched.
pub fn write_file_with(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
    finish: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    // A link stays one: what it leads to is replaced.
    let target = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_symlink() => path.canonicalize()?,
        _ => path.to_path_buf(),
    };
    if let Some(kind) = target.metadata().ok().as_ref().and_then(kind) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {kind}")));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(WRITING);
    // As any new file, not private as temporary files are.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let parent = parent(&target);
    let (mut file, _held) =
        staging::held_entry(|| builder.tempfile_in(&parent), tempfile::NamedTempFile::path)?;
    let mut writer = BufWriter::new(file.as_file());
    write(&mut writer)?;
    writer.flush()?;
    drop(writer);
    finish(file.as_file_mut())?;
    file.as_file().sync_all()?;
    file.persist(&target)?;
    Ok(())
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
        io::ErrorKind::OutOfMemory => "give a shorter file",
        io::ErrorKind::IsADirectory => "a file is needed here, not a directory",
        io::ErrorKind::InvalidData => "the file must be UTF-8 text",
        io::ErrorKind::InvalidInput => "name a regular file",
        _ => return None,
    })
}
