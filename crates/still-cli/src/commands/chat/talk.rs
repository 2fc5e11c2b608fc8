//! Turns and slash commands of a chat.

use std::path::{Path, PathBuf};

use still_model::{ChatSession, Finish, GenerateOptions, ModelError, Reply};

use super::super::generate::finish_phrase;
use super::super::input::read_document;
use super::super::{sampling, sessions, stream_to};
use super::command::{Command, HELP};
use crate::errors::{Interrupted, user};
use crate::interrupt::{self, OnSignal};
use crate::outputs::{Existing, OutputKind, Outputs};
use crate::printer::Printer;
use crate::progress::ReadingBar;
use crate::table;

/// What comes after a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another one.
    Message,
    /// The end of the chat.
    End,
}

/// A conversation, and where it is kept.
pub struct Talk<'a> {
    session: ChatSession,
    /// The session's own file, which every turn is saved to.
    place: Option<PathBuf>,
    options: GenerateOptions,
    printer: &'a Printer,
    /// Replies so far: each samples by a seed of its own.
    replies: u64,
    /// Tokens and seconds of decoding so far.
    decoded: (usize, f64),
}

impl<'a> Talk<'a> {
    pub fn new(
        session: ChatSession,
        place: Option<PathBuf>,
        options: GenerateOptions,
        printer: &'a Printer,
    ) -> Self {
        Self { session, place, options, printer, replies: 0, decoded: (0, 0.0) }
    }

    /// How tokens are chosen.
    pub fn options(&self) -> &GenerateOptions {
        &self.options
    }

    /// What is left if the process ends now, as a hint.
    pub fn after_the_end(&self) -> String {
        match self.place.as_ref().filter(|path| path.exists()) {
            Some(path) => {
                format!("{} has the conversation up to the last reply", path.display())
            }
            None => "the conversation is not kept: start it again, with --session FILE".into(),
        }
    }

    /// Reads the document of `--file`, unless the session has read it.
    pub fn begin_with(&mut self, text: String, file: &Path) -> anyhow::Result<()> {
        if self.session.knows(&text) {
            return Ok(());
        }
        self.read(text, file)?;
        self.keep()
    }

    fn read(&mut self, text: String, file: &Path) -> anyhow::Result<()> {
        if text.trim().is_empty() {
            return Err(user(
                format!("the document is empty: {}", file.display()),
                "give a file with text in it",
            ));
        }
        let name = file.display().to_string();
        sessions::read_document(&mut self.session, text, name, self.printer)
    }

    /// One message, and no more: it came through a pipe.
    pub fn only_turn(&mut self, message: &str) -> anyhow::Result<()> {
        interrupt::on_signal(OnSignal::Finish);
        let reply = self.reply(message)?;
        match reply.generation.finish {
            Finish::Interrupted => Err(Interrupted.into()),
            _ => Ok(()),
        }
    }

    /// One message among others.
    pub fn turn(&mut self, message: &str) -> anyhow::Result<()> {
        let done = self.reply(message);
        // It has been told, whoever it came to.
        interrupt::take();
        match done.map(drop) {
            Err(error) if is_cancelled(&error) => {
                self.printer.note(
                    "cut by Ctrl-C while it was read: the message is forgotten, the chat goes on",
                );
                Ok(())
            }
            done => done,
        }
    }

    fn reply(&mut self, message: &str) -> anyhow::Result<Reply> {
        let mut options = self.options.clone();
        options.seed = options.seed.wrapping_add(self.replies);
        let trained = self.session.trained_tokens();
        options.on_read = ReadingBar::of_prompt(self.printer).within(trained).listener();
        let mut written = Ok(());
        let mut stream = stream_to(self.printer, true, &mut written);
        let reply = self.session.send(message, &options, &mut stream);
        drop(stream);
        written?;
        let reply = reply?;
        self.replies += 1;
        self.decoded.0 += reply.generation.ids.len();
        self.decoded.1 += reply.generation.decode_seconds;
        self.printer.stream("\n")?;
        self.tell(&reply);
        self.keep()?;
        Ok(reply)
    }

    fn tell(&self, reply: &Reply) {
        let (printer, generation) = (self.printer, &reply.generation);
        if reply.reread {
            printer.warn("earlier turns are rendered differently now, so they were read again");
        }
        if let Some(warning) = &generation.warning {
            printer.warn(warning);
        }
        let new = generation.ids.len();
        printer.note(format_args!(
            "{} tokens read, first token after {:.2} s, {new} written at {:.1}/s",
            reply.read,
            generation.prefill_seconds,
            new as f64 / generation.decode_seconds.max(1e-9),
        ));
        let cache = sessions::cache_line(self.session.cache_bytes(), self.session.dense_bytes());
        printer.note(match &generation.finish {
            Finish::Interrupted => format!("{cache}; cut short by Ctrl-C"),
            Finish::Length => format!("{cache}; ended by {}", finish_phrase(&generation.finish)),
            _ => cache,
        });
    }

    /// Saves the session in its own file.
    fn keep(&self) -> anyhow::Result<()> {
        match &self.place {
            Some(path) => Ok(self.session.save(path)?),
            None => Ok(()),
        }
    }

    /// Does what a command says.
    pub fn obey(&mut self, command: Command) -> anyhow::Result<Next> {
        match command {
            Command::Help => self.printer.table(HELP),
            Command::Quit => return Ok(Next::End),
            Command::Stats => self.stats(),
            Command::Clear => {
                self.session.clear()?;
                self.printer.step("Cleared", "the conversation");
            }
            Command::System(text) => self.system(text.as_deref()),
            Command::File(path) => {
                let text = read_document(&path, self.printer)?;
                let read = self.read(text, &path);
                interrupt::take();
                match read {
                    Err(error) if is_cancelled(&error) => self
                        .printer
                        .note("cut by Ctrl-C: the document is forgotten, the chat goes on"),
                    read => {
                        read?;
                        self.keep()?;
                    }
                }
            }
            Command::Save(path) => self.save(path)?,
            Command::Load(path) => {
                self.session.load(&path)?;
                let (name, tokens) = (path.display(), self.session.tokens());
                self.printer
                    .step("Loaded", format_args!("{name}: {} tokens", table::count(tokens)));
            }
        }
        Ok(Next::Message)
    }

    fn system(&mut self, text: Option<&str>) {
        self.session.set_system(text);
        let what = if text.is_some() { "changed" } else { "taken away" };
        let again = match self.session.tokens() {
            0 => "",
            _ => "; the next message reads everything again",
        };
        self.printer.step("System", format_args!("message {what}{again}"));
    }

    fn save(&mut self, path: Option<PathBuf>) -> anyhow::Result<()> {
        let Some(path) = path.or_else(|| self.place.clone()) else {
            return Err(user(
                "/save needs a file",
                "type /save FILE, or start with --session FILE",
            ));
        };
        Outputs::default().file("file for /save", &path, OutputKind::Session, Existing::Replace)?;
        self.session.save(&path)?;
        self.printer.step("Saved", path.display());
        Ok(())
    }

    fn stats(&self) {
        let (session, (tokens, seconds)) = (&self.session, self.decoded);
        let said = session.messages().iter().filter(|message| message.role() == "user").count();
        let noun = if said == 1 { "message" } else { "messages" };
        let document = if session.document().is_some() { ", a document to ask about" } else { "" };
        let mut lines = vec![
            format!("{said} {noun}, {} tokens{document}", table::count(session.tokens())),
            sessions::cache_line(session.cache_bytes(), session.dense_bytes()),
            format!("sampling: {}", sampling::in_words(&self.options)),
        ];
        if tokens > 0 {
            let speed = tokens as f64 / seconds.max(1e-9);
            lines.push(format!("{tokens} tokens written at {speed:.1}/s"));
        }
        if let Some(path) = &self.place {
            lines.push(format!("kept in {}", path.display()));
        }
        self.printer.table(&lines.join("\n"));
    }
}

fn is_cancelled(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ModelError::Cancelled))
}
