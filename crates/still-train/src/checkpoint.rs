//! Checkpoints of a run: complete or not there, and whole: every file has a digest that is checked before a run goes on.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use still_model::files::{Staging, staging_dir, sweep, sync_files};
use still_model::seal::{self, Kind, Seal};
use still_model::tensor_file::{read_tensors, save_tensors};
use still_model::{ModelError, Student};

use crate::data::Position;
use crate::error::{Result, TrainError};
use crate::metrics::{LogMark, Stage};
use crate::run::Watch;
use crate::schedule::Plateau;
use crate::spikes::Spikes;

const PARAMETERS: &str = "parameters.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const TRAINER: &str = "trainer.json";
/// The form of a checkpoint. Those from before forms were counted have no digests.
const FORMAT: u64 = 1;
const FORMAT_KEY: &str = "format";
/// What is being written has a name of this beginning until it is complete.
const STAGING: &str = ".saving-";
/// The student of the lowest held-out loss.
const BEST: &str = "best";
/// Where it waits while its successor takes its place.
const PREVIOUS_BEST: &str = ".best-before";

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Progress {
    pub stage: Stage,
    /// Steps of the stage done.
    pub step: usize,
    /// Those among them that were spikes and not taken.
    #[serde(default)]
    pub skipped: usize,
    #[serde(default)]
    pub spikes: Spikes,
    #[serde(default)]
    pub plateau: Plateau,
    #[serde(default)]
    pub watch: Watch,
    pub position: Position,
    /// The run's logs when this was saved.
    #[serde(default)]
    pub logs: Logs,
    /// SHA-256 of the resolved recipe, the data and the base: a run goes on only with the same.
    pub fingerprint: String,
}

/// How far a run's logs went, by what [`crate::metrics::Log::mark`] says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Logs {
    pub metrics: Option<LogMark>,
    pub evaluations: Option<LogMark>,
}

/// A checkpoint read back.
#[derive(Debug)]
pub(crate) struct Saved {
    pub progress: Progress,
    pub parameters: HashMap<String, Tensor>,
    pub optimizer: HashMap<String, Tensor>,
}

/// The checkpoints of one run, under `RUN_DIR/checkpoints`.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

impl Checkpoints {
    pub fn new(run_dir: &Path, keep: usize) -> Self {
        Self { dir: run_dir.join("checkpoints"), keep }
    }

    /// Complete checkpoints, oldest first. Whatever a kill left half-written has another name.
    pub fn list(&self) -> Vec<PathBuf> {
        let Ok(entries) = self.dir.read_dir() else { return Vec::new() };
        let mut found: Vec<(Stage, usize, PathBuf)> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let (stage, step) = path.file_name()?.to_str()?.split_once("-step-")?;
                let stage =
                    [Stage::Transfer, Stage::Finetune].into_iter().find(|s| s.name() == stage)?;
                Some((stage, step.parse().ok()?, path))
            })
            .collect();
        found.sort();
        found.into_iter().map(|(_, _, path)| path).collect()
    }

    /// Removes what a kill left half-written, and finishes what it left half-renamed.
    pub fn tidy(&self) -> Result<()> {
        sweep(&self.dir, STAGING);
        let (best, before) = (self.dir.join(BEST), self.dir.join(PREVIOUS_BEST));
        if before.exists() {
            if best.exists() {
                std::fs::remove_dir_all(&before).map_err(TrainError::write(&before))?;
            } else {
                std::fs::rename(&before, &best).map_err(TrainError::write(&best))?;
            }
        }
        Ok(())
    }

    /// Writes under a temporary name, then renames; then drops the oldest beyond those to keep.
    pub fn save(
        &self,
        progress: &Progress,
        student: &Student,
        optimizer: &HashMap<String, Tensor>,
    ) -> Result<PathBuf> {
        let staged = self.stage(progress, student, optimizer)?;
        let target = self.dir.join(format!("{}-step-{:06}", progress.stage.name(), progress.step));
        if target.exists() {
            std::fs::remove_dir_all(&target).map_err(TrainError::write(&target))?;
        }
        staged.rename_to(&target).map_err(TrainError::write(&target))?;
        self.prune()?;
        Ok(target)
    }

    /// Drops the oldest beyond those to keep. A kill after the last save of a run may have left more of them.
    pub fn prune(&self) -> Result<()> {
        let all = self.list();
        for old in &all[..all.len().saturating_sub(self.keep)] {
            std::fs::remove_dir_all(old).map_err(TrainError::write(old))?;
        }
        Ok(())
    }

    /// Keeps a student next to the newest ones, in place of the best one before.
    pub fn save_best(&self, progress: &Progress, student: &Student) -> Result<()> {
        // No run goes on from it: the optimizer is not needed.
        let staged = self.stage(progress, student, &HashMap::new())?;
        let (best, before) = (self.dir.join(BEST), self.dir.join(PREVIOUS_BEST));
        if best.exists() {
            std::fs::rename(&best, &before).map_err(TrainError::write(&before))?;
        }
        staged.rename_to(&best).map_err(TrainError::write(&best))?;
        if before.exists() {
            std::fs::remove_dir_all(&before).map_err(TrainError::write(&before))?;
        }
        Ok(())
    }

    /// Writes everything under a temporary name.
    fn stage(
        &self,
        progress: &Progress,
        student: &Student,
        optimizer: &HashMap<String, Tensor>,
    ) -> Result<Staging> {
        std::fs::create_dir_all(&self.dir).map_err(TrainError::write(&self.dir))?;
        let staging = staging_dir(&self.dir, STAGING).map_err(TrainError::write(&self.dir))?;
        let mut parameters = HashMap::new();
        student.map_tensors(|name, tensor| {
            parameters.insert(name.to_owned(), tensor.clone());
            Ok(tensor.clone())
        })?;
        for (file, tensors) in [(PARAMETERS, &parameters), (OPTIMIZER, optimizer)] {
            save_tensors(&staging.path().join(file), tensors)?;
        }
        let path = staging.path().join(TRAINER);
        let json = serde_json::to_value(progress)
            .map_err(|error| TrainError::write(&path)(std::io::Error::other(error)))?;
        std::fs::write(&path, sealed(json)).map_err(TrainError::write(&path))?;
        sync_files(staging.path()).map_err(TrainError::write(staging.path()))?;
        Ok(staging)
    }

    /// The student of the lowest held-out loss, if one was kept.
    pub fn best(&self) -> Result<Option<Saved>> {
        let path = self.dir.join(BEST);
        path.exists().then(|| read(&path)).transpose()
    }

    /// The newest checkpoint, if there is one.
    pub fn latest(&self) -> Result<Option<Saved>> {
        self.list().pop().map(|path| read(&path)).transpose()
    }
}

/// The text of a JSON object with its format and digest.
fn sealed(json: Value) -> String {
    let mut whole = json!({ FORMAT_KEY: FORMAT, seal::KEY: seal::BLANK });
    if let (Value::Object(whole), Value::Object(fields)) = (&mut whole, json) {
        whole.extend(fields);
    }
    seal::sealed_json(format!("{whole:#}\n"))
}

fn read(dir: &Path) -> Result<Saved> {
    let hint = || format!("delete {} to go on from the checkpoint before it", dir.display());
    let path = dir.join(TRAINER);
    let (progress, sealed) = read_progress(&path, &hint())?;
    if !sealed {
        tracing::warn!("{} is of an older version and has no digests", dir.display());
    }
    let tensors = |file: &str| {
        read_tensors(&dir.join(file), sealed).map_err(|error| match error {
            ModelError::Corrupt { path, reason, .. } => {
                TrainError::Run { path, what: reason, hint: hint() }
            }
            other => other.into(),
        })
    };
    Ok(Saved { progress, parameters: tensors(PARAMETERS)?, optimizer: tensors(OPTIMIZER)? })
}

/// Where a run stood, and whether the checkpoint's files have digests.
fn read_progress(path: &Path, hint: &str) -> Result<(Progress, bool)> {
    let fail = |what: String, hint: &str| TrainError::Run {
        path: path.to_path_buf(),
        what,
        hint: hint.into(),
    };
    let damaged = |what: String| fail(format!("damaged: {what}"), hint);
    let bytes = still_model::files::read(path).map_err(TrainError::read(path))?;
    let seal = seal::check(&bytes, Kind::Json);
    if seal == Seal::Broken {
        return Err(damaged("its digest is of other bytes than it has".into()));
    }
    let mut json: Value =
        serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    let fields = json.as_object_mut().ok_or_else(|| damaged("no JSON object".into()))?;
    let sealed = match (fields.remove(FORMAT_KEY), fields.remove(seal::KEY)) {
        (None, None) => false,
        (Some(format), Some(_)) if seal == Seal::Whole => {
            if format.as_u64().is_none_or(|format| format > FORMAT) {
                return Err(fail(
                    format!("of format {format}, made by a newer version of still"),
                    "resume with that version, or start a new run",
                ));
            }
            true
        }
        _ => return Err(damaged("its digest is missing".into())),
    };
    let progress = serde_json::from_value(json).map_err(|error| damaged(error.to_string()))?;
    Ok((progress, sealed))
}
