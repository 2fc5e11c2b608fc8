//! What `still calibrate` takes, and what it goes by.

use std::path::PathBuf;

use clap::Args;
use still_train::{CalibrateOptions, CalibrationRecipe};

use crate::args::{TOKENS, share, whole};
use crate::commands::training::{Inputs, TrainingArgs};
use crate::outputs::Existing;

const EXAMPLES: &str = "\
Examples:
  still calibrate --model org/name --data books.jsonl.zst --html budgets.html
  still calibrate --model base --data a.txt --cache-fraction 0.2 --out b.json
  still calibrate --model base --data a.txt --at-length 32768 --json";

/// `still calibrate`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CalibrateArgs {
    /// The teacher, the text and the attention that is calibrated.
    #[command(flatten)]
    training: TrainingArgs,
    /// Bytes to spend, as a share of the dense cache with 16-bit rows [default: 0.2; where layers keep a sliding window, 0.2 of
    /// what the others take, and that window]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    cache_fraction: Option<f64>,
    /// Tokens of context at which that share holds, windows and linear states included
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = whole(1, TOKENS))]
    at_length: usize,
    /// Tokens of text to read
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = whole(1, TOKENS))]
    tokens: usize,
    /// Tokens of a window of text
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = whole(1, TOKENS))]
    window: usize,
    /// Write the budgets here (JSON)
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Draw budgets and what decided them, layer by head, as one HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Replace what exists
    #[arg(long)]
    overwrite: bool,
    /// Print one JSON object with every estimate on stdout instead of the table
    #[arg(long)]
    json: bool,
}

/// What a calibration goes by.
#[derive(Debug)]
pub struct Settings {
    pub inputs: Inputs,
    /// How the text is cut.
    pub calibration: CalibrationRecipe,
    /// Tokens of text to read.
    pub tokens: usize,
    /// The usual one if it is not given.
    pub cache_fraction: Option<f64>,
    pub options: CalibrateOptions,
    pub out: Option<PathBuf>,
    pub html: Option<PathBuf>,
    pub existing: Existing,
    pub json: bool,
}

impl CalibrateArgs {
    /// Reads the recipe.
    ///
    /// # Errors
    /// Data that are no files, a recipe that cannot be used, a device that is not there.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        let inputs = self.training.resolve()?;
        let recipe = &inputs.recipe;
        Ok(Settings {
            calibration: CalibrationRecipe { window: self.window, ..recipe.calibration.clone() },
            tokens: self.tokens,
            cache_fraction: self.cache_fraction,
            options: CalibrateOptions {
                at_length: self.at_length,
                seed: recipe.seed,
                ..CalibrateOptions::default()
            },
            inputs,
            out: self.out,
            html: self.html,
            existing: Existing::overwrite(self.overwrite),
            json: self.json,
        })
    }
}
