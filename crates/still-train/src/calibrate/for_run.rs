//! Calibration as the first step of a run.

use std::path::Path;

use still_model::Model;

use super::{Budgets, Phase, calibrate};
use crate::error::{Result, TrainError};
use crate::recipe::Recipe;

/// The recipe with budgets, found now or, if the run was begun before, by it: `RUN_DIR/budgets.json`.
///
/// `text` gives windows of so many tokens, so many tokens in all; `progress` is told of each phase's tokens.
///
/// # Errors
/// As [`calibrate`]; a file that cannot be read or written.
pub(crate) fn calibrated(
    model: &Model,
    recipe: &Recipe,
    text: impl FnOnce(usize, usize) -> Result<Vec<Vec<u32>>>,
    run_dir: &Path,
    progress: &dyn Fn(Phase, usize),
) -> Result<Recipe> {
    let Some(options) = recipe.calibration.options(recipe.seed) else {
        return Ok(recipe.clone());
    };
    let path = run_dir.join("budgets.json");
    let known = if path.exists() {
        let known = Budgets::read(&path)?;
        let same = known.cache_fraction == options.cache_fraction
            && known.at_length == options.at_length
            && known.router == recipe.attention.router;
        same.then_some(known)
    } else {
        None
    };
    let budgets = match known {
        Some(budgets) => budgets,
        None => {
            let text = text(recipe.calibration.window, recipe.calibration.tokens)?;
            let windows: Vec<&[u32]> = text.iter().map(Vec::as_slice).collect();
            let found = calibrate(model, &recipe.attention, &windows, &options, progress)?;
            std::fs::create_dir_all(run_dir).map_err(TrainError::write(run_dir))?;
            found.budgets.save(&path)?;
            found.budgets
        }
    };
    Ok(Recipe { attention: budgets.apply(&recipe.attention)?, ..recipe.clone() })
}
