//! The end of every step: gradients to new parameters, or to a skipped step.

use still_compute::Gradients;

use crate::error::{Result, TrainError};
use crate::metrics::Stage;
use crate::optimizer::AdamW;
use crate::recipe::GuardRecipe;
use crate::spikes::Spikes;

/// An optimizer and what it does not put up with.
#[derive(Debug)]
pub(crate) struct Updates {
    pub optimizer: AdamW,
    pub spikes: Spikes,
    guard: GuardRecipe,
    stage: Stage,
}

/// What became of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update {
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate that the step had, or would have had.
    pub lr: f64,
    pub skipped: bool,
}

impl Updates {
    /// Every step is taken until a guard is set.
    pub fn new(stage: Stage, optimizer: AdamW) -> Self {
        Self { optimizer, spikes: Spikes::default(), guard: GuardRecipe::off(), stage }
    }

    pub fn guard(&mut self, guard: &GuardRecipe) {
        self.guard = guard.clone();
    }

    /// An error for a loss that is not a number.
    pub fn check_loss(&self, loss: f64) -> Result<()> {
        if loss.is_finite() {
            return Ok(());
        }
        Err(TrainError::NotFinite {
            stage: self.stage.name(),
            step: self.optimizer.step_count(),
            what: "the loss",
            value: loss,
        })
    }

    /// Takes the step, or skips it if its loss or gradient is a spike.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`]; nothing has changed then.
    pub fn update(&mut self, loss: f64, gradients: Gradients) -> Result<Update> {
        self.check_loss(loss)?;
        let gradients = gradients.into_runs()?;
        let lr = self.optimizer.lr();
        let grad_norm = self.optimizer.norm(self.stage.name(), &gradients)?;
        let skipped = self.spikes.refuses(&self.guard, loss, grad_norm);
        if skipped {
            self.optimizer.skip();
        } else {
            self.optimizer.apply(&gradients, grad_norm)?;
        }
        Ok(Update { grad_norm, lr, skipped })
    }
}
