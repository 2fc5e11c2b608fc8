//! Files that are complete or not there: written beside, synced, then renamed.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

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
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    // As any new file, not private as temporary files are.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(parent.unwrap_or(".".as_ref()))?;
    let mut writer = BufWriter::new(file.as_file());
    write(&mut writer)?;
    writer.flush()?;
    drop(writer);
    finish(file.as_file_mut())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
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
        io::ErrorKind::IsADirectory => "a file is needed here, not a directory",
        io::ErrorKind::InvalidData => "the file must be UTF-8 text",
        _ => return None,
    })
}
