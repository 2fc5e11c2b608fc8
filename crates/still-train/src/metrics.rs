//! Reports of a run while it trains: steps, evaluations, progress.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use still_model::files::write_file;

use crate::calibrate::Phase;
use crate::error::{Result, TrainError};
use crate::evaluation::Evaluation;

/// A stage of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Attention transfer.
    Transfer,
    /// Low-rank finetuning.
    Finetune,
}

impl Stage {
    /// Both stages, in the order of a run.
    pub const ALL: [Self; 2] = [Self::Transfer, Self::Finetune];

    /// The name in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Transfer => "transfer",
            Self::Finetune => "finetune",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Stage {
    type Err = TrainError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|stage| stage.name() == name).ok_or_else(|| TrainError::Recipe {
            what: format!("no stage is called {name:?}"),
            hint: format!("use {}", Self::ALL.map(Self::name).join(" or ")),
        })
    }
}

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Its stage.
    pub stage: Stage,
    /// Number of the step within its stage, from 1.
    pub step: usize,
    /// The loss. Transfer: mean squared error per value, averaged over layers and weighted as the recipe says. Finetune: nats a
    /// token.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Whether the step was skipped because it was a spike.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Numbers of the layers that learn, bottom first (transfer). Absent if all layers learn.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<usize>,
    /// Loss of each layer that learns, bottom first (transfer).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layer_losses: Vec<f64>,
    /// Loss of each layer's linear branch alone, unweighted (transfer with `linear_branch_weight`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub linear_losses: Vec<f64>,
}

impl StepReport {
    /// The number and the loss of each layer that learns.
    pub fn losses_by_layer(&self) -> impl Iterator<Item = (usize, f64)> {
        let number = |n| self.layers.get(n).copied().unwrap_or(n);
        self.layer_losses.iter().enumerate().map(move |(n, &loss)| (number(n), loss))
    }
}

const LAYERS: &str = "layers.json";

/// `layers.json`: losses of the layers at the end of attention transfer, on the windows of its first step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct LayerLosses {
    /// As [`StepReport::layers`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<usize>,
    /// As [`StepReport::layer_losses`].
    pub layer_losses: Vec<f64>,
}

impl LayerLosses {
    /// Removes the file of an earlier run.
    pub fn forget(run_dir: &Path) -> Result<()> {
        let path = run_dir.join(LAYERS);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(TrainError::write(&path)(error))
            }
            _ => Ok(()),
        }
    }

    pub fn write(&self, run_dir: &Path) -> Result<()> {
        let path = run_dir.join(LAYERS);
        let json = serde_json::to_string(self)
            .map_err(|error| TrainError::write(&path)(std::io::Error::other(error)))?;
        write_file(&path, format!("{json}\n").as_bytes()).map_err(TrainError::write(&path))
    }
}

/// A callback at the end of each item of an evaluation. Several threads call it.
pub type OnItem = Box<dyn Fn() + Send + Sync>;

/// Receives a run's progress.
pub trait Observer {
    /// Calibration has processed `tokens` more of the phase's `of` tokens. A phase begins with `tokens = 0`.
    fn on_calibration(&mut self, phase: Phase, tokens: usize, of: usize) {
        let _ = (phase, tokens, of);
    }

    /// A stage of `steps` steps begins. A resumed run has `done` of them behind it.
    fn on_stage(&mut self, stage: Stage, steps: usize, done: usize) {
        let _ = (stage, steps, done);
    }

    /// A step is done.
    fn on_step(&mut self, report: &StepReport) {
        let _ = report;
    }

    /// The measurement of the teacher begins, over as many items as the student's. Returns the callback for each item's end.
    fn on_teacher(&mut self, items: usize) -> OnItem {
        let _ = items;
        Box::new(|| {})
    }

    /// An evaluation of the student begins, over `items` items. [`Observer::on_evaluation`] ends it.
    fn on_evaluation_begin(&mut self, stage: Stage, step: usize, items: usize) -> OnItem {
        let _ = (stage, step, items);
        Box::new(|| {})
    }

    /// An evaluation of the student is done.
    fn on_evaluation(&mut self, evaluation: &Evaluation) {
        let _ = evaluation;
    }

    /// A checkpoint is complete.
    fn on_checkpoint(&mut self, path: &Path) {
        let _ = path;
    }

    /// Whether to save and return. The run asks after each step.
    fn stop_requested(&self) -> bool {
        false
    }
}

/// An observer that ignores everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// A line of a run's log.
pub(crate) trait Logged: Serialize + DeserializeOwned {
    /// Stage and step.
    fn at(&self) -> (Stage, usize);
}

impl Logged for StepReport {
    fn at(&self) -> (Stage, usize) {
        (self.stage, self.step)
    }
}

/// A log's length at a checkpoint, and the digest (BLAKE3) of its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LogMark {
    bytes: u64,
    blake3: String,
}

/// `metrics.jsonl` or `evaluations.jsonl`: one line per step or evaluation.
#[derive(Debug)]
pub(crate) struct Log<T> {
    file: File,
    path: PathBuf,
    /// Digest of the file's content.
    hasher: blake3::Hasher,
    lines: PhantomData<fn(T)>,
}

impl<T: Logged> Log<T> {
    /// Opens the log and keeps the lines up to the step that the run resumes from. They must match the `mark` of that step's
    /// checkpoint, if it has one.
    pub fn open(path: &Path, keep: Option<(Stage, usize)>, mark: Option<&LogMark>) -> Result<Self> {
        let mut kept = Vec::new();
        if let (Some(last), Some(before)) = (keep, read_if_there(path)?) {
            if let Some(mark) = mark {
                check(path, &before, mark)?;
            }
            for line in before.split(|&byte| byte == b'\n') {
                // A line cut off by a kill is one whose step will be done again.
                let Ok(entry) = serde_json::from_slice::<T>(line) else { continue };
                if entry.at() <= last {
                    kept.extend_from_slice(line);
                    kept.push(b'\n');
                }
            }
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&kept);
        write_file(path, &kept).map_err(TrainError::write(path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::write(path))?;
        Ok(Self { file, path: path.to_path_buf(), hasher, lines: PhantomData })
    }

    pub fn write(&mut self, entry: &T) -> Result<()> {
        let mut line = serde_json::to_string(entry)
            .map_err(|error| TrainError::write(&self.path)(std::io::Error::other(error)))?;
        line.push('\n');
        self.hasher.update(line.as_bytes());
        self.file.write_all(line.as_bytes()).map_err(TrainError::write(&self.path))
    }

    /// Syncs the log to the disk and returns its mark.
    pub fn mark(&self) -> Result<LogMark> {
        self.file.sync_data().map_err(TrainError::write(&self.path))?;
        let blake3 = self.hasher.finalize().to_hex().to_string();
        Ok(LogMark { bytes: self.hasher.count(), blake3 })
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TrainError::read(path)(error)),
    }
}

/// Checks that a log begins with the content that a checkpoint recorded.
fn check(path: &Path, bytes: &[u8], mark: &LogMark) -> Result<()> {
    let known = usize::try_from(mark.bytes).ok().and_then(|count| bytes.get(..count));
    if known.is_some_and(|known| blake3::hash(known).to_hex().as_str() == mark.blake3) {
        return Ok(());
    }
    Err(TrainError::Run {
        path: path.to_path_buf(),
        what: "damaged: it does not begin with what it held when the checkpoint was saved".into(),
        hint: format!(
            "restore it, or remove {} to go on without the log of the steps before",
            path.display()
        ),
    })
}
