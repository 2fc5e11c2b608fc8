//! Training as people follow it: bars or lines, TensorBoard events; and Ctrl-C as a wish to save and stop.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use still_train::{Observer, Phase, Stage, StepReport};

use crate::commands::calibration_bars::CalibrationBars;
use crate::interrupt::{self, OnSignal};
use crate::plot::number;
use crate::printer::Printer;
use crate::progress::{Bar, Losses};
use crate::run_log::{Evaluation, metric_words};
use crate::table;
use crate::tensorboard::EventLog;

/// Tells of each stage while it goes on, and remembers how it went.
pub struct RunObserver<'a> {
    printer: &'a Printer,
    calibration: CalibrationBars<'a>,
    bar: Option<Bar>,
    stages: Vec<StageSummary>,
    pace: Pace,
    events: Option<EventLog>,
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

impl<'a> RunObserver<'a> {
    /// No stage has begun. With `tensorboard`, event files go to `run_dir`.
    pub fn new(printer: &'a Printer, run_dir: &Path, tensorboard: bool) -> Self {
        Self {
            printer,
            calibration: CalibrationBars::new(printer),
            bar: None,
            stages: Vec::new(),
            pace: Pace::new(Instant::now(), 0, 0),
            events: tensorboard.then(|| EventLog::new(run_dir)),
        }
    }

    /// The last stage is over.
    pub fn finish(&mut self) {
        // Nothing of a stage is left to save.
        interrupt::on_signal(OnSignal::End);
        self.calibration.finish();
        let (Some(bar), Some(stage)) = (self.bar.take(), self.stages.last_mut()) else { return };
        stage.seconds = bar.seconds();
        bar.done(format_args!("{}: {} steps, {}", stage.stage, stage.steps, stage.losses));
    }

    /// Every stage of this run.
    pub fn stages(&self) -> &[StageSummary] {
        &self.stages
    }

    fn evaluated(&mut self, evaluation: &Evaluation) {
        self.pace.pause(evaluation.seconds.unwrap_or(0.0));
        let print = || self.printer.step("Evaluated", words(evaluation));
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
        self.event(|events| events.evaluation(evaluation));
    }

    /// Training does not end for want of event files, but their end is told.
    fn event(&mut self, write: impl FnOnce(&mut EventLog) -> std::io::Result<()>) {
        let Some(Err(error)) = self.events.as_mut().map(write) else { return };
        self.events = None;
        let warn = || {
            self.printer.warn(format_args!(
                "TensorBoard's files cannot be written ({error}): they end here"
            ));
        };
        match &self.bar {
            Some(bar) => bar.suspend(warn),
            None => warn(),
        }
    }
}

impl Observer for RunObserver<'_> {
    fn on_calibration(&mut self, phase: Phase, tokens: usize, of: usize) {
        self.calibration.advance(phase, tokens, of);
    }

    fn on_stage(&mut self, stage: Stage, steps: usize, done: usize) {
        self.finish();
        interrupt::on_signal(OnSignal::Save);
        let bar = Bar::new(self.printer, "Training", stage.name(), steps, "steps");
        bar.update(done, "");
        self.bar = Some(bar);
        self.pace = Pace::new(Instant::now(), done, steps);
        self.stages.push(StageSummary {
            stage: stage.name(),
            steps: done,
            tokens: 0,
            losses: Losses::default(),
            seconds: 0.0,
        });
        self.event(|events| events.stage(stage.name(), done));
    }

    fn on_step(&mut self, report: &StepReport) {
        let tokens_per_s = self.pace.step(Instant::now(), report.step, report.tokens);
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

    fn on_evaluation(&mut self, evaluation: &still_train::Evaluation) {
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

/// How fast a stage goes, and what is left of it.
#[derive(Debug)]
struct Pace {
    started: Instant,
    /// Steps done when it started.
    before: usize,
    done: usize,
    steps: usize,
    /// End of the last step, or of what came after it.
    last: Instant,
    /// Seconds since then that were no training.
    paused: f64,
    /// Of late steps, earlier ones fading; lengths of steps may differ, so tokens and seconds are averaged apart.
    tokens: f64,
    seconds: f64,
    now: Instant,
}

/// What an earlier step counts for against the next one.
const FADING: f64 = 0.9;

impl Pace {
    fn new(now: Instant, done: usize, steps: usize) -> Self {
        let (tokens, seconds, paused) = (0.0, 0.0, 0.0);
        Self { started: now, before: done, done, steps, last: now, paused, tokens, seconds, now }
    }

    /// A step ended; its tokens a second.
    fn step(&mut self, now: Instant, done: usize, tokens: usize) -> f64 {
        let elapsed = now.duration_since(self.last).as_secs_f64();
        let seconds = (elapsed - self.paused).max(1e-6);
        self.tokens = FADING * self.tokens + tokens as f64;
        self.seconds = FADING * self.seconds + seconds;
        (self.done, self.now) = (done, now);
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

    /// Evaluations and checkpoints are part of what is left, as they are of what is done.
    fn seconds_left(&self) -> f64 {
        let per_step = self.now.duration_since(self.started).as_secs_f64()
            / self.done.saturating_sub(self.before).max(1) as f64;
        per_step * self.steps.saturating_sub(self.done) as f64
    }
}

impl std::fmt::Display for Pace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let speed = table::count(self.tokens_per_s().round() as usize);
        write!(f, "{speed} tokens/s, {} left", table::seconds(self.seconds_left()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_pace_counts_training_for_speed_and_everything_for_time_left() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        // A resumed stage: 10 of 20 steps were done before.
        let mut pace = Pace::new(start, 10, 20);
        assert_eq!(pace.step(at(2), 11, 200), 100.0);
        // An evaluation that took 6 of the next 8 seconds, then a checkpoint of 2.
        pace.pause(6.0);
        assert_eq!(pace.step(at(10), 12, 200), 100.0);
        pace.resume(at(12));
        assert_eq!(pace.step(at(14), 13, 400), 200.0);
        let late = (0.81 * 200.0 + 0.9 * 200.0 + 400.0) / (0.81 * 2.0 + 0.9 * 2.0 + 2.0);
        assert!((pace.tokens_per_s() - late).abs() < 1e-9);
        // 3 steps in 14 seconds, 7 to go.
        assert!((pace.seconds_left() - 14.0 / 3.0 * 7.0).abs() < 1e-9);
        assert_eq!(pace.to_string(), "137 tokens/s, 32.7 s left");
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
