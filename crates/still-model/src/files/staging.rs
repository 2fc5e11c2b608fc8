//! What is not complete yet has a name of its own and is locked by who writes it; what is not locked was left by a kill.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// How often a name is tried that a sweep took away in the moment between its making and its lock.
const TRIES: usize = 16;

/// A new directory that is removed unless it is renamed into its place.
#[derive(Debug)]
pub struct Staging {
    dir: TempDir,
    /// Tells sweeps that somebody is at work here; absent where the file system has no locks.
    _held: Option<File>,
}

impl Staging {
    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Puts the directory in its place.
    ///
    /// # Errors
    /// If it cannot be renamed; it is removed then.
    pub fn rename_to(self, target: &Path) -> io::Result<()> {
        std::fs::rename(self.dir.path(), target)?;
        let _renamed = self.dir.keep();
        Ok(())
    }
}

/// A new directory in `parent`, with a name of this beginning: what is complete is renamed from there. A later [`sweep`] finds
/// it if this process is killed.
///
/// Unlike the usual temporary directory, others may read it, as far as the umask allows.
///
/// # Errors
/// If it cannot be made.
pub fn staging_dir(parent: &Path, prefix: &str) -> io::Result<Staging> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let (dir, held) = held_entry(|| builder.tempdir_in(parent), TempDir::path)?;
    Ok(Staging { dir, _held: held })
}

/// What `make` makes, locked.
pub(super) fn held_entry<T>(
    mut make: impl FnMut() -> io::Result<T>,
    path: impl Fn(&T) -> &Path,
) -> io::Result<(T, Option<File>)> {
    for _ in 0..TRIES {
        let made = make()?;
        match hold(path(&made)) {
            Hold::Held(lock) => return Ok((made, Some(lock))),
            Hold::NoLocks => return Ok((made, None)),
            Hold::Taken => {}
        }
    }
    Err(io::Error::other("something removes new files as soon as they are made"))
}

/// Removes what killed processes left in `parent` under names of this beginning; what a living one works on stays. Where a file
/// system has no locks nothing is removed.
pub fn sweep(parent: &Path, prefix: &str) {
    let Ok(entries) = parent.read_dir() else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            remove_if_left(&entry.path());
        }
    }
}

fn remove_if_left(path: &Path) {
    let Hold::Held(_lock) = hold(path) else { return };
    let removed =
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match removed {
        Ok(()) => tracing::info!("removed {}, left by a run that was killed", path.display()),
        Err(error) => {
            tracing::info!("{}, left by a killed run, stays: {error}", path.display());
        }
    }
}

enum Hold {
    Held(File),
    /// By another process; or it is gone.
    Taken,
    NoLocks,
}

/// Locks what is at `path`, if that is a file or directory and still there once it is locked.
fn hold(path: &Path) -> Hold {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() || metadata.is_file() => {}
        _ => return Hold::Taken,
    }
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Hold::Taken,
        Err(_) => return Hold::NoLocks,
    };
    match file.try_lock() {
        Ok(()) if is_at(&file, path) => Hold::Held(file),
        Ok(()) | Err(std::fs::TryLockError::WouldBlock) => Hold::Taken,
        Err(std::fs::TryLockError::Error(_)) => Hold::NoLocks,
    }
}

/// Whether an open file is what its path names: it may have been removed, and another made.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let (Ok(open), Ok(there)) = (file.metadata(), std::fs::metadata(path)) else {
            return false;
        };
        (open.dev(), open.ino()) == (there.dev(), there.ino())
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

/// The directory that a file or directory is in.
pub fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_removes_what_was_left_and_nothing_that_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let at_work = staging_dir(dir.path(), ".saving-").unwrap();
        let left = dir.path().join(".saving-left");
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join("half"), "x").unwrap();
        let file = dir.path().join(".saving-file");
        std::fs::write(&file, "x").unwrap();
        let foreign = dir.path().join("precious");
        std::fs::write(&foreign, "x").unwrap();
        sweep(dir.path(), ".saving-");
        assert!(at_work.path().exists() && foreign.exists());
        assert!(!left.exists() && !file.exists());

        let target = dir.path().join("target");
        at_work.rename_to(&target).unwrap();
        assert!(target.is_dir());
        // Its place is nobody's to sweep by another name.
        sweep(dir.path(), ".saving-");
        assert_eq!(dir.path().read_dir().unwrap().count(), 2);
    }

    #[test]
    fn what_is_not_put_in_its_place_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        drop(staging_dir(dir.path(), ".saving-").unwrap());
        assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    }
}
