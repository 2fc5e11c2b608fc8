//! `still chat`: turns with the model's own template; the attention state is kept between them.

use std::io::{BufRead, IsTerminal, Read};

use anyhow::Context;
use clap::Args;
use still_model::{ChatSession, GenerateOptions, ModelError};

use super::generate::summary;
use super::generation::{GenerationArgs, GenerationSettings};
use super::stream_to;
use crate::errors::user;
use crate::interrupt::{self, OnSignal};
use crate::printer::Printer;

/// Most bytes of a message, which is a line.
const MESSAGE_BYTES: u64 = 16 << 20;

const EXAMPLES: &str = "\
Examples:
  still chat --model my-student
  still chat --model my-student --system 'Answer briefly.' --temperature 0.7
  still chat --model org/name --device cuda";

/// `still chat`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ChatArgs {
    /// Who answers, and how.
    #[command(flatten)]
    generation: GenerationArgs,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
}

/// Who is talked to, and how it answers.
#[derive(Debug)]
pub struct Settings {
    generation: GenerationSettings,
    system: Option<String>,
}

impl ChatArgs {
    /// # Errors
    /// Options that contradict each other; a device that is not there.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        Ok(Settings { generation: self.generation.resolve()?, system: self.system })
    }
}

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let GenerationSettings { options, rows, .. } = &settings.generation;
    let model = settings.generation.load(printer)?;
    let mut session = ChatSession::new(model, *rows, settings.system.as_deref())?;
    interrupt::hint("the conversation is not kept: start it again");
    let stdin = std::io::stdin();
    let terminal = stdin.is_terminal();
    if terminal {
        printer
            .note("Ctrl-C cuts a reply short; Ctrl-C between turns, /exit or Ctrl-D ends the chat");
    }
    loop {
        if terminal {
            printer.ask("> ");
        }
        let mut line = String::new();
        let read = stdin.lock().take(MESSAGE_BYTES + 1).read_line(&mut line);
        match read.context("cannot read standard input")? as u64 {
            0 => return Ok(()),
            1..=MESSAGE_BYTES => {}
            _ => {
                return Err(user(
                    format!("a message has more than {} MiB", MESSAGE_BYTES >> 20),
                    "give less in one line",
                ));
            }
        }
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => return Ok(()),
            message => turn(&mut session, message, options, printer)?,
        }
    }
}

fn turn(
    session: &mut ChatSession,
    message: &str,
    options: &GenerateOptions,
    printer: &Printer,
) -> anyhow::Result<()> {
    let mut written = Ok(());
    interrupt::take();
    interrupt::on_signal(OnSignal::Cut);
    let reply = session.send(message, options, &mut stream_to(printer, true, &mut written));
    interrupt::on_signal(OnSignal::End);
    interrupt::take();
    written?;
    let reply = match reply {
        Ok(reply) => reply,
        Err(ModelError::Cancelled) => {
            printer.note("cut while it was read: the message is forgotten, the chat goes on");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    printer.stream("\n")?;
    if reply.reread {
        printer.warn("the chat template rewrote earlier turns, so they were read again");
    }
    if let Some(warning) = &reply.generation.warning {
        printer.warn(warning);
    }
    printer.note(summary(&reply.generation, reply.read, session.cache_bytes()));
    Ok(())
}
