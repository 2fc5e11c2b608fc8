//! What a run tells while it goes on.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

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
    /// As in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Transfer => "transfer",
            Self::Finetune => "finetune",
        }
    }
}

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Its stage.
    pub stage: Stage,
    /// Steps of the stage done, this one included.
    pub step: usize,
    /// What the stage minimises: mean squared error per value over the layers' mean, as the recipe weighs it
    /// (transfer), or nats per token (finetune).
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Whether the step was a spike and so was not taken.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Loss of each layer (transfer).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layer_losses: Vec<f64>,
    /// Loss of each layer's linear branch alone, unweighted (transfer with `linear_branch_weight`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub linear_losses: Vec<f64>,
}

/// Told of a run's progress.
pub trait Observer {
    /// Calibration passed so many tokens more, of so many in a phase.
    fn on_calibration(&mut self, phase: Phase, tokens: usize, of: usize) {
        let _ = (phase, tokens, of);
    }

    /// A stage of `steps` steps begins; `done` of them were done in an earlier run.
    fn on_stage(&mut self, stage: Stage, steps: usize, done: usize) {
        let _ = (stage, steps, done);
    }

    /// A step is done.
    fn on_step(&mut self, report: &StepReport) {
        let _ = report;
    }

    /// The student was measured.
    fn on_evaluation(&mut self, evaluation: &Evaluation) {
        let _ = evaluation;
    }

    /// A checkpoint is complete.
    fn on_checkpoint(&mut self, path: &Path) {
        let _ = path;
    }

    /// Asked after each step: whether to save and return.
    fn stop_requested(&self) -> bool {
        false
    }
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// A line of a run's logs: it belongs to a step.
pub(crate) trait Logged: Serialize + DeserializeOwned {
    /// Stage and step.
    fn at(&self) -> (Stage, usize);
}

impl Logged for StepReport {
    fn at(&self) -> (Stage, usize) {
        (self.stage, self.step)
    }
}

/// `metrics.jsonl` or `evaluations.jsonl`: one line per step or evaluation.
#[derive(Debug)]
pub(crate) struct Log<T> {
    file: File,
    path: PathBuf,
    lines: PhantomData<fn(T)>,
}

impl<T: Logged> Log<T> {
    /// Opens the log, keeping the lines of steps up to the one that the run goes on from.
    pub fn open(path: &Path, keep: Option<(Stage, usize)>) -> Result<Self> {
        let mut kept = Vec::new();
        if let (Some(last), Ok(file)) = (keep, File::open(path)) {
            for line in BufReader::new(file).lines() {
                let line = line.map_err(TrainError::read(path))?;
                // A line cut off by a kill is one whose step will be done again.
                let Ok(entry) = serde_json::from_str::<T>(&line) else { continue };
                if entry.at() <= last {
                    kept.extend_from_slice(line.as_bytes());
                    kept.push(b'\n');
                }
            }
        }
        let beside = path.with_extension("jsonl.new");
        std::fs::write(&beside, kept).map_err(TrainError::write(&beside))?;
        std::fs::rename(&beside, path).map_err(TrainError::write(path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::write(path))?;
        Ok(Self { file, path: path.to_path_buf(), lines: PhantomData })
    }

    pub fn write(&mut self, entry: &T) -> Result<()> {
        let mut line = serde_json::to_string(entry)
            .map_err(|error| TrainError::write(&self.path)(std::io::Error::other(error)))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(TrainError::write(&self.path))
    }
}
