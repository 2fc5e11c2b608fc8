//! `budgets.json`, the file of a calibration.

use std::path::Path;

use serde::{Deserialize, Serialize};
use still_attention::{KeyExponents, Router, RowDtype, SelectionHead};
use still_model::files::{read_to_string, write_file};

use super::fail;
use crate::error::{Result, TrainError};
use crate::recipe::AttentionRecipe;

/// Budgets by head, and the configuration that they were found for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Budgets {
    /// Tokens of a chunk.
    pub chunk: usize,
    /// `[layer][selection head]`, of each chunk.
    pub budgets: Vec<Vec<usize>>,
    /// The share of the dense cache's bytes that calibration was to spend.
    pub cache_fraction: f64,
    /// Context in tokens at which that share holds.
    pub at_length: usize,
    /// Where routing is decided.
    #[serde(default)]
    pub selection_head: SelectionHead,
    /// The router that the losses were found with.
    #[serde(default)]
    pub router: Router,
    /// Dtype of the rows whose bytes were counted.
    #[serde(default)]
    pub rows: RowDtype,
    /// By how much coded keys are scaled, `[layer][KV head]`; empty in files of earlier programs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub key_exponents: Vec<Vec<KeyExponents>>,
    /// In a run's directory: the digest of the inputs that they were found from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

impl Budgets {
    /// Reads a file written by [`Budgets::save`].
    ///
    /// # Errors
    /// A file that is missing or of another form.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_to_string(path).map_err(TrainError::read(path))?;
        serde_json::from_str(&text).map_err(|error| {
            fail(
                format!("{}: {error}", path.display()),
                "make the file with `still calibrate --out`",
            )
        })
    }

    /// Writes the file, under a temporary name first, then renamed.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self)
            .map_err(|error| TrainError::write(path)(std::io::Error::other(error)))?;
        write_file(path, (text + "\n").as_bytes()).map_err(TrainError::write(path))
    }

    /// The attention of `recipe` with these budgets, their dtype of rows and their key exponents.
    ///
    /// # Errors
    /// A recipe with another chunk, selection head or dtype of rows, or with budgets or key exponents of its own.
    pub fn apply(&self, recipe: &AttentionRecipe) -> Result<AttentionRecipe> {
        if recipe.chunk != self.chunk || recipe.selection_head != self.selection_head {
            return Err(fail(
                format!(
                    "calibrated for chunks of {} and {:?}, the recipe has chunks of {} and {:?}",
                    self.chunk, self.selection_head, recipe.chunk, recipe.selection_head
                ),
                "calibrate again with this recipe",
            ));
        }
        if recipe.budgets.is_some() {
            return Err(fail(
                "the recipe has attention.budgets of its own".into(),
                "remove them, or do not name calibrated ones",
            ));
        }
        if !recipe.key_exponents.is_empty() {
            return Err(fail(
                "the recipe has attention.key_exponents of its own".into(),
                "remove them, or do not name calibrated budgets",
            ));
        }
        if let Some(rows) = recipe.rows.filter(|&rows| rows != self.rows) {
            return Err(fail(
                format!("calibrated for rows in {}, the recipe has rows in {rows}", self.rows),
                "calibrate again with this recipe, or leave attention.rows out",
            ));
        }
        // Rows in bf16 are what a student without any has.
        let rows = recipe.rows.or((self.rows != RowDtype::default()).then_some(self.rows));
        let (budgets, key_exponents) = (Some(self.budgets.clone()), self.key_exponents.clone());
        Ok(AttentionRecipe { budgets, rows, key_exponents, ..recipe.clone() })
    }
}
