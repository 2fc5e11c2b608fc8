//! The directories of a run, claimed before any work.

use std::path::{Component, Path, PathBuf};

use still_model::{ExportKind, Model, StudentTarget};
use still_train::{Recipe, RunDir, checkpoint_bytes};

use super::args::Settings;
use crate::disk::{room, same_disk};
use crate::errors::user;
use crate::outputs::{existing_ancestor, writable};

/// Both directories of a run, which no other process writes until this is dropped.
#[derive(Debug)]
pub struct Places {
    pub student: StudentTarget,
    pub run_dir: RunDir,
}

impl Places {
    /// Checks what `--out` and `--run-dir` name and takes their locks.
    ///
    /// # Errors
    /// An output that exists, is not ours, is at work, or cannot be written.
    pub fn claim(settings: &Settings) -> anyhow::Result<Self> {
        let out = clean(&settings.out)?;
        // As it was named: a student behind a link has its run next to the link.
        let run_dir = match &settings.run_dir {
            Some(dir) => clean(dir)?,
            None => {
                let mut name = out.file_name().unwrap_or_default().to_owned();
                name.push(".run");
                out.with_file_name(name)
            }
        };
        if out.symlink_metadata().is_ok() && !settings.overwrite {
            return Err(user(
                format!("{} exists already", settings.out.display()),
                "choose another --out, or add --overwrite",
            ));
        }
        if absolute(&run_dir).starts_with(absolute(&out)) {
            return Err(user(
                format!("--run-dir {} is in the student's directory", run_dir.display()),
                "keep them apart: a student's directory holds nothing else",
            ));
        }
        for place in [&out, &run_dir] {
            let parent = still_model::files::parent(place);
            writable(&existing_ancestor(&parent))?;
        }
        let run_dir = RunDir::claim(&run_dir, settings.resume)?;
        writable(run_dir.path())?;
        Ok(Self { student: StudentTarget::claim(&out)?, run_dir })
    }

    /// An error if the disk has no room for checkpoints and student.
    ///
    /// # Errors
    /// How much is missing, and where.
    pub fn check_room(
        &self,
        model: &Model,
        recipe: &Recipe,
        kind: ExportKind,
    ) -> anyhow::Result<()> {
        let (checkpoints, learned) = checkpoint_bytes(model, recipe)?;
        let student = match kind {
            ExportKind::Full(dtype) => model.decoder.elements()? * dtype.size_in_bytes() as u64,
            ExportKind::Delta | ExportKind::DeltaIn(_) => 0,
        } + learned;
        let parent = still_model::files::parent(self.student.dir());
        let mut needs = vec![
            (self.run_dir.path(), "checkpoints", checkpoints),
            (parent.as_path(), "the student", student),
        ];
        if same_disk(needs[0].0, needs[1].0) {
            needs = vec![(needs[0].0, "checkpoints and the student", checkpoints + student)];
        }
        let hint = "free some disk space, choose another --out or --run-dir, lower checkpoint.keep, or save with --delta";
        needs.into_iter().try_for_each(|(place, what, needed)| room(place, what, needed, hint))
    }
}

/// A path without slashes and dots at its end, which ends in a name.
fn clean(path: &Path) -> anyhow::Result<PathBuf> {
    let clean: PathBuf = path.components().collect();
    match clean.components().next_back() {
        Some(Component::Normal(_)) => Ok(clean),
        // `.` and `..` have their names elsewhere.
        Some(_) if clean.file_name().is_none() && clean.is_dir() => Ok(clean.canonicalize()?),
        _ => Err(user(
            format!("{} names no directory", path.display()),
            "end it with the name of a directory that is not there yet",
        )),
    }
}

/// A path from the root, links in the part that is there followed.
fn absolute(path: &Path) -> PathBuf {
    let there = existing_ancestor(path);
    let rest = path.strip_prefix(&there).unwrap_or(path);
    let real = there.canonicalize().unwrap_or(there);
    real.join(rest).components().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_end_in_their_names() {
        for (path, cleaned) in
            [("a/b/", "a/b"), ("a//b//", "a/b"), ("./a/.", "./a"), ("/x/./y/.", "/x/y")]
        {
            assert_eq!(clean(Path::new(path)).unwrap(), Path::new(cleaned), "{path}");
        }
        assert!(clean(Path::new(".")).unwrap().is_absolute());
        assert!(clean(Path::new("no/such/..")).is_err());
        assert!(clean(Path::new("")).is_err());
    }
}
