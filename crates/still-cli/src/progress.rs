//! Progress on stderr: bars on a terminal; a line every so often where a log is kept instead.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::printer::Printer;
use crate::shown::shown_in_line;
use crate::table;

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

/// Off a terminal progress is told at most once in this time.
const LINE_EVERY_MS: u64 = 10_000;

/// One bar; [`Bar::done`] replaces it by a line.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    printer: Printer,
    verb: &'static str,
    /// What progresses, and in which unit.
    words: (String, String),
    started: Instant,
    /// When progress was last told in a line: milliseconds since the start. Bars may be moved by many threads.
    told_ms: AtomicU64,
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
        // What is in braces would be a key of the template.
        let shown = shown_in_line(what).replace('{', "{{").replace('}', "}}");
        let template = format!(
            "{{prefix:>12{colour}}} {shown} [{{bar:20}}] {{pos}}/{{len}} {unit} {{elapsed}} {{msg}}"
        );
        // The template is ours: an error in it shows as the plain default bar.
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(verb);
        if printer.shows_bars() {
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        let words = (what.to_owned(), unit.to_owned());
        Self {
            bar,
            printer: printer.clone(),
            verb,
            words,
            started: Instant::now(),
            told_ms: AtomicU64::new(0),
        }
    }

    /// Moves on by `units`.
    pub fn advance(&self, units: usize) {
        self.bar.inc(units as u64);
        self.tell_if_due();
    }

    /// Moves to `units`, with a few words about them.
    pub fn update(&self, units: usize, message: impl Into<std::borrow::Cow<'static, str>>) {
        self.bar.set_message(message);
        self.bar.set_position(units as u64);
        self.tell_if_due();
    }

    /// Shows a few words after the bar.
    pub fn message(&self, message: impl Into<std::borrow::Cow<'static, str>>) {
        self.bar.set_message(message);
    }

    /// Off a terminal: tells the progress now, and what happened. On one the bar tells enough.
    pub fn note(&self, happened: &str) {
        if !self.printer.shows_bars() {
            self.tell(&[happened]);
        }
    }

    /// Prints lines of others in a way that leaves the bar whole.
    pub fn suspend(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }

    fn tell_if_due(&self) {
        if self.printer.shows_bars() {
            return;
        }
        let (now, told) = (self.elapsed_ms(), self.told_ms.load(Ordering::Relaxed));
        let due = now >= told.saturating_add(LINE_EVERY_MS);
        // Of threads that come at once, one tells.
        let swap =
            || self.told_ms.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed);
        if due && swap().is_ok() {
            self.tell(&[]);
        }
    }

    fn elapsed_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn tell(&self, more: &[&str]) {
        self.told_ms.store(self.elapsed_ms(), Ordering::Relaxed);
        let (what, unit) = &self.words;
        let message = self.bar.message();
        let place =
            format!("{what} {}/{} {unit}", self.bar.position(), self.bar.length().unwrap_or(0));
        let parts = [place.as_str(), message.as_str()];
        let parts: Vec<&str> =
            parts.into_iter().chain(more.iter().copied()).filter(|part| !part.is_empty()).collect();
        self.printer.step(self.verb, parts.join(", "));
    }

    /// Seconds since the bar was made.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Replaces the bar by one line with the time it took.
    pub fn done(self, message: impl std::fmt::Display) {
        self.bar.finish_and_clear();
        self.printer
            .step(self.verb, format_args!("{message} in {}", table::seconds(self.seconds())));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // An error's line must not share the bar's.
        self.bar.finish_and_clear();
    }
}
