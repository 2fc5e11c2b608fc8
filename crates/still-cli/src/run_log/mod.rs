//! Reads a run's directory: steps, evaluations, the recipe.
//!
//! Lines are read by what they say, not by the trainer's types, so that runs of other versions can be read too.

mod evaluations;
pub mod lines;
mod steps;

use std::path::{Path, PathBuf};

use anyhow::Context;

pub use evaluations::{Evaluation, TeacherEvaluation, metric_words};
pub use steps::{LayerLoss, StageLog, Step};

use crate::errors::user;
use crate::provenance::Provenance;
use crate::shown::in_shell;
use crate::verdict::Verdict;

/// The log of a run.
#[derive(Debug)]
pub struct RunLog {
    /// The run directory.
    pub dir: PathBuf,
    /// The stages that have steps, in their order.
    pub stages: Vec<StageLog>,
    /// In the order they were done; none if the run does not evaluate.
    pub evaluations: Vec<Evaluation>,
    /// Losses of layers at the end of attention transfer, on the windows of its first step, once the run is there.
    pub layers_at_end: Option<Vec<f64>>,
    /// The resolved recipe: as it is written, and read.
    pub recipe: Option<(String, toml::Table)>,
    /// The student compared with its teacher, once the run is over.
    pub verdict: Option<Verdict>,
    /// What the run's evaluations say of its teacher; none of a run that does not evaluate.
    pub teacher: Option<TeacherEvaluation>,
    /// Every start of the run, with its command and machine; none of runs of older versions.
    pub starts: Vec<Provenance>,
}

impl RunLog {
    /// Reads a run directory. A last line that a kill cut off is left out.
    ///
    /// # Errors
    /// No such directory, no steps in it, or a line that cannot be read; each with what to do.
    pub fn read(dir: &Path) -> anyhow::Result<Self> {
        if dir.is_file() {
            return Err(user(
                format!("{} is a file, not the directory of a run", dir.display()),
                format!(
                    "draw results of `still eval --out` with `still report eval {}`",
                    in_shell(dir)
                ),
            ));
        }
        if !dir.is_dir() {
            return Err(user(
                format!("no directory {}", dir.display()),
                "name the run directory of a `still linearize`: its --out with \".run\" appended, or its --run-dir",
            ));
        }
        let path = dir.join("metrics.jsonl");
        let steps: Vec<Step> = match lines::read(&path)? {
            Some(steps) if !steps.is_empty() => steps,
            Some(_) => {
                return Err(user(
                    format!("{} records no step yet", path.display()),
                    "come back when the run has done its first step",
                ));
            }
            None => {
                return Err(user(
                    format!("{} has no metrics.jsonl", dir.display()),
                    "`still linearize` writes it into its run directory: its --out with \".run\" appended, or its --run-dir",
                ));
            }
        };
        Ok(Self {
            dir: dir.to_path_buf(),
            stages: StageLog::split(steps),
            evaluations: lines::read(&dir.join(evaluations::FILE))?.unwrap_or_default(),
            layers_at_end: layers_at_end(dir),
            recipe: recipe(&dir.join("recipe.toml"))?,
            verdict: Verdict::read(dir)?,
            teacher: TeacherEvaluation::read(dir)?,
            starts: Provenance::starts(dir)?,
        })
    }

    /// Tokens trained on.
    pub fn tokens(&self) -> usize {
        self.stages.iter().map(StageLog::tokens).sum()
    }

    /// First and last transfer loss of every layer; empty if the run has no such stage.
    pub fn layers(&self) -> Vec<LayerLoss> {
        self.stages
            .iter()
            .map(|stage| stage.layers(self.layers_at_end.as_deref()))
            .find(|layers| !layers.is_empty())
            .unwrap_or_default()
    }

    /// The evaluation whose student is the best of the run: the last that was the best when it was made.
    pub fn best(&self) -> Option<&Evaluation> {
        self.evaluations.iter().rfind(|evaluation| evaluation.best)
    }
}

/// `layers.json`. Older runs have none, and what is damaged is as good as none: the steps have losses of layers too.
fn layers_at_end(dir: &Path) -> Option<Vec<f64>> {
    #[derive(serde::Deserialize)]
    struct Layers {
        layer_losses: Vec<f64>,
    }
    let text = still_model::files::read_to_string(&dir.join("layers.json")).ok()?;
    Some(serde_json::from_str::<Layers>(&text).ok()?.layer_losses)
}

fn recipe(path: &Path) -> anyhow::Result<Option<(String, toml::Table)>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = still_model::files::read_to_string(path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let table = text.parse::<toml::Table>().map_err(|error| {
        let what = format!("{}: {}", path.display(), error.to_string().trim_end());
        user(what, "the file is damaged: `still linearize --resume` writes it again")
    })?;
    Ok(Some((text, table)))
}
