//! Progress of training: bars or lines, and TensorBoard events. Ctrl-C saves and stops.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use still_train::{Observer, OnItem, Phase, Stage, StepReport};

use crate::commands::calibration_bars::CalibrationBars;
use crate::interrupt::{self, OnSignal};
use crate::plot::number;
use crate::printer::Printer;
use crate::progress::{Bar, Losses};
use crate::run_log::{Evaluation, RunLog, StageLog, metric_words};
use crate::table;
use crate::tensorboard::EventLog;

/// What a signal finishes.
const STEP: &str = "this step";

/// Tells of each stage while it goes on, and remembers how it went.
pub struct RunObserver<'a> {
    printer: &'a Printer,
    run_dir: &'a Path,
    calibration: CalibrationBars<'a>,
    /// Between calibration and the first stage.
    preparing: Option<Bar>,
    bar: Option<Bar>,
    /// Of the evaluation that goes on.
    evaluation: Option<Arc<Bar>>,
    stages: Vec<StageSummary>,
    pace: Pace,
    events: Option<EventLog>,
}

/// How a stage went, in all starts of the run.
#[derive(Debug, Serialize)]
pub struct StageSummary {
    stage: &'static str,
    /// Steps done, those of an earlier run included.
    steps: usize,
    /// Tokens read.
    tokens: usize,
    /// Of the first and the last step, whichever start did them.
    #[serde(flatten)]
    losses: Losses,
    /// Wall-clock seconds of this start; none of a stage that was over before.
    seconds: Option<f64>,
}

impl StageSummary {
    /// Nothing is done.
    fn begin(stage: Stage) -> Self {
        let losses = Losses::default();
        Self { stage: stage.name(), steps: 0, tokens: 0, losses, seconds: None }
    }

    /// What earlier starts did, by the run's log.
    fn of_log(stage: Stage, log: &StageLog) -> Self {
        let mut summary = Self::begin(stage);
        (summary.steps, summary.tokens) = (log.done(), log.tokens());
        log.taken().for_each(|step| summary.losses.add(step.loss));
        summary
    }
}

impl<'a> RunObserver<'a> {
    /// No stage has begun. With `tensorboard`, event files go to `run_dir`.
    pub fn new(printer: &'a Printer, run_dir: &'a Path, tensorboard: bool) -> Self {
        Self {
            printer,
            run_dir,
            calibration: CalibrationBars::new(printer),
            preparing: None,
            bar: None,
            evaluation: None,
            stages: Vec::new(),
            pace: Pace::new(Instant::now()),
            events: tensorboard.then(|| EventLog::new(run_dir)),
        }
    }

    /// Calibration begins, with reading its text.
    pub fn calibrating(&mut self) {
        self.calibration.reading();
    }

    /// Weights are hashed, and a checkpoint is read.
    pub fn preparing(&mut self) {
        self.calibration.finish();
        self.preparing = Some(Bar::new(self.printer, "Preparing", "the run", 0, ""));
    }

    /// The last stage is over.
    pub fn finish(&mut self) {
        // Nothing of a stage is left to save.
        interrupt::on_signal(OnSignal::End);
        self.calibration.finish();
        self.preparing = None;
        let (Some(bar), Some(stage)) = (self.bar.take(), self.stages.last_mut()) else { return };
        stage.seconds = Some(bar.seconds());
        bar.done(format_args!("{}: {} steps, {}", stage.stage, stage.steps, stage.losses));
    }

    /// Every stage of the run.
    pub fn stages(&self) -> &[StageSummary] {
        &self.stages
    }

    /// What earlier starts of the run did. The trainer has cut the log to where it goes on.
    fn remember(&mut self) {
        let Ok(log) = RunLog::read(self.run_dir) else { return };
        for stage in Stage::ALL {
            if let Some(log) = log.stages.iter().find(|log| log.name == stage.name()) {
                self.stages.push(StageSummary::of_log(stage, log));
            }
        }
    }

    /// A bar of an evaluation that begins.
    fn evaluating(&mut self, what: &str, items: usize) -> OnItem {
        let bar = Arc::new(Bar::new(self.printer, "Evaluating", what, items, "items"));
        self.evaluation = Some(bar.clone());
        Box::new(move || bar.advance(1))
    }

    fn evaluated(&mut self, evaluation: &Evaluation) {
        self.pace.pause(evaluation.seconds.unwrap_or(0.0));
        self.evaluation = None;
        self.printer.step("Evaluated", words(evaluation));
        self.event(|events| events.evaluation(evaluation));
    }

    /// Training does not end for want of event files, but their end is told.
    fn event(&mut self, write: impl FnOnce(&mut EventLog) -> std::io::Result<()>) {
        let Some(Err(error)) = self.events.as_mut().map(write) else { return };
        self.events = None;
        self.printer
            .warn(format_args!("TensorBoard's files cannot be written ({error}): they end here"));
    }
}

impl Observer for RunObserver<'_> {
    fn on_calibration(&mut self, phase: Phase, tokens: usize, of: usize) {
        self.calibration.advance(phase, tokens, of);
    }

    fn on_stage(&mut self, stage: Stage, steps: usize, done: usize) {
        self.finish();
        self.evaluation = None;
        interrupt::save_after(STEP);
        let bar = Bar::new(self.printer, "Training", stage.name(), steps, "steps");
        bar.done_before(done);
        self.bar = Some(bar);
        self.pace = Pace::new(Instant::now());
        if self.stages.is_empty() {
            self.remember();
        }
        // The log has a stage that goes on.
        if self.stages.last().is_none_or(|last| last.stage != stage.name()) {
            self.stages.push(StageSummary::begin(stage));
        }
        self.event(|events| events.stage(stage.name(), done));
    }

    fn on_step(&mut self, report: &StepReport) {
        let tokens_per_s = self.pace.step(Instant::now(), report.tokens);
        if let Some(stage) = self.stages.last_mut() {
            stage.steps = report.step;
            stage.tokens += report.tokens;
            if !report.skipped {
                stage.losses.add(report.loss);
            }
        }
        if let Some(bar) = &self.bar {
            bar.update(report.step, format!("loss {:.3e}, {}", report.loss, self.pace));
        }
        self.event(|events| events.step(report, tokens_per_s));
    }

    fn on_teacher(&mut self, items: usize) -> OnItem {
        self.evaluating("the teacher", items)
    }

    fn on_evaluation_begin(&mut self, stage: Stage, step: usize, items: usize) -> OnItem {
        // Before the first step there is nothing to save.
        match step {
            0 => interrupt::on_signal(OnSignal::End),
            _ => interrupt::save_after("this evaluation"),
        }
        self.evaluating(&format!("{} step {step}", stage.name()), items)
    }

    fn on_evaluation(&mut self, evaluation: &still_train::Evaluation) {
        interrupt::save_after(STEP);
        match Evaluation::of(evaluation) {
            Ok(evaluation) => self.evaluated(&evaluation),
            Err(error) => self.printer.warn(format_args!("an evaluation is not shown: {error}")),
        }
    }

    fn on_checkpoint(&mut self, path: &Path) {
        tracing::info!("checkpoint {}", path.display());
        if let Some(bar) = &self.bar {
            bar.note("checkpoint saved");
        }
        self.event(|events| {
            events.checkpoint();
            Ok(())
        });
        self.pace.resume(Instant::now());
    }

    fn stop_requested(&self) -> bool {
        interrupt::raised()
    }
}

/// `transfer step 50: held-out loss 3.4, pass-key recall 0.9 (best so far)`
fn words(evaluation: &Evaluation) -> String {
    let metrics: Vec<String> = evaluation
        .metrics()
        .map(|(name, value)| format!("{} {}", metric_words(name), number(value)))
        .collect();
    let best = if evaluation.best { " (best so far)" } else { "" };
    format!("{} step {}: {}{best}", evaluation.stage, evaluation.step, metrics.join(", "))
}

/// How fast a stage goes.
#[derive(Debug)]
struct Pace {
    /// End of the last step, or of what came after it.
    last: Instant,
    /// Seconds since then that were no training.
    paused: f64,
    /// Of late steps, earlier ones fading; lengths of steps may differ, so tokens and seconds are averaged apart.
    tokens: f64,
    seconds: f64,
}

/// What an earlier step counts for against the next one.
const FADING: f64 = 0.9;

impl Pace {
    fn new(now: Instant) -> Self {
        Self { last: now, paused: 0.0, tokens: 0.0, seconds: 0.0 }
    }

    /// A step ended; its tokens a second.
    fn step(&mut self, now: Instant, tokens: usize) -> f64 {
        let elapsed = now.duration_since(self.last).as_secs_f64();
        let seconds = (elapsed - self.paused).max(1e-6);
        self.tokens = FADING * self.tokens + tokens as f64;
        self.seconds = FADING * self.seconds + seconds;
        self.resume(now);
        tokens as f64 / seconds
    }

    /// For so long nothing was trained.
    fn pause(&mut self, seconds: f64) {
        self.paused += seconds;
    }

    /// What came after the last step is over.
    fn resume(&mut self, now: Instant) {
        (self.last, self.paused) = (now, 0.0);
    }

    fn tokens_per_s(&self) -> f64 {
        self.tokens / self.seconds
    }
}

impl std::fmt::Display for Pace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tokens/s", table::count(self.tokens_per_s().round() as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_pace_counts_training_alone() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(start);
        assert_eq!(pace.step(at(2), 200), 100.0);
        // An evaluation that took 6 of the next 8 seconds, then a checkpoint of 2.
        pace.pause(6.0);
        assert_eq!(pace.step(at(10), 200), 100.0);
        pace.resume(at(12));
        assert_eq!(pace.step(at(14), 400), 200.0);
        let late = (0.81 * 200.0 + 0.9 * 200.0 + 400.0) / (0.81 * 2.0 + 0.9 * 2.0 + 2.0);
        assert!((pace.tokens_per_s() - late).abs() < 1e-9);
        assert_eq!(pace.to_string(), "137 tokens/s");
    }

    #[test]
    fn an_evaluation_is_one_line() {
        let line = r#"{"stage":"transfer","step":50,"heldout_nll":3.41592,"passkey_recall":0.9,"best":true}"#;
        assert_eq!(
            words(&serde_json::from_str(line).unwrap()),
            "transfer step 50: held-out loss 3.416, pass-key recall 0.9 (best so far)"
        );
    }
}
