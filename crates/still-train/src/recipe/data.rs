//! `[data]`: what is read, and how.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::invalid;
use super::ranges::{as_table, check_ranges};
use crate::error::Result;

/// Most lengths that a recipe may mix.
pub(crate) const MAX_LENGTHS: usize = 8;

/// Whose predictions stage 2 counts in conversations and instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossOn {
    /// Everybody's.
    #[default]
    All,
    /// The assistant's, and what answers an instruction: prompts are masked. Other documents count as a whole.
    Answers,
}

/// How text becomes windows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataRecipe {
    /// Tokens of a window.
    pub length: usize,
    /// Several lengths, increasing, in place of `length`: each step's windows have one of them.
    pub lengths: Vec<usize>,
    /// Steps at each of `lengths`, as shares; the same for all if empty.
    pub length_weights: Vec<f64>,
    /// A curriculum in place of `length_weights`: steps (of both stages) at each of `lengths`, in order. The last goes
    /// on to the end.
    pub length_steps: Vec<usize>,
    /// Documents and their ends shorter than this are left out.
    pub min_length: usize,
    /// Put several short documents into a window, each a sequence of its own.
    pub pack: bool,
    /// Field of a line of `.jsonl` that holds its text; a line without it has `messages`, or `instruction` and `output`.
    pub text_field: String,
    /// Longest line of `.jsonl`, in bytes as they are read (decompressed).
    pub max_line_bytes: usize,
    /// Longest stretch of a text without a place between words at which it can be cut, in bytes: it is tokenized whole, and that
    /// takes some hundred times its size.
    pub max_word_bytes: usize,
    /// `"all"`, or `"answers"`: of conversations, stage 2 counts the assistant's words alone. Attention transfer
    /// counts every position.
    pub loss_on: LossOn,
    /// Tokens read of each file, as shares, in the order of `--data`; as many as there are if empty.
    pub weights: Vec<f64>,
    /// Share of the documents that is held out for evaluation.
    pub heldout: f64,
    /// Files that are held out as a whole.
    pub heldout_files: Vec<PathBuf>,
    /// Most held-out windows that an evaluation reads.
    pub heldout_windows: usize,
}

impl Default for DataRecipe {
    fn default() -> Self {
        Self {
            length: 1024,
            lengths: Vec::new(),
            length_weights: Vec::new(),
            length_steps: Vec::new(),
            min_length: 64,
            pack: false,
            text_field: "text".into(),
            max_line_bytes: 64 << 20,
            max_word_bytes: 4 << 20,
            loss_on: LossOn::All,
            weights: Vec::new(),
            heldout: 0.0,
            heldout_files: Vec::new(),
            heldout_windows: 16,
        }
    }
}

impl DataRecipe {
    /// Every length of window.
    pub fn all_lengths(&self) -> &[usize] {
        if self.lengths.is_empty() { std::slice::from_ref(&self.length) } else { &self.lengths }
    }

    /// Steps at each length of a mix, as shares of 1.
    pub(crate) fn step_shares(&self) -> Vec<f64> {
        let lengths = self.all_lengths().len();
        if self.length_weights.is_empty() {
            return vec![1.0 / lengths as f64; lengths];
        }
        let sum: f64 = self.length_weights.iter().sum();
        self.length_weights.iter().map(|weight| weight / sum).collect()
    }

    /// Checks the ranges, and that the values fit each other.
    pub(crate) fn validate(&self) -> Result<()> {
        let section = [("data".to_owned(), Value::Table(as_table(self)?))];
        check_ranges(&Table::from_iter(section), |_| String::new())?;
        let shortest = self.all_lengths()[0];
        if shortest < self.min_length {
            return Err(invalid(
                format!(
                    "data.length {shortest} and data.min_length {} do not fit",
                    self.min_length
                ),
                "2 <= min_length <= length",
            ));
        }
        if self.lengths.len() > MAX_LENGTHS || !self.lengths.is_sorted_by(|a, b| a < b) {
            return Err(invalid(
                format!("data.lengths {:?}", self.lengths),
                "give at most 8 lengths, each longer than the one before",
            ));
        }
        for (key, count) in [
            ("length_weights", self.length_weights.len()),
            ("length_steps", self.length_steps.len()),
        ] {
            if count != 0 && count != self.lengths.len() {
                return Err(invalid(
                    format!("data.{key} has {count} values, data.lengths {}", self.lengths.len()),
                    "give one for each length",
                ));
            }
        }
        if !self.length_weights.is_empty() && !self.length_steps.is_empty() {
            return Err(invalid(
                "data.length_weights and data.length_steps are both given".into(),
                "lengths are mixed by weights, or follow each other by steps: leave one out",
            ));
        }
        if self.text_field.is_empty() {
            return Err(invalid(
                "data.text_field is empty".into(),
                "name a field, such as \"text\"",
            ));
        }
        let holds_out = self.heldout > 0.0 || !self.heldout_files.is_empty();
        if holds_out && self.heldout_windows == 0 {
            return Err(invalid(
                "data.heldout_windows is 0 although data is held out".into(),
                "use 1 or more",
            ));
        }
        Ok(())
    }
}
