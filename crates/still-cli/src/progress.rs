//! Progress bars on stderr; hidden off a terminal, where only the closing line remains.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::printer::Printer;

/// First and last loss of a stage, for its closing line.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Losses {
    /// Of the first step.
    #[serde(rename = "first_loss")]
    first: Option<f64>,
    /// Of the last step so far.
    #[serde(rename = "last_loss")]
    last: Option<f64>,
}

impl Losses {
    /// Takes note of a step's loss.
    pub fn add(&mut self, loss: f64) {
        self.first.get_or_insert(loss);
        self.last = Some(loss);
    }
}

impl std::fmt::Display for Losses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.first, self.last) {
            (Some(first), Some(last)) => {
                write!(f, "loss {first:.3e} at first, {last:.3e} at last,")
            }
            _ => f.write_str("nothing left to do,"),
        }
    }
}

/// One bar; [`Bar::done`] replaces it by a line.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    printer: Printer,
    verb: &'static str,
    started: Instant,
}

impl Bar {
    /// A bar of `length` units; `verb` is right-aligned before it, as in the printer's lines.
    pub fn new(
        printer: &Printer,
        verb: &'static str,
        what: &str,
        length: usize,
        unit: &str,
    ) -> Self {
        let bar = ProgressBar::new(length as u64);
        bar.set_draw_target(if printer.shows_bars() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        });
        let colour = if console::colors_enabled_stderr() { ".green.bold" } else { "" };
        let template = format!(
            "{{prefix:>12{colour}}} {what} [{{bar:24}}] {{pos}}/{{len}} {unit} {{elapsed}} {{msg}}"
        );
        // The template is ours: an error in it shows as the plain default bar.
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(verb);
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, printer: printer.clone(), verb, started: Instant::now() }
    }

    /// Moves on by `units`.
    pub fn advance(&self, units: usize) {
        self.bar.inc(units as u64);
    }

    /// Moves to `units`.
    pub fn set(&self, units: usize) {
        self.bar.set_position(units as u64);
    }

    /// Shows a few words after the bar.
    pub fn message(&self, message: impl Into<std::borrow::Cow<'static, str>>) {
        self.bar.set_message(message);
    }

    /// Seconds since the bar was made.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Replaces the bar by one line with the time it took.
    pub fn done(self, message: impl std::fmt::Display) {
        self.bar.finish_and_clear();
        self.printer.step(self.verb, format_args!("{message} in {:.1} s", self.seconds()));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // An error's line must not share the bar's.
        self.bar.finish_and_clear();
    }
}
