//! The loop over the steps of a stage.

use std::path::{Path, PathBuf};

use still_model::{Model, Student};

use crate::checkpoint::{Checkpoints, Logs, Progress, Saved};
use crate::data::{Position, Window, Windows};
use crate::error::{Result, TrainError};
use crate::evaluation::{Evaluation, Evaluator};
use crate::finetune::FinetuneStage;
use crate::metrics::{LayerLosses, Log, Observer, Stage, StepReport};
use crate::recipe::Recipe;
use crate::transfer::TransferStage;
use crate::update::Updates;

use super::watch::Watch;

/// What the loop needs of a stage.
pub(crate) trait TrainingStage {
    fn train(&mut self, windows: &[Window]) -> Result<StepReport>;
    fn current(&self) -> Result<Student>;
    fn updates(&mut self) -> &mut Updates;

    /// Losses of the layers on windows, of a stage that has them; nothing is learned.
    fn layer_losses(&self, windows: &[Window]) -> Result<Option<LayerLosses>> {
        let _ = windows;
        Ok(None)
    }
}

impl TrainingStage for TransferStage {
    fn train(&mut self, windows: &[Window]) -> Result<StepReport> {
        Ok(self.step(windows)?.report)
    }

    fn current(&self) -> Result<Student> {
        self.student()
    }

    fn updates(&mut self) -> &mut Updates {
        self.updates()
    }

    fn layer_losses(&self, windows: &[Window]) -> Result<Option<LayerLosses>> {
        self.layer_losses(windows).map(Some)
    }
}

impl TrainingStage for FinetuneStage {
    fn train(&mut self, windows: &[Window]) -> Result<StepReport> {
        self.step(windows, None)
    }

    fn current(&self) -> Result<Student> {
        self.student()
    }

    fn updates(&mut self) -> &mut Updates {
        self.updates()
    }
}

/// A run between its first and its last step.
pub(super) struct Run<'a> {
    pub model: &'a Model,
    pub recipe: &'a Recipe,
    pub windows: &'a Windows,
    pub run_dir: &'a Path,
    pub checkpoints: Checkpoints,
    pub fingerprint: String,
    pub metrics: Log<StepReport>,
    pub evaluations: Log<Evaluation>,
    /// Absent if the recipe measures nothing.
    pub evaluator: Option<Evaluator>,
    pub position: Position,
    pub watch: Watch,
    pub observer: &'a mut dyn Observer,
}

impl Run<'_> {
    /// Trains a stage to its end, from where it was saved if it was.
    pub fn stage(
        &mut self,
        kind: Stage,
        stage: &mut dyn TrainingStage,
        saved: Option<Saved>,
    ) -> Result<()> {
        let recipe = self.recipe;
        let (steps, batch) = match kind {
            Stage::Transfer => (recipe.transfer.steps, recipe.transfer.batch),
            Stage::Finetune => (recipe.finetune.steps, recipe.finetune.batch),
        };
        match saved {
            Some(saved) => restore(stage.updates(), &saved)?,
            None => {
                self.watch.begin_stage();
                if kind == Stage::Transfer {
                    LayerLosses::forget(self.run_dir)?;
                }
            }
        }
        let done = stage.updates().optimizer.step_count();
        self.observer.on_stage(kind, steps, done);
        // The student that the run starts from; a second stage starts from one that is known.
        if self.position == Position::default() {
            self.evaluate(kind, stage)?;
        }
        for step in done + 1..=steps {
            if self.watch.has_had_enough(recipe.evaluation.early_stop) {
                break;
            }
            let mut position = self.position;
            let report = stage.train(&self.windows.next(&mut position, batch))?;
            self.position = position;
            self.metrics.write(&report)?;
            self.observer.on_step(&report);

            let every = recipe.evaluation.every;
            if every > 0 && (step % every == 0 || step == steps) {
                self.evaluate(kind, stage)?;
            }

            let diverged = self.diverged(stage);
            let interrupted = self.observer.stop_requested();
            let ends = step == steps || self.watch.has_had_enough(recipe.evaluation.early_stop);
            let due = step % recipe.checkpoint.every == 0;
            if ends || due || interrupted || diverged.is_some() {
                let path = self.save(kind, stage)?;
                self.observer.on_checkpoint(&path);
                let stage = kind.name();
                if let Some(what) = diverged {
                    return Err(TrainError::Diverged { stage, step, what, path });
                }
                if interrupted {
                    return Err(TrainError::Interrupted { stage, step, path });
                }
            }
        }
        // Steps read different windows, which are not equally hard: what a layer learned shows on those of the first.
        let first = self.windows.next(&mut Position::default(), batch);
        if let Some(losses) = stage.layer_losses(&first)? {
            losses.write(self.run_dir)?;
        }
        Ok(())
    }

    /// Measures the student, if the recipe says so, and keeps it if it is the best.
    fn evaluate(&mut self, kind: Stage, stage: &mut dyn TrainingStage) -> Result<()> {
        let Some(evaluator) = &self.evaluator else { return Ok(()) };
        let student = stage.current()?;
        let step = stage.updates().optimizer.step_count();
        let model = self.model.with_student(student.clone());
        let on_item = self.observer.on_evaluation_begin(kind, step, evaluator.items());
        let mut evaluation = evaluator.evaluate(&model, kind, step, &on_item)?;
        drop(on_item);
        if let Some(heldout) = evaluation.heldout_nll {
            evaluation.best = self.watch.observe(heldout);
            stage.updates().optimizer.observe(heldout);
            if evaluation.best && self.recipe.evaluation.keep_best {
                self.checkpoints.save_best(&self.progress(kind, stage)?, &student)?;
            }
        }
        self.evaluations.write(&evaluation)?;
        self.observer.on_evaluation(&evaluation);
        Ok(())
    }

    /// Why the run is to be given up, if it is.
    fn diverged(&self, stage: &mut dyn TrainingStage) -> Option<String> {
        let guard = &self.recipe.guard;
        let skipped = stage.updates().spikes.in_a_row;
        if guard.max_skips > 0 && skipped >= guard.max_skips {
            return Some(format!(
                "{skipped} steps in a row had a loss or gradient beyond {} times the usual",
                guard.spike_factor
            ));
        }
        self.watch.diverged(guard)
    }

    fn save(&self, kind: Stage, stage: &mut dyn TrainingStage) -> Result<PathBuf> {
        let progress = self.progress(kind, stage)?;
        self.checkpoints.save(&progress, &stage.current()?, &stage.updates().optimizer.state()?)
    }

    fn progress(&self, kind: Stage, stage: &mut dyn TrainingStage) -> Result<Progress> {
        let Updates { optimizer, spikes, .. } = stage.updates();
        Ok(Progress {
            stage: kind,
            step: optimizer.step_count(),
            skipped: optimizer.skipped(),
            spikes: spikes.clone(),
            plateau: optimizer.plateau(),
            watch: self.watch,
            position: self.position,
            logs: Logs {
                metrics: Some(self.metrics.mark()?),
                evaluations: Some(self.evaluations.mark()?),
            },
            fingerprint: self.fingerprint.clone(),
        })
    }
}

/// Puts saved values into the optimizer's variables, moments and guard.
fn restore(updates: &mut Updates, saved: &Saved) -> Result<()> {
    let foreign = |name: &str| TrainError::Run {
        path: "checkpoint".into(),
        what: format!("{name} is missing or of another shape"),
        hint: "the checkpoint belongs to another recipe: start a new run".into(),
    };
    for (name, var) in updates.optimizer.parameters() {
        match saved.parameters.get(name) {
            Some(value) if value.dims() == var.dims() => {
                var.set(&value.to_device(var.device())?)?;
            }
            _ => return Err(foreign(name)),
        }
    }
    let progress = &saved.progress;
    updates.spikes = progress.spikes.clone();
    let steps = (progress.step, progress.skipped);
    updates.optimizer.restore(steps, progress.plateau, &saved.optimizer, foreign)
}
