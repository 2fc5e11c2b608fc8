//! `[calibration]`: budgets found before training.

use serde::{Deserialize, Serialize};

use super::DataRecipe;
use crate::calibrate::CalibrateOptions;

/// How budgets are found before training; nothing is done without a `cache_fraction`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CalibrationRecipe {
    /// Bytes to spend, as a share of the dense cache with 16-bit rows, the student's own counted as `attention.rows` says; `attention.budget` holds everywhere if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_fraction: Option<f64>,
    /// Tokens of context at which that share holds.
    pub at_length: usize,
    /// Tokens of text to find the losses with.
    pub tokens: usize,
    /// Tokens of a window of that text.
    pub window: usize,
}

impl Default for CalibrationRecipe {
    fn default() -> Self {
        let options = CalibrateOptions::default();
        Self { cache_fraction: None, at_length: options.at_length, tokens: 65_536, window: 2048 }
    }
}

impl CalibrationRecipe {
    /// What to calibrate for, if anything.
    pub fn options(&self, seed: u64) -> Option<CalibrateOptions> {
        Some(self.options_at(self.cache_fraction?, seed))
    }

    /// What to calibrate for with a share that the recipe may not have.
    pub fn options_at(&self, cache_fraction: f64, seed: u64) -> CalibrateOptions {
        let at_length = self.at_length;
        CalibrateOptions { cache_fraction, at_length, seed, ..CalibrateOptions::default() }
    }

    /// How text becomes the windows to calibrate on: long ones, each of one document.
    pub fn text(&self, data: &DataRecipe) -> DataRecipe {
        DataRecipe {
            length: self.window,
            lengths: Vec::new(),
            length_weights: Vec::new(),
            length_steps: Vec::new(),
            min_length: data.min_length.min(self.window),
            pack: false,
            ..data.clone()
        }
    }
}
