//! A run's directory while a run is in it: one at a time.

use std::path::{Path, PathBuf};

use still_model::files::{Lock, Locking, WRITING, sweep};

use crate::checkpoint::Checkpoints;
use crate::error::{Result, TrainError};

/// The lock, in the run directory.
const LOCK: &str = "run.lock";
/// What tells a run directory from any other.
const MARKS: [&str; 5] =
    [LOCK, "metrics.jsonl", "evaluations.jsonl", "budgets.json", "checkpoints"];

/// A run directory that this process alone works in, until this is dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    lock: Option<Lock>,
}

impl RunDir {
    /// Makes the directory if there is none, keeps other processes out of it, and removes what a killed run left half-written.
    /// Whether a run may begin there, or go on with `resume`, is known before anything is read.
    ///
    /// # Errors
    /// A path that is no directory, or one of something else; another run that goes on there; checkpoints where there must be none, or
    /// none where there must be some.
    pub fn claim(path: &Path, resume: bool) -> Result<Self> {
        let fail = |what: String, hint: &str| {
            Err(TrainError::Run { path: path.to_path_buf(), what, hint: hint.into() })
        };
        if path.exists() && !path.is_dir() {
            return fail("is no directory".into(), "choose another run directory");
        }
        if let Some(foreign) = foreign(path) {
            return fail(
                format!("holds {foreign} and is not the directory of a run"),
                "choose one that is empty or not there yet",
            );
        }
        std::fs::create_dir_all(path).map_err(TrainError::write(path))?;
        let file = path.join(LOCK);
        let lock = match Lock::take(&file).map_err(TrainError::write(&file))? {
            Locking::Acquired(lock) => lock,
            Locking::Taken(by) => {
                return fail(
                    format!("another still works in it ({by})"),
                    "wait until it has ended, or choose another run directory",
                );
            }
        };
        let claimed = Self { path: path.to_path_buf(), lock: Some(lock) };
        let checkpoints = Checkpoints::new(path, 1);
        checkpoints.tidy()?;
        sweep(path, WRITING);
        match (resume, checkpoints.list().is_empty()) {
            (false, false) => fail(
                "holds checkpoints of an earlier run".into(),
                "add --resume to go on with it, choose another run directory, or remove this one to begin again",
            ),
            (true, true) => {
                fail("there is no checkpoint to resume from".into(), "run once without --resume")
            }
            _ => Ok(claimed),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let Some(lock) = self.lock.take() else { return };
        // A run that did nothing leaves nothing.
        let only_lock = |entry: std::fs::DirEntry| entry.file_name() == LOCK;
        let unused = self.path.read_dir().is_ok_and(|entries| entries.flatten().all(only_lock));
        if unused {
            lock.remove();
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}

/// A name in a directory that is not empty and no run's.
fn foreign(path: &Path) -> Option<String> {
    let names: Vec<_> = path.read_dir().ok()?.flatten().map(|entry| entry.file_name()).collect();
    if names.iter().any(|name| MARKS.iter().any(|mark| *name == *mark)) {
        return None;
    }
    names.first().map(|name| name.to_string_lossy().into_owned())
}
