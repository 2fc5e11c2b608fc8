//! Calibration as the first step of a run.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use blake3::Hasher;
use serde::Serialize;
use still_model::Model;

use super::{Budgets, CalibrateOptions, calibrate, fail};
use crate::data::{TokenCache, Windows};
use crate::error::{Result, TrainError};
use crate::metrics::Observer;
use crate::recipe::{AttentionRecipe, Recipe};

/// The recipe with calibrated budgets, if it asks for them: found now on the run's own data or, if the run was begun
/// before, by it. They are kept in `RUN_DIR/budgets.json`, with the digest of all that decides them, and found again (which is told)
/// if that differs.
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
    let text = recipe.calibration.text(&recipe.data);
    let text = Windows::read(data, &model.tokenizer, &text, recipe.seed, cache)?
        .first_tokens(recipe.calibration.tokens);
    let inputs = Inputs::new(model, &recipe.attention, &text, &options)?;
    let budgets = match known(&path, &inputs) {
        Some(budgets) => budgets,
        None => {
            let windows: Vec<&[u32]> = text.iter().map(Vec::as_slice).collect();
            let observer = RefCell::new(observer);
            let found =
                calibrate(model, &recipe.attention, &windows, &options, &|phase, n, of| {
                    observer.borrow_mut().on_calibration(phase, n, of);
                })?;
            std::fs::create_dir_all(run_dir).map_err(TrainError::write(run_dir))?;
            let fingerprint = Some(inputs.fingerprint(&found.budgets)?);
            let budgets = Budgets { fingerprint, ..found.budgets };
            budgets.save(&path)?;
            budgets
        }
    };
    Ok(Recipe { attention: budgets.apply(&recipe.attention)?, ..recipe.clone() })
}

/// The budgets in a run's directory, if they are those that these inputs give.
fn known(path: &Path, inputs: &Inputs) -> Option<Budgets> {
    if !path.exists() {
        return None;
    }
    let again = |why: &str| {
        tracing::warn!("{} {why}: calibrating again", path.display());
        None
    };
    let Ok(budgets) = Budgets::read(path) else { return again("is damaged") };
    match &budgets.fingerprint {
        None => again("does not say what it was found for"),
        Some(known) if inputs.fingerprint(&budgets).is_ok_and(|own| own == *known) => Some(budgets),
        Some(_) => again("was found for another model, recipe or text, or was changed"),
    }
}

/// All that decides budgets.
struct Inputs(Hasher);

impl Inputs {
    fn new(
        model: &Model,
        attention: &AttentionRecipe,
        text: &[Vec<u32>],
        options: &CalibrateOptions,
    ) -> Result<Self> {
        let mut hasher = Hasher::new();
        let attention = AttentionRecipe { budget: 0, ..attention.without_calibration() };
        let decoder = &model.decoder;
        let dtype = (!decoder.device().is_cpu()).then(|| decoder.dtype().as_str());
        // The options in their debug form: a new one makes old budgets others.
        let what = format!(
            "{}\n{}\n{}\n{options:?}\n{dtype:?}\n",
            model.base.sha256()?,
            model.config().to_hf_json(),
            json(&attention)?,
        );
        hasher.update(what.as_bytes());
        for window in text {
            hasher.update(&(window.len() as u64).to_le_bytes());
            window.iter().for_each(|id| {
                hasher.update(&id.to_le_bytes());
            });
        }
        Ok(Self(hasher))
    }

    /// Of the budgets too, so that no others can be put in their place.
    fn fingerprint(&self, budgets: &Budgets) -> Result<String> {
        let mut hasher = self.0.clone();
        // Integers: a fraction may be read back by a digit less.
        let found = (budgets.chunk, &budgets.budgets, &budgets.key_exponents);
        hasher.update(json(&found)?.as_bytes());
        Ok(hasher.finalize().to_hex().to_string())
    }
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| fail(error.to_string(), "report this"))
}
