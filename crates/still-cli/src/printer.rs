//! The one place that writes to the terminal: results on stdout, everything else on stderr.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use console::style;
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::args::Color;

/// Decides what is said, where and in which colours.
#[derive(Clone, Debug)]
pub struct Printer {
    quiet: bool,
}

impl Printer {
    /// Sets colours and the level of the libraries' log for the whole process.
    pub fn new(quiet: bool, verbose: u8, color: Color) -> Self {
        let colored = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                io::stderr().is_terminal()
                    && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            }
        };
        console::set_colors_enabled_stderr(colored);
        let level = match (quiet, verbose) {
            (true, _) => "error",
            (_, 0) => "warn",
            (_, 1) => "still_model=info,still_train=info,still_eval=info,warn",
            _ => "debug",
        };
        // A second printer in one process (tests) keeps the first one's log.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(level))
            .with_writer(io::stderr)
            .with_ansi(colored)
            .without_time()
            .with_target(verbose > 1)
            .try_init();
        Self { quiet }
    }

    /// Whether bars may be drawn.
    pub fn shows_bars(&self) -> bool {
        !self.quiet && io::stderr().is_terminal()
    }

    /// One line about what is done: a right-aligned verb and the rest.
    pub fn step(&self, verb: &str, message: impl Display) {
        if !self.quiet {
            eprintln!("{} {message}", style(format!("{verb:>12}")).for_stderr().green().bold());
        }
    }

    /// One line that explains or invites, without a verb.
    pub fn note(&self, message: impl Display) {
        if !self.quiet {
            eprintln!("{}", style(message).for_stderr().dim());
        }
    }

    /// A table, as it is.
    pub fn table(&self, table: &str) {
        if !self.quiet {
            eprintln!("{table}");
        }
    }

    /// Text without a line end, such as the prompt of a chat.
    pub fn ask(&self, message: &str) {
        if !self.quiet {
            eprint!("{}", style(message).for_stderr().cyan().bold());
            let _ = io::stderr().flush();
        }
    }

    /// Something that the user should know although the command goes on.
    pub fn warn(&self, message: impl Display) {
        eprintln!("{} {message}", style("warning:").for_stderr().yellow().bold());
    }

    /// Why the command ends, and what to do about it.
    pub fn error(&self, message: &str, hint: Option<&str>) {
        eprintln!("{} {message}", style("error:").for_stderr().red().bold());
        if let Some(hint) = hint {
            eprintln!("{} {hint}", style("hint:").for_stderr().cyan().bold());
        }
    }

    /// A result, on stdout, ended by a newline.
    ///
    /// # Errors
    /// If stdout cannot be written (a closed pipe ends the command quietly).
    pub fn result(&self, text: impl Display) -> io::Result<()> {
        writeln!(io::stdout().lock(), "{text}")
    }

    /// A piece of a streamed result, on stdout at once.
    ///
    /// # Errors
    /// If stdout cannot be written.
    pub fn stream(&self, piece: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(piece.as_bytes())?;
        stdout.flush()
    }

    /// A result as one indented JSON object, on stdout.
    ///
    /// # Errors
    /// If stdout cannot be written.
    pub fn json(&self, value: &impl Serialize) -> anyhow::Result<()> {
        Ok(self.result(serde_json::to_string_pretty(value)?)?)
    }
}
