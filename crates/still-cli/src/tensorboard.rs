//! TensorBoard event files under `RUN_DIR/tensorboard`: each stage is a run of its own, its steps counted from 1.
//!
//! Every checkpoint ends a file. So a run that goes on from a checkpoint drops whole files, those of the steps that it
//! does again, and no step is there twice.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use still_train::StepReport;

use crate::event_file::EventFile;
use crate::run_log::Evaluation;

/// Writes the events of one run.
pub struct EventLog {
    root: PathBuf,
    /// The stage's directory; none before the first stage.
    stage: Option<PathBuf>,
    file: Option<EventFile<BufWriter<File>>>,
    /// The last step told.
    step: usize,
    /// The step that the last checkpoint holds: the first one beyond it opens a new file.
    saved: usize,
}

impl EventLog {
    /// Nothing is written yet.
    pub fn new(run_dir: &Path) -> Self {
        Self { root: run_dir.join("tensorboard"), stage: None, file: None, step: 0, saved: 0 }
    }

    /// A stage begins behind its step `done`: what was written of later ones is dropped.
    ///
    /// # Errors
    /// A directory or file that cannot be made or removed.
    pub fn stage(&mut self, stage: &str, done: usize) -> io::Result<()> {
        let dir = self.root.join(stage);
        fs::create_dir_all(&dir)?;
        for entry in dir.read_dir()? {
            let path = entry?.path();
            if first_step(&path).is_some_and(|first| first > done) {
                fs::remove_file(path)?;
            }
        }
        (self.stage, self.file, self.step, self.saved) = (Some(dir), None, done, done);
        Ok(())
    }

    /// A step is done.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn step(&mut self, report: &StepReport, tokens_per_s: f64) -> io::Result<()> {
        if report.step > self.saved && self.step <= self.saved {
            self.file = None;
        }
        self.step = report.step;
        let mut scalar = |tag: &str, value| self.scalar(tag, report.step, value);
        scalar("train/loss", report.loss)?;
        scalar("train/lr", report.lr)?;
        scalar("train/grad_norm", report.grad_norm)?;
        scalar("train/tokens_per_s", tokens_per_s)?;
        for (layer, loss) in report.losses_by_layer() {
            scalar(&format!("layer_loss/{layer:02}"), loss)?;
        }
        Ok(())
    }

    /// The student was evaluated.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn evaluation(&mut self, evaluation: &Evaluation) -> io::Result<()> {
        for (name, value) in evaluation.metrics() {
            self.scalar(&format!("evaluation/{name}"), evaluation.step, value)?;
        }
        Ok(())
    }

    /// The last step is saved: later ones go to another file.
    pub fn checkpoint(&mut self) {
        self.saved = self.step;
    }

    fn scalar(&mut self, tag: &str, step: usize, value: f64) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let Some(dir) = &self.stage else { return Ok(()) };
                // Readers take the files of a directory by name: the time goes first.
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let name =
                    format!("events.out.tfevents.{:020}.{:08}", now.as_micros(), self.step.max(1));
                let file = File::create(dir.join(name))?;
                self.file.insert(EventFile::new(BufWriter::new(file))?)
            }
        };
        file.scalar(tag, step, value as f32)
    }
}

/// The first step in an event file of ours.
fn first_step(path: &Path) -> Option<usize> {
    let name = path.file_name()?.to_str()?.strip_prefix("events.out.tfevents.")?;
    name.split_once('.')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(step: usize) -> StepReport {
        let line = serde_json::json!({
            "stage": "transfer", "step": step, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 8,
        });
        serde_json::from_value(line).unwrap()
    }

    /// First steps of the files, and how many files tell of an evaluation.
    fn files(dir: &Path) -> (Vec<usize>, usize) {
        let paths = || dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
        let mut steps: Vec<usize> = paths().filter_map(|path| first_step(&path)).collect();
        steps.sort_unstable();
        let tag = b"evaluation/heldout_nll";
        let tells =
            |path: &PathBuf| fs::read(path).unwrap().windows(tag.len()).any(|window| window == tag);
        (steps, paths().filter(tells).count())
    }

    #[test]
    fn a_file_ends_with_its_checkpoint() {
        let run = tempfile::tempdir().unwrap();
        let dir = run.path().join("tensorboard/transfer");
        let evaluation =
            serde_json::from_str(r#"{"stage":"transfer","step":2,"heldout_nll":3.5}"#).unwrap();
        let mut events = EventLog::new(run.path());
        events.stage("transfer", 0).unwrap();
        events.step(&report(1), 1.0).unwrap();
        events.step(&report(2), 1.0).unwrap();
        events.checkpoint();
        // Made after the checkpoint of its step, it still belongs to that step's file.
        events.evaluation(&evaluation).unwrap();
        events.step(&report(3), 1.0).unwrap();
        assert_eq!(files(&dir), (vec![1, 3], 1));
        // Killed, and resumed from step 2: step 3 comes again.
        let mut events = EventLog::new(run.path());
        events.stage("transfer", 2).unwrap();
        assert_eq!(files(&dir), (vec![1], 1));
        events.step(&report(3), 1.0).unwrap();
        assert_eq!(files(&dir), (vec![1, 3], 1));
    }

    #[test]
    fn files_of_others_stay() {
        let run = tempfile::tempdir().unwrap();
        let dir = run.path().join("tensorboard/transfer");
        fs::create_dir_all(&dir).unwrap();
        for name in ["events.out.tfevents.1700000000.host.12.0", "notes.txt"] {
            fs::write(dir.join(name), "x").unwrap();
        }
        EventLog::new(run.path()).stage("transfer", 0).unwrap();
        assert_eq!(dir.read_dir().unwrap().count(), 2);
    }
}
