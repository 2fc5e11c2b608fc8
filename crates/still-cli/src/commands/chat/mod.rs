//! `still chat`: a conversation in the model's own template, which keeps its attention state between turns.
//!
//! | file | content |
//! |---|---|
//! | `talk` | turns, and what commands do |
//! | `command` | what begins with a slash |
//! | `editor` | the line that is typed |

mod command;
mod editor;
mod talk;

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use still_model::ChatSession;

use self::command::Command;
use self::editor::{Editor, Input};
use self::talk::{Next, Talk};
use super::generation::{GenerationArgs, GenerationSettings};
use super::input::{read_document, read_message};
use super::sampling::{self, Usual};
use super::sessions;
use crate::errors::{self, user};
use crate::interrupt::{self, OnSignal};
use crate::printer::Printer;
use crate::terminal::NoEcho;

const EXAMPLES: &str = "\
Examples:
  still chat --model my-student
  still chat --model my-student --file report.txt --session report.still
  still chat --model my-student --system 'Answer briefly.' --temperature 0.7
  still chat --model org/name --device cuda";

/// `still chat`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ChatArgs {
    /// A document that the first message is about, UTF-8 text
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Keep the conversation in this file, and go on with what is there
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Do not keep what is typed for the next chat's arrow keys
    #[arg(long)]
    no_history: bool,
    /// Who answers, and how.
    #[command(flatten)]
    generation: GenerationArgs,
}

/// Who is talked to, and how it answers.
#[derive(Debug)]
pub struct Settings {
    generation: GenerationSettings,
    file: Option<PathBuf>,
    session: Option<PathBuf>,
    system: Option<String>,
    history: bool,
}

impl ChatArgs {
    /// # Errors
    /// Options that contradict each other; a device that is not there.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        let generation = self.generation.resolve(Usual::Chat)?;
        Ok(Settings {
            generation,
            file: self.file,
            session: self.session,
            system: self.system,
            history: !self.no_history,
        })
    }
}

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let Settings { generation, file, session: place, system, history } = settings;
    // Before the model is loaded: what cannot be read or written is said at once.
    if let Some(path) = place {
        sessions::check_place(path, file.as_deref())?;
    }
    let document = file.as_deref().map(|file| read_document(file, printer)).transpose()?;
    let terminal = std::io::stdin().is_terminal();
    let message = if terminal { None } else { Some(read_message(std::io::stdin().lock())?) };
    if message.as_ref().is_some_and(|message| message.trim().is_empty()) {
        return Err(user("standard input has no message", "pipe one in, or start from a terminal"));
    }
    let model = generation.load(printer)?;
    let options = generation.options(&model)?;
    let session = match place.as_deref().filter(|path| path.exists()) {
        Some(path) => sessions::open(model, path, generation, system.as_deref(), printer)?,
        None => {
            let rows = generation.rows.told(&model, printer);
            ChatSession::new(model, rows, system.as_deref())?
        }
    };
    let mut talk = Talk::new(session, place.clone(), options, printer);
    if let (Some(text), Some(file)) = (document, file) {
        talk.begin_with(text, file)?;
    }
    match message {
        Some(message) => talk.only_turn(message.trim()),
        None => {
            printer.note(format_args!("sampling: {}", sampling::in_words(talk.options())));
            printer.note("/help lists commands; Ctrl-C cuts a reply short; Ctrl-D ends the chat");
            converse(&mut talk, *history, printer)
        }
    }
}

/// Turns until the user has enough.
fn converse(talk: &mut Talk<'_>, history: bool, printer: &Printer) -> anyhow::Result<()> {
    let mut editor = Editor::new(history, printer)?;
    // Also between turns: Ctrl-C may come a moment after the reply has ended.
    interrupt::on_signal(OnSignal::Cut);
    let mut pressed = false;
    loop {
        interrupt::hint(talk.after_the_end());
        let input = if interrupt::take() { Input::Interrupted } else { editor.read()? };
        let message = match input {
            Input::End => return Ok(()),
            Input::Interrupted if pressed => {
                printer.note("ended by Ctrl-C");
                return Ok(());
            }
            Input::Interrupted => {
                pressed = true;
                printer.note("Ctrl-C once more, Ctrl-D or /quit ends the chat");
                continue;
            }
            Input::Message(message) => message,
        };
        pressed = false;
        let silent = NoEcho::begin();
        let done = match Command::parse(&message) {
            _ if message.trim().is_empty() => continue,
            None => talk.turn(message.trim()).map(|()| Next::Message),
            Some(Ok(command)) => talk.obey(command),
            Some(Err(error)) => Err(error),
        };
        drop(silent);
        match done {
            Ok(Next::End) => return Ok(()),
            Ok(Next::Message) => {}
            // The chat outlives errors that the user can fix.
            Err(error) if errors::is_users(&error) => errors::tell(printer, &error),
            Err(error) => return Err(error),
        }
    }
}
