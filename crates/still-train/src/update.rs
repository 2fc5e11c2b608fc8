//! The end of a step: take it, skip it, or refuse it.

use still_compute::Gradients;

use crate::data::Window;
use crate::error::{Result, TrainError};
use crate::metrics::{Stage, StepReport};
use crate::optimizer::AdamW;
use crate::recipe::GuardRecipe;
use crate::spikes::Spikes;

/// An optimizer and its guard against spikes.
#[derive(Debug)]
pub(crate) struct Updates {
    pub optimizer: AdamW,
    pub spikes: Spikes,
    guard: GuardRecipe,
    stage: Stage,
}

impl Updates {
    /// Every step is taken until a guard is set.
    pub fn new(stage: Stage, optimizer: AdamW) -> Self {
        Self { optimizer, spikes: Spikes::default(), guard: GuardRecipe::off(), stage }
    }

    pub fn guard(&mut self, guard: &GuardRecipe) {
        self.guard = guard.clone();
    }

    /// Refuses a loss that is not a number.
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

    /// Takes a step over `windows`, or skips it if its loss or gradient is a spike.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`]; nothing has changed then.
    pub fn update(
        &mut self,
        loss: f64,
        gradients: Gradients,
        windows: &[Window],
    ) -> Result<StepReport> {
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
        Ok(StepReport {
            stage: self.stage,
            step: self.optimizer.step_count(),
            loss,
            grad_norm,
            lr,
            tokens: windows.iter().map(Window::len).sum(),
            skipped,
            layers: Vec::new(),
            layer_losses: Vec::new(),
            linear_losses: Vec::new(),
        })
    }
}
