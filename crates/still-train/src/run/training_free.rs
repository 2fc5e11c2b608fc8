//! A student without training: calibrated budgets, everything learned as it starts.

use std::path::PathBuf;

use still_model::{Model, Student};

use super::{RunDir, directory};
use crate::calibrate::calibrated_recipe;
use crate::data::TokenCache;
use crate::error::Result;
use crate::metrics::Observer;
use crate::recipe::Recipe;

/// The model with a student whose budgets are calibrated as the recipe says, or to the
/// [usual share](crate::CalibrateOptions::usual_cache_fraction), and which nothing is trained of. Budgets that the recipe has are kept.
///
/// `run_dir` receives `recipe.toml`, whose stages have no steps, and `budgets.json`.
///
/// # Errors
/// As [`calibrate`](crate::calibrate); a run directory that cannot be written.
pub fn training_free(
    model: &Model,
    recipe: &Recipe,
    data: &[PathBuf],
    cache: &TokenCache,
    run_dir: &RunDir,
    observer: &mut dyn Observer,
) -> Result<Model> {
    let recipe = recipe.training_free(model.config())?;
    let recipe = calibrated_recipe(model, &recipe, data, cache, run_dir.path(), observer)?;
    directory::write_recipe(run_dir.path(), &recipe)?;
    let still = recipe.attention.resolve(model.config())?;
    let student = Student::init(still, model.config(), recipe.attention.init, recipe.seed)?;
    let mut student = student.to_device(model.device())?;
    student.recipe = serde_json::to_value(&recipe).ok();
    Ok(model.with_student(student))
}
