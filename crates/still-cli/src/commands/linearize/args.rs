//! Arguments and settings of `still linearize`.

use std::path::PathBuf;

use anyhow::Context;
use candle_core::DType;
use clap::Args;
use still_model::{ExportKind, Model};
use still_train::Budgets;

use crate::args::one_of;
use crate::commands::training::{Inputs, TrainingArgs};
use crate::errors::user;
use crate::printer::Printer;

const EXAMPLES: &str = "\
Examples:
  still linearize --model org/name --data books.jsonl.zst --out my-student
  still linearize --model base --data texts/ more.parquet --out s
  still linearize --model base --data demo --out s --recipe still-long
  still linearize --model base --data a.txt --out s --budgets budgets.json
  still linearize --model base --data a.txt --out s --set transfer.steps=200
  still linearize --model base --data a.txt --out s --dry-run
  still linearize --model base --data a.txt --out s --resume
  still linearize --model base --data a.txt --out s --training-free --delta
  still linearize --model base --data a.txt --out s --training-free --dry-run
  still linearize --model base --data a.txt --out s --device cuda --delta
  still linearize --model base --data a.txt --out s --delta --dtype f16";

/// Dtypes of a student's weights.
const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// `still linearize`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct LinearizeArgs {
    /// The teacher, the data and the recipe.
    #[command(flatten)]
    training: TrainingArgs,
    /// Budgets that `still calibrate --out` wrote, in place of those that the recipe names or finds
    #[arg(long, value_name = "FILE")]
    budgets: Option<PathBuf>,
    /// Where the student is written; must not exist yet
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,
    /// Go on from the newest checkpoint of an interrupted run
    #[arg(long)]
    resume: bool,
    /// Where checkpoints and metrics go [default: OUT with ".run" appended]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Write no TensorBoard event files (they go to the run directory's tensorboard/)
    #[arg(long)]
    no_tensorboard: bool,
    /// Train nothing: find budgets alone, as the recipe says or for the usual share of the dense cache
    #[arg(long, conflicts_with = "resume")]
    training_free: bool,
    /// Do not compare the finished student with its teacher: saves up to a minute
    #[arg(long)]
    no_verdict: bool,
    /// Write only what differs from the base model, which is named and hashed
    #[arg(long)]
    delta: bool,
    /// Weights of a full student; with --delta its learned matrices
    #[arg(long, value_name = "DTYPE", default_value = "f32", value_parser = one_of(&DTYPES, |dtype| dtype.as_str()))]
    dtype: DType,
    /// Replace what is there
    #[arg(long)]
    overwrite: bool,
    /// Say what would be trained and read, and what memory and time it would take; write nothing
    #[arg(long, conflicts_with_all = ["resume", "overwrite"])]
    dry_run: bool,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// What a run goes by.
#[derive(Debug)]
pub struct Settings {
    pub inputs: Inputs,
    /// The file that the recipe's budgets are from, if one was named.
    pub budgets: Option<PathBuf>,
    pub out: PathBuf,
    /// As it was asked for.
    pub run_dir: Option<PathBuf>,
    pub resume: bool,
    pub overwrite: bool,
    pub dry_run: bool,
    pub training_free: bool,
    pub tensorboard: bool,
    pub kind: ExportKind,
    pub verdict: bool,
    pub json: bool,
}

impl LinearizeArgs {
    /// Reads the recipe.
    ///
    /// # Errors
    /// Data that are no files, a recipe that cannot be used, a device that is not there.
    pub fn resolve(self, printer: &Printer) -> anyhow::Result<Settings> {
        let mut inputs = self.training.resolve(printer)?;
        if let Some(budgets) = &self.budgets {
            let recipe = &mut inputs.recipe;
            let plain = recipe.attention.without_calibration();
            recipe.attention = Budgets::read(budgets)?
                .apply(&plain)
                .with_context(|| format!("--budgets {}", budgets.display()))?;
            recipe.calibration.cache_fraction = None;
        }
        Ok(Settings {
            inputs,
            budgets: self.budgets,
            out: self.out,
            run_dir: self.run_dir,
            resume: self.resume,
            overwrite: self.overwrite,
            dry_run: self.dry_run,
            tensorboard: !self.no_tensorboard,
            training_free: self.training_free,
            kind: match (self.delta, self.dtype) {
                (false, dtype) => ExportKind::Full(dtype),
                (true, DType::F32) => ExportKind::Delta,
                (true, dtype) => ExportKind::DeltaIn(dtype),
            },
            verdict: !self.no_verdict,
            json: self.json,
        })
    }
}

impl Settings {
    /// Loads the teacher.
    ///
    /// # Errors
    /// A model that cannot be loaded, is a student, or is not the one that the budgets of `--budgets` are of.
    pub fn load(&self, printer: &Printer) -> anyhow::Result<Model> {
        let model = self.inputs.load("linearize", printer)?;
        if let Some(budgets) = &self.budgets
            && let Err(error) = self.inputs.recipe.attention.resolve(model.config())
        {
            return Err(user(
                format!(
                    "--budgets {} does not fit {}: {error}",
                    budgets.display(),
                    self.inputs.model
                ),
                "name budgets of this model: `still calibrate --out` writes them",
            ));
        }
        Ok(model)
    }
}
