//! A whole run: both stages over text files, with evaluations and checkpoints.

mod claim;
mod differences;
mod directory;
mod training_free;
mod training_loop;
mod watch;

use std::path::{Path, PathBuf};

use still_model::{Model, Student};

use crate::calibrate::calibrated_recipe;
use crate::checkpoint::{Checkpoints, Saved};
use crate::data::{Position, TokenCache, Windows};
use crate::error::Result;
use crate::evaluation::Evaluator;
use crate::finetune::FinetuneStage;
use crate::fits;
use crate::metrics::{Log, Observer, Stage};
use crate::recipe::Recipe;
use crate::transfer::TransferStage;
pub use claim::RunDir;
pub use directory::checkpoint_bytes;
pub use training_free::training_free;
use training_loop::Run;
pub(crate) use training_loop::TrainingStage;
pub(crate) use watch::Watch;

/// Linearizes a model: attention transfer, then low-rank finetuning. Returns the model with the trained student, low-rank updates
/// unmerged: the last student or, with `evaluation.keep_best`, the one with the lowest held-out loss.
///
/// All computation runs on the model's device, in its dtype. Learned tensors are f32, on the same device.
///
/// `run_dir` receives `recipe.toml`, `metrics.jsonl`, `evaluations.jsonl`, [`TEACHER_FILE`](crate::TEACHER_FILE), `layers.json` and
/// `checkpoints/`. With `resume`, the run in that directory continues, bit for bit as if it had never stopped (on the same machine,
/// device and dtype, with the same number of threads).
///
/// # Errors
/// An invalid recipe, data or run directory; a loss that is not a number. After saving a checkpoint:
/// [`TrainError::Diverged`](crate::TrainError::Diverged), and [`TrainError::Interrupted`](crate::TrainError::Interrupted) if the
/// observer asked to stop.
pub fn linearize(
    model: &Model,
    recipe: &Recipe,
    data: &[PathBuf],
    run_dir: &Path,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Model> {
    let run_dir = RunDir::claim(run_dir, resume)?;
    let cache = TokenCache::user()?;
    let recipe = calibrated_recipe(model, recipe, data, &cache, run_dir.path(), observer)?;
    let windows = Windows::read(data, &model.tokenizer, &recipe.data, recipe.seed, &cache)?;
    linearize_in(model, &recipe, &windows, &run_dir, resume, observer)
}

/// [`linearize`] over tokenized windows, with the recipe's own budgets. Evaluations read the held-out windows.
///
/// # Errors
/// As [`linearize`].
pub fn linearize_windows(
    model: &Model,
    recipe: &Recipe,
    windows: &Windows,
    run_dir: &Path,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Model> {
    linearize_in(model, recipe, windows, &RunDir::claim(run_dir, resume)?, resume, observer)
}

/// [`linearize_windows`] in a directory that the caller has claimed.
///
/// # Errors
/// As [`linearize`].
pub fn linearize_in(
    model: &Model,
    recipe: &Recipe,
    windows: &Windows,
    run_dir: &RunDir,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Model> {
    recipe.validate()?;
    let run_dir = run_dir.path();
    let still = recipe.attention.resolve(model.config())?;
    let initial = Student::init(still, model.config(), recipe.attention.init, recipe.seed)?;
    fits::check(model, &initial, recipe, windows)?;
    let evaluator = match recipe.evaluation.every {
        0 => None,
        _ => Some(Evaluator::new(&recipe.evaluation, windows.heldout(), model, recipe.seed)?),
    };

    let checkpoints = Checkpoints::new(run_dir, recipe.checkpoint.keep);
    let fingerprint = directory::fingerprint(model, recipe, windows)?;
    let mut saved = directory::open(&checkpoints, run_dir, &fingerprint, recipe, resume)?;
    directory::write_recipe(run_dir, recipe)?;
    if let Some(evaluator) = &evaluator {
        evaluator.measure_teacher(model, run_dir, resume, observer)?;
    }

    let reached = saved.as_ref().map(|saved| (saved.progress.stage, saved.progress.step));
    let logs = saved.as_ref().map(|saved| saved.progress.logs.clone()).unwrap_or_default();
    let log = |name: &str| run_dir.join(name);
    let mut run = Run {
        model,
        recipe,
        windows,
        run_dir,
        checkpoints,
        fingerprint,
        metrics: Log::open(&log("metrics.jsonl"), reached, logs.metrics.as_ref())?,
        evaluations: Log::open(&log("evaluations.jsonl"), reached, logs.evaluations.as_ref())?,
        evaluator,
        position: saved.as_ref().map_or_else(Position::default, |saved| saved.progress.position),
        watch: saved.as_ref().map_or_else(Watch::default, |saved| saved.progress.watch),
        observer,
    };

    // What a stage leaves alone is as the stage before left it: take it from the checkpoint too.
    let mut student = match &saved {
        Some(saved) => with_saved_values(&initial, saved)?,
        None => initial.clone(),
    };
    let in_finetune = reached.is_some_and(|(stage, _)| stage == Stage::Finetune);
    if recipe.transfer.steps > 0 && !in_finetune {
        let stage = TransferStage::new(model, &student, &recipe.transfer)?;
        let mut stage = stage.with_guard(&recipe.guard);
        run.stage(Stage::Transfer, &mut stage, saved.take())?;
        student = stage.student()?;
    }
    if recipe.finetune.steps > 0 {
        let stage = FinetuneStage::new(model, &student, &recipe.finetune, recipe.seed)?;
        let mut stage = stage.with_guard(&recipe.guard);
        run.stage(Stage::Finetune, &mut stage, saved.take())?;
        student = stage.student()?;
    }
    if recipe.evaluation.keep_best
        && let Some(best) = run.checkpoints.best()?
    {
        student = initial;
        if best.progress.stage == Stage::Finetune {
            student.add_lora(model.config(), recipe.finetune.lora.clone(), recipe.seed)?;
        }
        student = with_saved_values(&student, &best)?;
    }
    // What a checkpoint gave, or no stage had, is on the CPU yet.
    student = student.to_device(model.device())?;
    student.recipe = serde_json::to_value(recipe).ok();
    Ok(model.with_student(student))
}

/// The student with a checkpoint's tensors.
fn with_saved_values(student: &Student, saved: &Saved) -> Result<Student> {
    Ok(student
        .map_tensors(|name, tensor| Ok(saved.parameters.get(name).unwrap_or(tensor).clone()))?)
}
