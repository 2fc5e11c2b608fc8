//! A run's directory: whose it is, and whether a run may begin or go on in it.

use std::path::Path;

use candle_core::DType;
use sha2::{Digest, Sha256};
use still_model::files::write_file;
use still_model::{Model, Student};

use crate::checkpoint::{Checkpoints, Saved};
use crate::data::Windows;
use crate::error::{Result, TrainError};
use crate::recipe::Recipe;

use super::differences::differences;

/// The resolved recipe of a run, in its directory.
pub(super) const RECIPE: &str = "recipe.toml";

/// SHA-256 over everything that decides a run.
pub(super) fn fingerprint(model: &Model, recipe: &Recipe, windows: &Windows) -> Result<String> {
    let mut hasher = Sha256::new();
    let json = serde_json::to_string(recipe)
        .map_err(|error| TrainError::Recipe { what: error.to_string(), hint: String::new() })?;
    hasher.update(json);
    hasher.update(windows.sha256());
    if recipe.evaluation.measures_loss() {
        for window in windows.heldout().iter().take(recipe.evaluation.windows) {
            hasher.update((window.len() as u64).to_le_bytes());
            window.ids().iter().for_each(|id| hasher.update(id.to_le_bytes()));
        }
    }
    hasher.update(model.base.sha256()?);
    let decoder = &model.decoder;
    if !decoder.device().is_cpu() {
        hasher.update(format!("on a device in {}", decoder.dtype().as_str()));
    }
    Ok(format!("{:x}", hasher.finalize()))
}

/// The newest checkpoint to go on from, with `resume`; otherwise the certainty that there is none.
pub(super) fn open(
    checkpoints: &Checkpoints,
    run_dir: &Path,
    fingerprint: &str,
    recipe: &Recipe,
    resume: bool,
) -> Result<Option<Saved>> {
    let fail = |what: &str, hint: &str| {
        Err(TrainError::Run { path: run_dir.to_path_buf(), what: what.into(), hint: hint.into() })
    };
    checkpoints.tidy()?;
    if !resume {
        return match checkpoints.list().as_slice() {
            [] => Ok(None),
            _ => fail(
                "holds checkpoints of an earlier run",
                "add --resume to go on with it, choose another run directory, or remove this one to begin again",
            ),
        };
    }
    match checkpoints.latest()? {
        None => fail("there is no checkpoint to resume from", "run once without --resume"),
        Some(saved) if saved.progress.fingerprint != fingerprint => {
            let what = match differences(run_dir, recipe).as_slice() {
                [] => "the run in it has other data, another base, or another kind of device or dtype; its recipe is the same".into(),
                keys => format!("the run in it has another recipe: {}", keys.join("; ")),
            };
            fail(&what, "resume with the same ones, or start a new run elsewhere")
        }
        // Not before the newest is known to be whole: until then it may be an older one that the run goes on from.
        saved => checkpoints.prune().map(|()| saved),
    }
}

/// Writes the resolved recipe.
pub(super) fn write_recipe(run_dir: &Path, recipe: &Recipe) -> Result<()> {
    std::fs::create_dir_all(run_dir).map_err(TrainError::write(run_dir))?;
    let resolved = toml::to_string_pretty(recipe)
        .map_err(|error| TrainError::Recipe { what: error.to_string(), hint: String::new() })?;
    let path = run_dir.join(RECIPE);
    write_file(&path, resolved.as_bytes()).map_err(TrainError::write(&path))
}

/// Most bytes that the checkpoints of a run take at a time, and those of what it learns.
///
/// # Errors
/// A recipe that does not fit the model.
pub fn checkpoint_bytes(model: &Model, recipe: &Recipe) -> Result<(u64, u64)> {
    let still = recipe.attention.resolve(model.config())?;
    let mut student = Student::init(still, model.config(), recipe.attention.init, recipe.seed)?;
    if recipe.finetune.steps > 0 {
        student.add_lora(model.config(), recipe.finetune.lora.clone(), recipe.seed)?;
    }
    let learned = (student.parameters() * DType::F32.size_in_bytes()) as u64;
    // Values and both moments, of those that are kept and the one that is being written.
    let checkpoints =
        (3 * learned).saturating_mul((recipe.checkpoint.keep as u64).saturating_add(1));
    let best = if recipe.evaluation.keep_best { 2 * learned } else { 0 };
    Ok((checkpoints.saturating_add(best), learned))
}
