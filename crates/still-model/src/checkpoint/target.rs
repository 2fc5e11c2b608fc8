//! The directory of a saved student: checks before the save, the lock, the move into place.

use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::form;
use super::transformers::{CARD_FILE, CODE, is_own_card};
use crate::error::{ModelError, Result};
use crate::files::{Lock, Locking, Staging, parent, read_to_string, staging_dir, sweep};

/// The learned tensors of a delta.
pub(super) const DELTA_FILE: &str = "student.safetensors";
/// What its name says, as Hugging Face has it: in a student it is its base's.
pub(super) const GENERATION_FILE: &str = "generation_config.json";
/// A tokenizer's chat template and special tokens.
pub(super) const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// What a student's directory is written as until it is complete.
const STAGING: &str = ".still-saving-";
/// Every file that a student's directory may have.
const FILES: [&str; 10] = [
    "config.json",
    GENERATION_FILE,
    "model.safetensors",
    DELTA_FILE,
    "tokenizer.json",
    TOKENIZER_CONFIG_FILE,
    CARD_FILE,
    CODE[0].0,
    CODE[1].0,
    CODE[2].0,
];

/// A directory that a student is to be saved in. From [`StudentTarget::claim`] on no other process saves there; a student that is
/// there already stays until its successor is complete.
#[derive(Debug)]
pub struct StudentTarget {
    dir: PathBuf,
    /// Given up when this is dropped.
    lock: Option<Lock>,
}

impl StudentTarget {
    /// Makes sure that a student can be saved as `dir`, and removes what a killed save left there.
    ///
    /// # Errors
    /// A path that names no directory; one that is there and holds anything but a student; one that another process saves in; a
    /// parent that cannot be written.
    pub fn claim(dir: &Path) -> Result<Self> {
        let dir = resolved(dir)?;
        let parent = parent(&dir);
        std::fs::create_dir_all(&parent).map_err(ModelError::write(&parent))?;
        let path = beside(&dir, ".lock");
        let lock = match Lock::take(&path).map_err(ModelError::write(&path))? {
            Locking::Acquired(lock) => lock,
            Locking::Taken(by) => {
                return Err(ModelError::NotFound {
                    what: format!("{} is being written by another still ({by})", dir.display()),
                    hint: "wait until it has ended, or choose another output directory".into(),
                });
            }
        };
        let target = Self { dir, lock: Some(lock) };
        sweep(&parent, STAGING);
        target.finish_replacement()?;
        refuse_foreign(&target.dir)?;
        Ok(target)
    }

    /// Where the student will be.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A directory to write the student in.
    pub(super) fn stage(&self) -> Result<Staging> {
        let parent = parent(&self.dir);
        staging_dir(&parent, STAGING).map_err(ModelError::write(&parent))
    }

    /// Moves a complete student into place; what stood there is kept until then.
    pub(super) fn replace(&self, staged: Staging) -> Result<()> {
        let (dir, previous) = (&self.dir, previous_path(&self.dir));
        // Somebody may have put something there since.
        refuse_foreign(dir)?;
        if dir.exists() {
            if previous.exists() {
                remove_student(&previous)?;
            }
            std::fs::rename(dir, &previous).map_err(ModelError::write(dir))?;
        }
        staged.rename_to(dir).map_err(ModelError::write(dir))?;
        if previous.exists() {
            remove_student(&previous)?;
        }
        Ok(())
    }

    /// Ends a replacement that was cut off: the old student is put back, or removed if the new one is in its place.
    fn finish_replacement(&self) -> Result<()> {
        let previous = previous_path(&self.dir);
        if !is_student(&previous) {
            return Ok(());
        }
        if self.dir.exists() {
            return remove_student(&previous);
        }
        std::fs::rename(&previous, &self.dir).map_err(ModelError::write(&self.dir))
    }
}

impl Drop for StudentTarget {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take() {
            lock.remove();
        }
    }
}

/// The directory that a path means: no slash at its end, no link (what it leads to is replaced, the link stays), no dots at its
/// end.
fn resolved(path: &Path) -> Result<PathBuf> {
    let clean: PathBuf = path.components().collect();
    let wrong = |what: &str| ModelError::NotFound {
        what: format!("{}: {what}", path.display()),
        hint: "name a directory that is not there yet".into(),
    };
    if let Ok(there) = clean.symlink_metadata() {
        if there.is_symlink() && !clean.exists() {
            return Err(wrong("it is a link that leads nowhere"));
        }
        if !clean.is_dir() {
            return Err(wrong("it is there and no directory"));
        }
        let named = matches!(clean.components().next_back(), Some(Component::Normal(_)));
        if there.is_symlink() || !named {
            return clean.canonicalize().map_err(ModelError::read(path));
        }
    }
    match clean.components().next_back() {
        Some(Component::Normal(_)) => Ok(clean),
        _ => Err(wrong("it names no directory")),
    }
}

/// `.NAME` and an ending, next to the directory `NAME`.
fn beside(dir: &Path, ending: &str) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(dir.file_name().unwrap_or_default());
    name.push(ending);
    dir.with_file_name(name)
}

/// Where a student waits while its successor takes its place.
pub(super) fn previous_path(dir: &Path) -> PathBuf {
    let clean: PathBuf = dir.components().collect();
    beside(&clean, ".previous")
}

fn is_student(dir: &Path) -> bool {
    read_to_string(&dir.join("config.json"))
        .ok()
        .and_then(|text| serde_json::from_str::<Value>(&text).ok())
        .is_some_and(|config| form::is_student(&config))
}

/// An error unless `dir` is free, empty, or a student and nothing else.
fn refuse_foreign(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let refused = |reason: String, hint: &str| {
        Err(ModelError::Corrupt { path: dir.to_path_buf(), reason, hint: hint.into() })
    };
    let entries = dir.read_dir().map_err(ModelError::read(dir))?.flatten();
    let names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    if names.is_empty() {
        return Ok(());
    }
    if !is_student(dir) {
        return refused("exists and is not a student".into(), "choose another output directory");
    }
    match names.iter().find(|name| !is_own(dir, name)) {
        Some(foreign) => refused(
            format!("holds {}, which is no file of a student", foreign.display()),
            "move it away, or choose another output directory: replacing a student removes its directory",
        ),
        None => Ok(()),
    }
}

/// Whether a file of this name in a student's directory is the student's. A `README.md` that somebody wrote or edited is not.
fn is_own(dir: &Path, name: &OsStr) -> bool {
    FILES.iter().any(|file| name == *file) && (name != CARD_FILE || is_own_card(&dir.join(name)))
}

/// Removes a student's own files, and its directory if nothing else is in it.
fn remove_student(dir: &Path) -> Result<()> {
    for file in FILES.into_iter().filter(|file| is_own(dir, file.as_ref())) {
        match std::fs::remove_file(dir.join(file)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(ModelError::write(&dir.join(file))(error));
            }
            _ => {}
        }
    }
    match std::fs::remove_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
            tracing::warn!("{} holds files that are no student's: they stay", dir.display());
            Ok(())
        }
        removed => removed.map_err(ModelError::write(dir)),
    }
}
