//! A whole run: both stages over text files, with checkpoints.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use still_model::{Model, Student};

use crate::calibrate::calibrated;
use crate::checkpoint::{Checkpoints, Progress, Saved};
use crate::data::{Position, TokenCache, Window, Windows};
use crate::error::{Result, TrainError};
use crate::finetune::FinetuneStage;
use crate::metrics::{MetricsLog, Observer, Stage, StepReport};
use crate::optimizer::AdamW;
use crate::recipe::{DataRecipe, Recipe};
use crate::transfer::TransferStage;

/// Linearizes a model: attention transfer, then low-rank finetuning. Returns it with the trained student,
/// low-rank updates unmerged.
///
/// `run_dir` receives `recipe.toml`, `metrics.jsonl` and `checkpoints/`; with `resume` the run in it goes on,
/// bit for bit as if it had never stopped (on one machine, at an equal thread count).
///
/// # Errors
/// A recipe, data or run directory that cannot be used; a loss that is not a number;
/// [`TrainError::Interrupted`] when the observer asked to stop, after saving.
pub fn linearize(
    model: &Model,
    recipe: &Recipe,
    data: &[PathBuf],
    run_dir: &Path,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Model> {
    let cache = TokenCache::user()?;
    let windows = Windows::read(data, &model.tokenizer, &recipe.data, recipe.seed, &cache)?;
    linearize_windows(model, recipe, &windows, run_dir, resume, observer)
}

/// [`linearize`] over windows that are already tokenized.
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
    let still = recipe.attention.resolve(model.config())?;
    let student = Student::init(still, model.config(), recipe.attention.init, recipe.seed)?;
    let checkpoints = Checkpoints::new(run_dir, recipe.checkpoint.keep);
    let fingerprint = fingerprint(model, recipe, windows)?;
    let saved = if resume {
        Some(open_run(&checkpoints, run_dir, &fingerprint)?)
    } else {
        refuse_used(&checkpoints, run_dir)?;
        None
    };
    std::fs::create_dir_all(run_dir).map_err(TrainError::write(run_dir))?;
    let resolved = toml::to_string_pretty(recipe)
        .map_err(|error| TrainError::Recipe { what: error.to_string(), hint: String::new() })?;
    let path = run_dir.join("recipe.toml");
    std::fs::write(&path, resolved).map_err(TrainError::write(&path))?;

    let reached = saved.as_ref().map(|saved| (saved.progress.stage, saved.progress.step));
    let log = MetricsLog::open(&run_dir.join("metrics.jsonl"), reached)?;
    let position = saved.as_ref().map_or_else(Position::default, |saved| saved.progress.position);
    let mut run = Run { recipe, windows, checkpoints, fingerprint, log, position, observer };

    // What a stage leaves alone is as the stage before left it: take it from the checkpoint too.
    let mut student = match &saved {
        Some(saved) => student
            .map_tensors(|name, tensor| Ok(saved.parameters.get(name).unwrap_or(tensor).clone()))?,
        None => student,
    };
    let in_finetune = saved.as_ref().is_some_and(|saved| saved.progress.stage == Stage::Finetune);
    let mut saved = saved;
    if recipe.transfer.steps > 0 && !in_finetune {
        let mut stage = TransferStage::new(model, &student, &recipe.transfer)?;
        run.stage(Stage::Transfer, &mut stage, saved.take())?;
        student = stage.student()?;
    }
    if recipe.finetune.steps > 0 {
        let mut stage = FinetuneStage::new(model, &student, &recipe.finetune, recipe.seed)?;
        run.stage(Stage::Finetune, &mut stage, saved.take())?;
        student = stage.student()?;
    }
    student.recipe = serde_json::to_value(recipe).ok();
    Ok(model.with_student(student))
}

/// What the loop needs of a stage.
trait Trains {
    fn train(&mut self, windows: &[Window]) -> Result<StepReport>;
    fn current(&self) -> Result<Student>;
    fn adam(&mut self) -> &mut AdamW;
}

impl Trains for TransferStage {
    fn train(&mut self, windows: &[Window]) -> Result<StepReport> {
        Ok(self.step(windows)?.report)
    }

    fn current(&self) -> Result<Student> {
        self.student()
    }

    fn adam(&mut self) -> &mut AdamW {
        self.optimizer()
    }
}

impl Trains for FinetuneStage {
    fn train(&mut self, windows: &[Window]) -> Result<StepReport> {
        self.step(windows, None)
    }

    fn current(&self) -> Result<Student> {
        self.student()
    }

    fn adam(&mut self) -> &mut AdamW {
        self.optimizer()
    }
}

struct Run<'a> {
    recipe: &'a Recipe,
    windows: &'a Windows,
    checkpoints: Checkpoints,
    fingerprint: String,
    log: MetricsLog,
    position: Position,
    observer: &'a mut dyn Observer,
}

impl Run<'_> {
    fn stage(&mut self, kind: Stage, stage: &mut dyn Trains, saved: Option<Saved>) -> Result<()> {
        let (steps, batch) = match kind {
            Stage::Transfer => (self.recipe.transfer.steps, self.recipe.transfer.batch),
            Stage::Finetune => (self.recipe.finetune.steps, self.recipe.finetune.batch),
        };
        if let Some(saved) = saved {
            restore(stage.adam(), &saved).map_err(|name| TrainError::Run {
                path: "checkpoint".into(),
                what: format!("{name} is missing or of another shape"),
                hint: "the checkpoint belongs to another recipe: start a new run".into(),
            })?;
        }
        let done = stage.adam().step_count();
        self.observer.on_stage(kind, steps, done);
        for step in done + 1..=steps {
            let mut position = self.position;
            let report = stage.train(&self.windows.next(&mut position, batch))?;
            self.position = position;
            self.log.write(&report)?;
            self.observer.on_step(&report);
            let stop = self.observer.stop_requested();
            if stop || step == steps || step % self.recipe.checkpoint.every == 0 {
                let path = self.save(kind, stage)?;
                self.observer.on_checkpoint(&path);
                if stop {
                    return Err(TrainError::Interrupted { stage: kind.name(), step, path });
                }
            }
        }
        Ok(())
    }

    fn save(&self, kind: Stage, stage: &mut dyn Trains) -> Result<PathBuf> {
        let progress = Progress {
            stage: kind,
            step: stage.adam().step_count(),
            position: self.position,
            fingerprint: self.fingerprint.clone(),
        };
        self.checkpoints.save(&progress, &stage.current()?, &stage.adam().state())
    }
}

/// Puts saved values into the optimizer's variables and moments; the name of what is missing, if any.
fn restore(optimizer: &mut AdamW, saved: &Saved) -> std::result::Result<(), String> {
    for (name, var) in optimizer.parameters() {
        match saved.parameters.get(name) {
            Some(value) if value.dims() == var.dims() => {
                var.set(value).map_err(|error| error.to_string())?;
            }
            _ => return Err(name.clone()),
        }
    }
    optimizer.restore(saved.progress.step, &saved.optimizer)
}

/// SHA-256 over everything that decides a run.
fn fingerprint(model: &Model, recipe: &Recipe, windows: &Windows) -> Result<String> {
    let mut hasher = Sha256::new();
    let recipe = serde_json::to_string(recipe)
        .map_err(|error| TrainError::Recipe { what: error.to_string(), hint: String::new() })?;
    hasher.update(recipe);
    hasher.update(windows.sha256());
    hasher.update(model.base.sha256()?);
    Ok(format!("{:x}", hasher.finalize()))
}

fn open_run(checkpoints: &Checkpoints, run_dir: &Path, fingerprint: &str) -> Result<Saved> {
    let fail = |what: &str, hint: &str| {
        Err(TrainError::Run { path: run_dir.to_path_buf(), what: what.into(), hint: hint.into() })
    };
    match checkpoints.latest()? {
        None => fail("there is no checkpoint to resume from", "run once without --resume"),
        Some(saved) if saved.progress.fingerprint != fingerprint => fail(
            "the run in it has another recipe, other data or another base",
            "resume with the same ones, or start a new run elsewhere",
        ),
        Some(saved) => Ok(saved),
    }
}

fn refuse_used(checkpoints: &Checkpoints, run_dir: &Path) -> Result<()> {
    if checkpoints.list().is_empty() {
        return Ok(());
    }
    Err(TrainError::Run {
        path: run_dir.to_path_buf(),
        what: "holds checkpoints of an earlier run".into(),
        hint: "add --resume to go on with it, or choose another run directory".into(),
    })
}
