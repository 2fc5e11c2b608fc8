//! A bar's state in one line: as wide as the terminal, or for a log.

use std::time::{Duration, Instant};

use console::{measure_text_width, truncate_str};

use crate::table;

/// Columns that a bar may take, the widest first.
const BARS: [usize; 2] = [20, 10];
/// Columns of a message that is worth showing cut.
const SHORTEST_MESSAGE: usize = 12;
/// Before this a guess of the time left is worth nothing.
const UNKNOWN: Duration = Duration::from_secs(2);
/// The unit of bytes, which are told in larger ones, with their rate.
pub const BYTES: &str = "bytes";

/// How far something came.
#[derive(Clone, Debug)]
pub struct Progress {
    /// What progresses.
    pub what: String,
    /// What is counted; nothing of a phase that counts nothing.
    pub unit: String,
    /// Units done.
    pub done: usize,
    /// Units in all; 0 if nothing is counted.
    pub of: usize,
    /// Units that an earlier run had done.
    pub before: usize,
    /// A few words.
    pub message: String,
    /// When it began.
    pub started: Instant,
    /// When the last units were done.
    pub moved: Instant,
    /// How many those were.
    pub stride: usize,
}

impl Progress {
    /// Nothing is done.
    pub fn begin(what: &str, of: usize, unit: &str) -> Self {
        let now = Instant::now();
        let (what, unit, message) = (what.to_owned(), unit.to_owned(), String::new());
        Self { what, unit, done: 0, of, before: 0, message, started: now, moved: now, stride: 0 }
    }

    /// `done` units are done.
    pub fn reach(&mut self, done: usize, now: Instant) {
        self.stride = done.saturating_sub(self.done);
        (self.done, self.moved) = (done, now);
    }

    /// All units are done.
    pub fn is_full(&self) -> bool {
        self.of > 0 && self.done >= self.of
    }

    /// How long the units that are left will take if each takes as long as those that were done. Unknown before the first.
    pub fn left(&self, now: Instant) -> Option<Duration> {
        let done = self.done.saturating_sub(self.before);
        let rest = self.of.saturating_sub(self.done);
        if done == 0 || self.of == 0 {
            return None;
        }
        let unit = self.moved.duration_since(self.started).as_secs_f64() / done as f64;
        let since = now.duration_since(self.moved).as_secs_f64();
        // What is at work, as much as the last time, may take longer than that.
        let after = rest.saturating_sub(self.stride.max(1)) as f64;
        let left = (unit * rest as f64 - since).max(unit * after);
        Some(Duration::from_secs_f64(left.max(0.0)))
    }

    /// [`Progress::left`] where it says something.
    fn guess(&self, now: Instant) -> Option<Duration> {
        let worth = |left: &Duration| left.as_secs_f64() >= 0.5;
        self.left(now).filter(worth).filter(|_| now.duration_since(self.started) >= UNKNOWN)
    }

    fn units(&self) -> String {
        let (bytes, full) = (self.unit == BYTES, self.is_full());
        match (bytes, full) {
            (true, true) => format!("{} done, finishing", table::bytes(self.of)),
            (true, false) => table::bytes_of(self.done, self.of),
            (false, true) => format!("{} {} done, finishing", self.of, self.unit),
            (false, false) => format!("{}/{} {}", self.done, self.of, self.unit),
        }
    }

    /// How many bytes a second came, if bytes are counted and some did.
    fn rate(&self) -> Option<String> {
        let seconds = self.moved.duration_since(self.started).as_secs_f64();
        let came = self.done.saturating_sub(self.before);
        let known = self.unit == BYTES && came > 0 && seconds > 0.0;
        known.then(|| format!("{}/s", table::bytes((came as f64 / seconds) as usize)))
    }

    /// A line of at most `width` columns: the most of it that fits. A full bar is none: what is done in all units and goes on
    /// says so.
    pub fn line(&self, now: Instant, width: usize) -> String {
        let elapsed = time(now.duration_since(self.started));
        if self.of == 0 {
            return fitting(vec![format!("{}, {elapsed}", self.what)], &self.message, width);
        }
        let left = self.guess(now).map(|left| format!(", about {} left", time(left)));
        let (what, units) = (&self.what, self.units());
        let bars = BARS.map(|columns| match self.is_full() {
            true => String::new(),
            false => format!(" {}", bar(self.done, self.of, columns)),
        });
        let (elapsed, none) = (format!(", {elapsed}"), String::new());
        let long = left.as_ref().map_or_else(|| elapsed.clone(), |left| format!("{elapsed}{left}"));
        // One of both is enough where there is little room.
        let short = left.as_ref().unwrap_or(&elapsed);
        let rate = self.rate().map_or_else(String::new, |rate| format!(", {rate}"));
        let line = |bar: &String, time: &String| format!("{what}{bar} {units}{rate}{time}");
        let lines = vec![
            line(&bars[0], &long),
            line(&bars[1], &long),
            line(&bars[1], short),
            line(&none, short),
            format!("{what} {units}{short}"),
            format!("{what} {units}"),
        ];
        fitting(lines, &self.message, width)
    }

    /// A line for a log, with what happened.
    pub fn log_line(&self, now: Instant, happened: &str) -> String {
        let elapsed = time(now.duration_since(self.started));
        let mut parts = match self.of {
            0 => vec![self.what.clone()],
            of if self.unit == BYTES => {
                vec![format!("{} {}", self.what, table::bytes_of(self.done, of))]
            }
            of => vec![format!("{} {}/{of} {}", self.what, self.done, self.unit)],
        };
        let left = match self.left(now) {
            _ if self.is_full() && happened.is_empty() => "finishing".into(),
            Some(left) => format!("about {} left", time(left)),
            None => String::new(),
        };
        parts.extend([
            self.rate().unwrap_or_default(),
            self.message.clone(),
            left,
            happened.to_owned(),
            elapsed,
        ]);
        parts.retain(|part| !part.is_empty());
        parts.join(", ")
    }
}

/// The first of `lines`, the richest first, that fits with the message; without one the first with a part of the message; then the
/// first that fits by itself, or the last, cut.
fn fitting(lines: Vec<String>, message: &str, width: usize) -> String {
    let with = |line: &str| match message {
        "" => line.to_owned(),
        message => format!("{line}, {message}"),
    };
    let cut = |text: &str| truncate_str(text, width, "…").into_owned();
    let fits = |text: &str| measure_text_width(text) <= width;
    if let Some(line) = lines.iter().map(|line| with(line)).find(|line| fits(line)) {
        return line;
    }
    let room = |line: &&String| measure_text_width(line) + 2 + SHORTEST_MESSAGE <= width;
    if let Some(line) = lines.iter().rfind(room).filter(|_| !message.is_empty()) {
        return cut(&with(line));
    }
    match lines.iter().find(|line| fits(line)) {
        Some(line) => line.clone(),
        None => cut(lines.last().map_or("", String::as_str)),
    }
}

/// `[====>     ]`
fn bar(done: usize, of: usize, columns: usize) -> String {
    let filled = (done as u128 * columns as u128 / of.max(1) as u128) as usize;
    // The last column is that of the last unit.
    let filled = filled.min(columns - 1);
    format!("[{}>{}]", "=".repeat(filled), " ".repeat(columns - 1 - filled))
}

/// `7 s`, `1 min 30 s`.
fn time(time: Duration) -> String {
    match time.as_secs_f64().round() {
        seconds if seconds < 60.0 => format!("{seconds} s"),
        seconds => table::seconds(seconds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(done: usize, message: &str) -> (Progress, Instant) {
        let mut progress = Progress::begin("transfer", 48, "steps");
        progress.done = done;
        progress.moved = progress.started + Duration::from_secs(2 * done as u64);
        progress.message = message.into();
        let now = progress.moved + Duration::from_secs(1);
        (progress, now)
    }

    #[test]
    fn a_line_is_no_wider_than_its_terminal() {
        for message in ["", "loss 3.402e-2, 1,370 tokens/s", &"long ".repeat(60)] {
            for done in [0, 1, 47, 48] {
                let (progress, now) = at(done, message);
                for width in 5..250 {
                    let line = progress.line(now, width);
                    assert!(measure_text_width(&line) <= width, "{width}: {line}");
                }
                for width in [66, 186] {
                    let line = progress.line(now, width);
                    assert!(line.starts_with("transfer"), "{line}");
                    assert!(line.contains("steps"), "{line}");
                }
            }
        }
    }

    #[test]
    fn the_most_that_fits_is_shown() {
        let (progress, now) = at(12, "loss 3.4e-2");
        assert_eq!(
            progress.line(now, 186),
            "transfer [=====>              ] 12/48 steps, 25 s, about 1 min 11 s left, loss 3.4e-2"
        );
        assert_eq!(
            progress.line(now, 66),
            "transfer 12/48 steps, about 1 min 11 s left, loss 3.4e-2"
        );
        assert_eq!(progress.line(now, 20), "transfer 12/48 steps");
        assert_eq!(progress.line(now, 8), "transfe…");
    }

    #[test]
    fn bytes_have_their_rate() {
        let mut progress = Progress::begin("model.safetensors", 200 << 20, BYTES);
        assert_eq!(
            progress.line(progress.started, 50),
            "model.safetensors [>         ] 0.0/200.0 MiB, 0 s"
        );
        // An earlier try left 20 MiB.
        (progress.before, progress.done) = (20 << 20, 20 << 20);
        let now = progress.started + Duration::from_secs(10);
        progress.reach(60 << 20, now);
        assert_eq!(
            progress.line(now, 66),
            "model.safetensors 60.0/200.0 MiB, 4.0 MiB/s, about 35 s left"
        );
        assert_eq!(progress.line(now, 52), "model.safetensors 60.0/200.0 MiB, about 35 s left");
        assert_eq!(
            progress.log_line(now, ""),
            "model.safetensors 60.0/200.0 MiB, 4.0 MiB/s, about 35 s left, 10 s"
        );
    }

    #[test]
    fn nothing_is_shown_full_while_it_goes_on() {
        let (progress, now) = at(48, "");
        assert_eq!(progress.line(now, 80), "transfer 48 steps done, finishing, 1 min 37 s");
        assert!(!bar(47, 48, 20).contains("=]") && !bar(usize::MAX, 1, 20).contains("=]"));
    }

    #[test]
    fn what_counts_nothing_shows_its_time() {
        let progress = Progress::begin("org/name", 0, "");
        let now = progress.started + Duration::from_secs(12);
        assert_eq!(progress.line(now, 80), "org/name, 12 s");
        assert_eq!(progress.log_line(now, ""), "org/name, 12 s");
    }

    #[test]
    fn the_time_left_is_that_of_units_like_those_before() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        // A resumed stage: 10 of 20 steps were done before, 3 took 14 seconds.
        let mut progress = Progress::begin("finetune", 20, "steps");
        (progress.before, progress.done) = (10, 10);
        (progress.started, progress.moved) = (start, start);
        assert_eq!(progress.left(after(60)), None);
        (progress.done, progress.moved) = (13, after(14));
        let left_of = |progress: &Progress, now| progress.left(after(now)).unwrap().as_secs_f64();
        let left = |now| left_of(&progress, now);
        assert!((left(14) - 14.0 / 3.0 * 7.0).abs() < 1e-6);
        assert!((left(15) - (14.0 / 3.0 * 7.0 - 1.0)).abs() < 1e-6);
        // The step at work takes very long: six like those before follow it.
        assert!((left(500) - 14.0 / 3.0 * 6.0).abs() < 1e-6);
        // Tokens come many at a time: 256 in a second each time.
        let mut tokens = Progress::begin("text", 1024, "tokens");
        tokens.started = start;
        tokens.reach(256, after(1));
        assert!((left_of(&tokens, 1) - 3.0).abs() < 1e-6);
        assert!((left_of(&tokens, 2) - 2.0).abs() < 1e-6);
        assert!((left_of(&tokens, 9) - 2.0).abs() < 1e-6);
        let line = progress.log_line(after(15), "checkpoint saved");
        assert_eq!(line, "finetune 13/20 steps, about 32 s left, checkpoint saved, 15 s");
    }
}
