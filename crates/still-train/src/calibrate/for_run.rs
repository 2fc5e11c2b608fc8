//! Calibration as the first step of a run.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use still_model::Model;

use super::{Budgets, calibrate};
use crate::data::{TokenCache, Windows};
use crate::error::{Result, TrainError};
use crate::metrics::Observer;
use crate::recipe::Recipe;

/// The recipe with calibrated budgets, if it asks for them: found now on the run's own data or, if the run was begun
/// before, by it. They are kept in `RUN_DIR/budgets.json`.
///
/// # Errors
/// As [`calibrate`] and [`Windows::read`]; a file that cannot be read or written.
pub fn calibrated_recipe(
    model: &Model,
    recipe: &Recipe,
    data: &[PathBuf],
    cache: &TokenCache,
    run_dir: &Path,
    observer: &mut dyn Observer,
) -> Result<Recipe> {
    let Some(options) = recipe.calibration.options(recipe.seed) else {
        return Ok(recipe.clone());
    };
    let path = run_dir.join("budgets.json");
    let wanted = |known: &Budgets| {
        known.cache_fraction == options.cache_fraction
            && known.at_length == options.at_length
            && known.router == recipe.attention.router
    };
    let known = if path.exists() { Some(Budgets::read(&path)?) } else { None };
    let budgets = match known.filter(wanted) {
        Some(budgets) => budgets,
        None => {
            let text = recipe.calibration.text(&recipe.data);
            let text = Windows::read(data, &model.tokenizer, &text, recipe.seed, cache)?
                .first_tokens(recipe.calibration.tokens);
            let windows: Vec<&[u32]> = text.iter().map(Vec::as_slice).collect();
            let observer = RefCell::new(observer);
            let found =
                calibrate(model, &recipe.attention, &windows, &options, &|phase, n, of| {
                    observer.borrow_mut().on_calibration(phase, n, of);
                })?;
            std::fs::create_dir_all(run_dir).map_err(TrainError::write(run_dir))?;
            found.budgets.save(&path)?;
            found.budgets
        }
    };
    Ok(Recipe { attention: budgets.apply(&recipe.attention)?, ..recipe.clone() })
}
