//! `still ask`: a question about a document, through the model's own template.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use still_model::{ChatSession, GenerateOptions};

use super::generate::{finish_phrase, finish_word};
use super::generation::{GenerationArgs, GenerationSettings};
use super::input::{read_document, read_piped, unix_lines};
use super::sampling::Usual;
use super::{sessions, stream_to};
use crate::errors::{Interrupted, user};
use crate::interrupt::{self, OnSignal};
use crate::printer::Printer;
use crate::progress::{Bar, ReadingBar};

const EXAMPLES: &str = "\
Examples:
  still ask --model my-student --file report.txt 'Who signed it?'
  still ask --model my-student --file report.txt --session r.still 'Who signed?'
  still ask --model my-student --session r.still 'When?'";

/// `still ask`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct AskArgs {
    /// What to ask
    #[arg(value_name = "QUESTION")]
    question: String,
    /// The document, UTF-8 text; standard input without this and a saved session
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Keep what the model has read in this file: the next question is answered at once
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// System message before the document
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Print one JSON object at the end instead of streaming text
    #[arg(long)]
    json: bool,
    /// Who answers, and how.
    #[command(flatten)]
    generation: GenerationArgs,
}

/// What is asked about what.
#[derive(Debug)]
pub struct Settings {
    generation: GenerationSettings,
    question: String,
    file: Option<PathBuf>,
    session: Option<PathBuf>,
    system: Option<String>,
    json: bool,
}

impl AskArgs {
    /// # Errors
    /// Options that contradict each other; a device that is not there.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        let generation = self.generation.resolve(Usual::Answer)?;
        if self.question.trim().is_empty() {
            return Err(user("the question is empty", "ask something about the document"));
        }
        Ok(Settings {
            generation,
            question: self.question,
            file: self.file,
            session: self.session,
            system: self.system,
            json: self.json,
        })
    }
}

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let saved = settings.session.as_ref().filter(|path| path.exists());
    // Before the model is loaded: a file that is not there, or a place that cannot be written, is said at once.
    if let (Some(path), None) = (&settings.session, saved) {
        sessions::check_place(path, settings.file.as_deref())?;
    }
    let text = match (&settings.file, saved) {
        (Some(file), _) => Some(read_document(file, printer)?),
        (None, Some(_)) => None,
        (None, None) => Some(document_from_stdin(settings, printer)?),
    };
    if text.as_ref().is_some_and(|text| text.trim().is_empty()) {
        return Err(no_text(settings));
    }
    let (generation, system) = (&settings.generation, settings.system.as_deref());
    let model = generation.load(printer)?;
    let mut options = generation.options(&model)?;
    let trained = model.config().max_position_embeddings;
    options.on_read = ReadingBar::of_prompt(printer).within(trained).listener();
    if let Some(path) = saved {
        let session = sessions::open(model, path, generation, system, printer)?;
        if text.is_some_and(|text| !session.knows(&text)) {
            return Err(sessions::differs(path, "document"));
        }
        return answer(&session, settings, &options, printer);
    }
    let rows = generation.rows.told(&model, printer);
    let mut session = ChatSession::new(model, rows, system)?;
    let name = match &settings.file {
        Some(path) => path.display().to_string(),
        None => "standard input".into(),
    };
    sessions::read_document(&mut session, text.unwrap_or_default(), name, printer)?;
    if let Some(path) = &settings.session {
        let bar = Bar::new(printer, "Saving", &path.display().to_string(), 0, "");
        session.save(path)?;
        drop(bar);
        printer
            .step("Saved", format_args!("{}: the next question needs no --file", path.display()));
    }
    answer(&session, settings, &options, printer)
}

/// The error of a document without a word in it.
fn no_text(settings: &Settings) -> anyhow::Error {
    match (&settings.file, &settings.session) {
        (Some(file), _) => user(
            format!("the document is empty: {}", file.display()),
            "give a file with text in it",
        ),
        (None, Some(session)) => no_session(session),
        (None, None) => user(
            "there is no document: standard input is empty",
            "name one with --file, or pipe it in",
        ),
    }
}

fn no_session(session: &Path) -> anyhow::Error {
    user(
        format!("there is no session {} yet", session.display()),
        "give the document with --file: it is read and kept there",
    )
}

fn document_from_stdin(settings: &Settings, printer: &Printer) -> anyhow::Result<String> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        if let Some(session) = &settings.session {
            return Err(no_session(session));
        }
        printer.note("reading the document from the terminal; end it with Ctrl-D");
    }
    Ok(unix_lines(read_piped(stdin.lock(), "standard input")?))
}

fn answer(
    session: &ChatSession,
    settings: &Settings,
    options: &GenerateOptions,
    printer: &Printer,
) -> anyhow::Result<()> {
    interrupt::on_signal(OnSignal::Finish);
    let mut written = Ok(());
    let mut stream = stream_to(printer, !settings.json, &mut written);
    let reply = session.ask(&settings.question, options, &mut stream)?;
    drop(stream);
    written?;
    let generation = &reply.generation;
    if !settings.json {
        printer.stream("\n")?;
    }
    if reply.reread {
        printer.warn("the question changes how the document is cut into tokens: it was read again");
    }
    if let Some(warning) = &generation.warning {
        printer.warn(warning);
    }
    let (cache, dense) = (session.cache_bytes(), session.dense_bytes());
    let new = generation.ids.len();
    if settings.json {
        printer.json(&json!({
            "text": generation.text,
            "finish": finish_word(&generation.finish),
            "document_tokens": session.tokens(),
            "question_tokens": reply.read,
            "new_tokens": new,
            "first_token_seconds": generation.prefill_seconds,
            "decode_seconds": generation.decode_seconds,
            "cache_bytes": cache,
            "dense_cache_bytes": dense,
            "warning": generation.warning,
        }))?;
    } else {
        printer.note(format_args!(
            "first token after {:.2} s, {new} written at {:.1}/s; ended by {}",
            generation.prefill_seconds,
            new as f64 / generation.decode_seconds.max(1e-9),
            finish_phrase(&generation.finish),
        ));
        printer.note(sessions::cache_line(cache, dense));
    }
    match generation.finish {
        still_model::Finish::Interrupted => Err(Interrupted.into()),
        _ => Ok(()),
    }
}
