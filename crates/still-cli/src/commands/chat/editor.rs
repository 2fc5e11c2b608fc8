//! The line editor: history, completion, and messages of several lines.

use std::borrow::Cow;
use std::path::PathBuf;

use console::style;
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::config::{Behavior, CompletionType, Config};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{ColorMode, Context, Helper};

use super::command::WORDS;
use crate::printer::Printer;
use crate::terminal;

const PROMPT: &str = "> ";
/// Lines that are remembered.
const LINES: usize = 1000;
/// Commands whose argument is a file.
const OF_FILES: [&str; 3] = ["/file ", "/save ", "/load "];

/// What was typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// A message or a command, perhaps of several lines.
    Message(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D.
    End,
}

/// A line editor on the terminal.
pub struct Editor {
    lines: rustyline::Editor<Help, FileHistory>,
    /// Where what was typed is remembered.
    history: Option<PathBuf>,
}

impl Editor {
    /// # Errors
    /// A terminal that cannot be edited on.
    pub fn new(remember: bool, printer: &Printer) -> anyhow::Result<Self> {
        let colors = console::colors_enabled_stderr();
        let config = Config::builder()
            .max_history_size(LINES)?
            .history_ignore_space(true)
            .completion_type(CompletionType::List)
            .color_mode(if colors { ColorMode::Enabled } else { ColorMode::Disabled })
            // Standard output is for replies.
            .behavior(Behavior::PreferTerm)
            .build();
        terminal::remember();
        let mut lines = rustyline::Editor::with_config(config)?;
        lines.set_helper(Some(Help { colors, files: FilenameCompleter::new() }));
        let history = if remember { history_file(printer) } else { None };
        if let Some(path) = history.as_ref().filter(|path| path.exists())
            && let Err(error) = lines.load_history(path)
        {
            printer.warn(format_args!("cannot read {}: {error}", path.display()));
        }
        Ok(Self { lines, history })
    }

    /// Waits for a message.
    ///
    /// # Errors
    /// A terminal that is gone.
    pub fn read(&mut self) -> anyhow::Result<Input> {
        let line = match self.lines.readline(PROMPT) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => return Ok(Input::Interrupted),
            Err(ReadlineError::Eof) => return Ok(Input::End),
            Err(error) => return Err(anyhow::Error::new(error).context("cannot read the terminal")),
        };
        let added = self.lines.add_history_entry(&line)?;
        if let Some(path) = self.history.as_ref().filter(|_| added) {
            // A chat is no worse for want of what the next one could recall.
            let _ = self.lines.append_history(path);
        }
        Ok(Input::Message(line.replace("\\\n", "\n")))
    }
}

/// The file that what is typed is remembered in; none where it cannot be.
fn history_file(printer: &Printer) -> Option<PathBuf> {
    let made = still_model::fetch::cache_dir().and_then(|dir| {
        std::fs::create_dir_all(&dir).map_err(still_model::ModelError::write(&dir))?;
        Ok(dir.join("chat_history"))
    });
    made.inspect_err(|error| printer.warn(format_args!("what is typed is not remembered: {error}")))
        .ok()
}

/// Completion, the prompt's color, and lines that go on.
struct Help {
    colors: bool,
    files: FilenameCompleter,
}

impl Helper for Help {}

impl Hinter for Help {
    type Hint = String;
}

impl Completer for Help {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        if OF_FILES.iter().any(|command| line.starts_with(command)) {
            return self.files.complete_path(line, pos);
        }
        let typed = &line[..pos];
        let words = WORDS.iter().filter(|word| typed.starts_with('/') && word.starts_with(typed));
        let pair = |word: &&str| Pair { display: (*word).into(), replacement: (*word).into() };
        Ok((0, words.map(pair).collect()))
    }
}

impl Highlighter for Help {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _: bool) -> Cow<'b, str> {
        match self.colors {
            true => style(prompt).for_stderr().cyan().bold().to_string().into(),
            false => prompt.into(),
        }
    }
}

impl Validator for Help {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(match context.input().ends_with('\\') {
            true => ValidationResult::Incomplete,
            false => ValidationResult::Valid(None),
        })
    }
}
