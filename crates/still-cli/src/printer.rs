//! The one place that writes to the terminal: results on stdout, everything else on stderr.
//!
//! Nothing here fails for want of a stderr: what cannot be said is not said. What comes from outside is escaped
//! ([`crate::shown`]): on stderr always, on stdout where that is a terminal.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use console::style;
use serde::Serialize;

use crate::log;
use crate::progress::suspend;
use crate::shown::{shown, shown_in_line, steers};
use crate::wrap::hanging;

/// When to use colors. Without a description of each value, help is as short as it can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Color {
    Auto,
    Always,
    Never,
}

/// Columns of a line's verb, which is right-aligned in them.
const VERB: usize = 12;

/// Standard output could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write standard output: {0}")]
pub struct StdoutError(#[from] io::Error);

impl StdoutError {
    /// Whoever reads it has read enough.
    pub fn is_closed(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }

    /// The system's word.
    pub fn kind(&self) -> io::ErrorKind {
        self.0.kind()
    }
}

/// Result of writing to stdout.
pub type Written = Result<(), StdoutError>;

/// Decides what is said, where and in which colors.
#[derive(Clone, Debug)]
pub struct Printer {
    quiet: bool,
}

impl Printer {
    /// Sets colors and the level of the libraries' log for the whole process.
    pub fn new(quiet: bool, verbose: u8, color: Color) -> Self {
        let colored = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => io::stderr().is_terminal() && !no_color(),
        };
        console::set_colors_enabled_stderr(colored);
        let printer = Self { quiet };
        log::install(&printer, quiet, verbose);
        printer
    }

    /// Whether nothing but warnings and errors is said.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Whether bars may be drawn.
    pub fn shows_bars(&self) -> bool {
        !self.quiet && io::stderr().is_terminal()
    }

    /// One line about what is done: a right-aligned verb and the rest.
    pub fn step(&self, verb: &str, message: impl Display) {
        if !self.quiet {
            let verb = style(format!("{verb:>VERB$}")).for_stderr().green().bold();
            say_above(&format!("{verb} {}\n", fitted(&message.to_string(), VERB + 1)));
        }
    }

    /// One line that explains or invites, without a verb.
    pub fn note(&self, message: impl Display) {
        if !self.quiet {
            let message = fitted(&message.to_string(), 0);
            say_above(&format!("{}\n", style(message).for_stderr().dim()));
        }
    }

    /// A table, as it is.
    pub fn table(&self, table: &str) {
        if !self.quiet {
            say_above(&format!("{}\n", shown(table)));
        }
    }

    /// Ends a line that is not known to be one, on a terminal.
    pub fn line_end(&self) {
        if self.shows_bars() {
            say("\n");
        }
    }

    /// Something that the user should know although the command goes on.
    pub fn warn(&self, message: impl Display) {
        let message = fitted(&message.to_string(), "warning: ".len());
        let label = style("warning:").for_stderr().yellow().bold();
        say_above(&format!("{label} {message}\n"));
    }

    /// Why the command ends, and what to do about it.
    pub fn error(&self, message: &str, hint: Option<&str>) {
        error(message, hint);
    }

    /// A result, on stdout, ended by a newline.
    ///
    /// # Errors
    /// If stdout cannot be written (a closed pipe ends the command quietly).
    pub fn result(&self, text: impl Display) -> Written {
        self.stream(&format!("{text}\n"))
    }

    /// Help, on stdout, in colors where that is a terminal. It is our own text: nothing in it is escaped.
    ///
    /// # Errors
    /// If stdout cannot be written.
    pub fn help(&self, text: &clap::builder::StyledStr) -> Written {
        let mut stdout = io::stdout().lock();
        match stdout.is_terminal() && !no_color() {
            true => write!(stdout, "{}", text.ansi())?,
            false => write!(stdout, "{text}")?,
        }
        Ok(stdout.flush()?)
    }

    /// A piece of a streamed result, on stdout at once: data as it is, on a terminal with its control characters escaped.
    ///
    /// # Errors
    /// If stdout cannot be written.
    pub fn stream(&self, piece: &str) -> Written {
        let write = |text: &str| -> Written {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes())?;
            Ok(stdout.flush()?)
        };
        match io::stdout().is_terminal() {
            true => suspend(|| write(&shown(piece))),
            false => write(piece),
        }
    }

    /// A result as one indented JSON object, on stdout.
    ///
    /// # Errors
    /// If stdout cannot be written.
    pub fn json(&self, value: &impl Serialize) -> anyhow::Result<()> {
        Ok(self.result(json_escaped(&serde_json::to_string_pretty(value)?))?)
    }

    /// A result as JSON in one line, on stdout.
    ///
    /// # Errors
    /// If stdout cannot be written.
    pub fn json_line(&self, value: &impl Serialize) -> anyhow::Result<()> {
        Ok(self.result(json_escaped(&serde_json::to_string(value)?))?)
    }
}

fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// `error:` and `hint:`, a line each.
pub fn error(message: &str, hint: Option<&str>) {
    let label = style("error:").for_stderr().red().bold();
    let mut lines = format!("{label} {}\n", fitted(message, "error: ".len()));
    if let Some(hint) = hint {
        let label = style("hint:").for_stderr().cyan().bold();
        lines += &format!("{label} {}\n", fitted(hint, "hint: ".len()));
    }
    say_above(&lines);
}

/// A message without control characters. On a terminal it is broken at words where a row ends, `margin` columns after its beginning;
/// elsewhere it is one line, which programs look for.
fn fitted(message: &str, margin: usize) -> String {
    let message = shown_in_line(message);
    match io::stderr().is_terminal() {
        true => hanging(&message, margin, usize::from(console::Term::stderr().size().1)),
        false => message.into_owned(),
    }
}

/// [`say`], of whole lines: a bar that is drawn goes on below them.
fn say_above(lines: &str) {
    suspend(|| say(lines));
}

/// Writes to stderr in one piece. A stderr that is closed or full is no reason to end a run of hours.
pub fn say(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// JSON whose strings steer no terminal: what serde_json leaves as it is (DEL, C1, bidirectional overrides) in JSON's own escapes.
/// Outside of strings there are no such characters.
fn json_escaped(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\n' => escaped.push(c),
            c if steers(c) => escaped += &format!("\\u{:04x}", u32::from(c)),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::json_escaped;

    #[test]
    fn escaped_json_is_the_same_value() {
        let value = serde_json::json!({ "a\u{9b}": ["\u{202e}\u{7f}\u{1b}\n", "é"] });
        let text = json_escaped(&serde_json::to_string_pretty(&value).unwrap());
        assert!(!text.contains(['\u{9b}', '\u{202e}', '\u{7f}', '\u{1b}']), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
