//! Progress on stderr: a bar on a terminal; a line every so often where a log is kept instead.
//!
//! | file | content |
//! |---|---|
//! | `line` | how far something came, in one line |
//! | `narrow` | the terminal that bars are drawn on |
//! | `screen` | which bar the terminal shows |
//! | `reading` | how far a model has read a document or a message |
//! | `losses` | first and last loss of a stage |

mod line;
mod losses;
mod narrow;
mod reading;
mod screen;

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use self::line::{BYTES, Progress};
pub use self::losses::Losses;
pub use self::reading::ReadingBar;
pub use self::screen::suspend;
use crate::printer::{Printer, say};
use crate::shown::shown_in_line;
use crate::table;

/// Columns before a bar's line: the verb and a space.
const MARGIN: usize = 13;
/// How often a bar is drawn.
const FRAME: Duration = Duration::from_millis(250);
/// Off a terminal progress is told at first this often, later every [`SLOWEST`].
const LINE_EVERY: Duration = Duration::from_secs(10);
/// When lines come less often.
const LONG: Duration = Duration::from_secs(120);
const SLOWEST: Duration = Duration::from_secs(60);

/// What goes on now. [`Bar::done`] replaces it by a line; dropped, it leaves none.
#[derive(Debug)]
pub struct Bar {
    verb: &'static str,
    printer: Printer,
    /// Bars may be moved by many threads.
    progress: Arc<Mutex<Progress>>,
    shows: Shows,
}

/// Where progress is shown.
#[derive(Debug)]
enum Shows {
    /// On the terminal, by its number there.
    Bar(u64),
    /// In lines of a thread, which ends with this.
    Lines {
        _ends: Sender<()>,
    },
    Nothing,
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
        let progress = Progress::begin(&shown_in_line(what), length, unit);
        let progress = Arc::new(Mutex::new(progress));
        let shows = match (printer.shows_bars(), printer.is_quiet()) {
            (true, _) => Shows::Bar(draw(verb, &progress)),
            (false, false) => Shows::Lines { _ends: tell_now_and_then(printer, verb, &progress) },
            (false, true) => Shows::Nothing,
        };
        Self { verb, printer: printer.clone(), progress, shows }
    }

    /// A bar of `length` bytes.
    pub fn bytes(printer: &Printer, verb: &'static str, what: &str, length: u64) -> Self {
        Self::new(printer, verb, what, usize::try_from(length).unwrap_or(usize::MAX), BYTES)
    }

    /// What goes on, where nothing can be counted. Off a terminal it is told at once.
    pub fn uncounted(printer: &Printer, verb: &'static str, what: &str) -> Self {
        let bar = Self::new(printer, verb, what, 0, "");
        if !printer.shows_bars() {
            printer.step(verb, what);
        }
        bar
    }

    /// `units` of them were done before: they tell nothing about the time that the others take.
    pub fn done_before(&self, units: usize) {
        let mut progress = self.progress();
        (progress.before, progress.done) = (units, units);
    }

    /// Moves on by `units`.
    pub fn advance(&self, units: usize) {
        let mut progress = self.progress();
        let done = progress.done.saturating_add(units);
        progress.reach(done, Instant::now());
    }

    /// Moves to `units`.
    pub fn reach(&self, units: usize) {
        self.progress().reach(units, Instant::now());
    }

    /// Moves to `units`, with a few words about them.
    pub fn update(&self, units: usize, message: impl Into<String>) {
        let mut progress = self.progress();
        progress.reach(units, Instant::now());
        progress.message = shown_in_line(&message.into()).into_owned();
    }

    /// Shows a few words after the bar.
    pub fn message(&self, message: impl Into<String>) {
        self.progress().message = shown_in_line(&message.into()).into_owned();
    }

    /// Off a terminal: tells the progress now, and what happened. On one the bar tells enough.
    pub fn note(&self, happened: &str) {
        if !self.printer.shows_bars() {
            self.printer.step(self.verb, self.progress().log_line(Instant::now(), happened));
        }
    }

    /// Seconds since the bar was made.
    pub fn seconds(&self) -> f64 {
        self.progress().started.elapsed().as_secs_f64()
    }

    /// Replaces the bar by one line with the time it took.
    pub fn done(self, message: impl std::fmt::Display) {
        let (verb, printer, seconds) = (self.verb, self.printer.clone(), self.seconds());
        drop(self);
        printer.step(verb, format_args!("{message} in {}", table::seconds(seconds)));
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        locked(&self.progress)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Shows::Bar(number) = self.shows {
            screen::remove(number);
        }
    }
}

/// Wipes the bar that is drawn, for good: the process ends.
pub fn close() {
    screen::close(wipe);
}

/// Wipes the line that the cursor is on.
fn wipe() {
    say("\r\x1b[2K");
}

fn locked(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Draws it on the terminal, as wide as that is; returns its number there.
fn draw(verb: &'static str, progress: &Arc<Mutex<Progress>>) -> u64 {
    let bar = ProgressBar::hidden();
    let color = if console::colors_enabled_stderr() { ".green.bold" } else { "" };
    // The template is ours: an error in it shows as the plain default bar.
    if let Ok(style) = ProgressStyle::with_template(&format!("{{prefix:>12{color}}} {{line}}")) {
        let progress = progress.clone();
        let line = move |_: &ProgressState, to: &mut dyn std::fmt::Write| {
            let width = usize::from(narrow::width()).saturating_sub(MARGIN);
            let line = locked(&progress).line(Instant::now(), width);
            let _ = to.write_str(&line);
        };
        bar.set_style(style.with_key("line", line));
    }
    bar.set_prefix(verb);
    let number = screen::show(&bar, wipe);
    bar.enable_steady_tick(FRAME);
    number
}

/// A thread that tells of progress every so often, until what is returned is dropped.
fn tell_now_and_then(
    printer: &Printer,
    verb: &'static str,
    progress: &Arc<Mutex<Progress>>,
) -> Sender<()> {
    let (ends, ended) = mpsc::channel();
    let (printer, progress) = (printer.clone(), progress.clone());
    let tell = move || {
        loop {
            let elapsed = locked(&progress).started.elapsed();
            let pause = if elapsed < LONG { LINE_EVERY } else { SLOWEST };
            match ended.recv_timeout(pause) {
                Err(RecvTimeoutError::Timeout) => {
                    let line = locked(&progress).log_line(Instant::now(), "");
                    printer.step(verb, line);
                }
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    };
    // A system that has no thread left for this has a run to do.
    let _ = std::thread::Builder::new().name("progress".into()).spawn(tell);
    ends
}
