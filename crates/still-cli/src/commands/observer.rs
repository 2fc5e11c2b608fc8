//! Training progress as bars, and Ctrl-C as a wish to save and stop.

use std::path::Path;

use serde::Serialize;
use still_train::{Observer, Stage, StepReport};

use crate::interrupt;
use crate::printer::Printer;
use crate::progress::{Bar, Losses};

/// Draws one bar per stage and remembers how each went.
#[derive(Debug)]
pub struct BarObserver<'a> {
    printer: &'a Printer,
    bar: Option<Bar>,
    stages: Vec<StageSummary>,
}

/// How a stage went in this run.
#[derive(Debug, Serialize)]
pub struct StageSummary {
    stage: &'static str,
    /// Steps done, those of an earlier run included.
    steps: usize,
    /// Tokens read by this run.
    tokens: usize,
    /// Of this run's steps.
    #[serde(flatten)]
    losses: Losses,
    /// Wall-clock seconds of this run.
    seconds: f64,
}

impl<'a> BarObserver<'a> {
    /// No stage has begun.
    pub fn new(printer: &'a Printer) -> Self {
        Self { printer, bar: None, stages: Vec::new() }
    }

    /// The last stage is over.
    pub fn finish(&mut self) {
        let (Some(bar), Some(stage)) = (self.bar.take(), self.stages.last_mut()) else { return };
        stage.seconds = bar.seconds();
        bar.done(format_args!("{}: {} steps, {}", stage.stage, stage.steps, stage.losses));
    }

    /// Every stage of this run.
    pub fn stages(&self) -> &[StageSummary] {
        &self.stages
    }
}

impl Observer for BarObserver<'_> {
    fn on_stage(&mut self, stage: Stage, steps: usize, done: usize) {
        self.finish();
        let bar = Bar::new(self.printer, "Training", stage.name(), steps, "steps");
        bar.set(done);
        self.bar = Some(bar);
        self.stages.push(StageSummary {
            stage: stage.name(),
            steps: done,
            tokens: 0,
            losses: Losses::default(),
            seconds: 0.0,
        });
    }

    fn on_step(&mut self, report: &StepReport) {
        let Some(stage) = self.stages.last_mut() else { return };
        stage.steps = report.step;
        stage.tokens += report.tokens;
        stage.losses.add(report.loss);
        if let Some(bar) = &self.bar {
            bar.set(report.step);
            bar.message(format!("loss {:.3e}, lr {:.1e}", report.loss, report.lr));
        }
    }

    fn on_checkpoint(&mut self, path: &Path) {
        tracing::info!("checkpoint {}", path.display());
    }

    fn stop_requested(&self) -> bool {
        interrupt::raised()
    }
}
