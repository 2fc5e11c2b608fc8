//! A run's directory: whose it is, and whether a run may begin or go on in it.

use std::path::Path;

use sha2::{Digest, Sha256};
use still_model::Model;
use still_model::files::write_file;

use crate::checkpoint::{Checkpoints, Saved};
use crate::data::Windows;
use crate::error::{Result, TrainError};
use crate::recipe::Recipe;

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
                "add --resume to go on with it, or choose another run directory",
            ),
        };
    }
    match checkpoints.latest()? {
        None => fail("there is no checkpoint to resume from", "run once without --resume"),
        Some(saved) if saved.progress.fingerprint != fingerprint => fail(
            "the run in it has another recipe, other data, another base, or another kind of device or dtype",
            "resume with the same ones, or start a new run elsewhere",
        ),
        saved => Ok(saved),
    }
}

/// Writes the resolved recipe.
pub(super) fn write_recipe(run_dir: &Path, recipe: &Recipe) -> Result<()> {
    std::fs::create_dir_all(run_dir).map_err(TrainError::write(run_dir))?;
    let resolved = toml::to_string_pretty(recipe)
        .map_err(|error| TrainError::Recipe { what: error.to_string(), hint: String::new() })?;
    let path = run_dir.join("recipe.toml");
    write_file(&path, resolved.as_bytes()).map_err(TrainError::write(&path))
}
