//! Arguments and settings of `still calibrate`.

use std::path::PathBuf;

use clap::Args;
use still_attention::RowDtype;
use still_train::CalibrationRecipe;

use crate::args::{COUNT, TOKENS, one_of, share, whole};
use crate::commands::training::{Inputs, TrainingArgs};
use crate::outputs::Existing;
use crate::printer::Printer;

const EXAMPLES: &str = "\
Examples:
  still calibrate --model org/name --data books.jsonl.zst --html budgets.html
  still calibrate --model base --data a.txt --cache-fraction 0.2 --out b.json
  still calibrate --model base --data a.txt --cache-fraction 0.1 --rows int8
  still calibrate --model base --data a.txt --at-length 32768 --json";

/// `still calibrate`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CalibrateArgs {
    /// The teacher, the text and the attention that is calibrated.
    #[command(flatten)]
    training: TrainingArgs,
    /// Bytes to spend, as a share of the dense cache with 16-bit rows [default: the recipe's; else 0.2 and, where layers keep a
    /// sliding window, 0.2 of what the others take, and that window]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    cache_fraction: Option<f64>,
    /// How the student will store exact rows: they are counted so [default: the recipe's attention.rows, else bf16]
    #[arg(long, value_name = "FORMAT", value_parser = one_of(&RowDtype::ALL, RowDtype::name))]
    rows: Option<RowDtype>,
    /// Tokens of context at which that share holds, windows and linear states included [default: the recipe's, else 8192]
    #[arg(long, value_name = "N", value_parser = whole(1, TOKENS))]
    at_length: Option<usize>,
    /// Tokens of text to read [default: the recipe's, else 65536]
    #[arg(long, value_name = "N", value_parser = whole(1, TOKENS))]
    tokens: Option<usize>,
    /// Tokens of a window of text [default: the recipe's, else 2048]
    #[arg(long, value_name = "N", value_parser = whole(1, TOKENS))]
    window: Option<usize>,
    /// Pass keys to ask an untrained student of each share for; 0 asks for none
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = whole(0, COUNT))]
    keys: usize,
    /// Write the budgets here (JSON)
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Draw budgets and what decided them, layer by head, as one HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Replace what is there
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
    /// The recipe's, with what options say in its place.
    pub calibration: CalibrationRecipe,
    /// Pass keys to ask for at each share.
    pub keys: usize,
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
    pub fn resolve(self, printer: &Printer) -> anyhow::Result<Settings> {
        let mut inputs = self.training.resolve(printer)?;
        let recipe = &mut inputs.recipe;
        recipe.attention.rows = self.rows.or(recipe.attention.rows);
        let own = &recipe.calibration;
        Ok(Settings {
            calibration: CalibrationRecipe {
                cache_fraction: self.cache_fraction.or(own.cache_fraction),
                at_length: self.at_length.unwrap_or(own.at_length),
                tokens: self.tokens.unwrap_or(own.tokens),
                window: self.window.unwrap_or(own.window),
            },
            inputs,
            keys: self.keys,
            out: self.out,
            html: self.html,
            existing: Existing::overwrite(self.overwrite),
            json: self.json,
        })
    }
}
