//! `still ask`: a question about a document, through the model's own template.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::OnceLock;

use clap::Args;
use serde_json::json;
use still_model::{Document, Model};

use super::generate::finish_word;
use super::generation::{GenerationArgs, GenerationSettings};
use super::input::{read_piped, read_text_once};
use super::stream_to;
use crate::errors::{Interrupted, user};
use crate::interrupt::{self, OnSignal};
use crate::outputs::Outputs;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table;

const EXAMPLES: &str = "\
Examples:
  still ask --model my-student --file report.txt 'Who signed it?'
  still ask --model my-student --file report.txt --session r.still 'Who signed?'
  still ask --model my-student --session r.still 'When?'";

/// `still ask`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct AskArgs {
    /// Who answers, and how.
    #[command(flatten)]
    generation: GenerationArgs,
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
    /// Options that contradict each other; a device that is not there, or that sessions cannot be kept from.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        let generation = self.generation.resolve()?;
        if self.question.trim().is_empty() {
            return Err(user("the question is empty", "ask something about the document"));
        }
        if self.session.is_some() && !generation.on_cpu() {
            return Err(user(
                "a session cannot be kept from a GPU yet",
                "leave --session out, or use --device cpu",
            ));
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
        let mut outputs = Outputs::default();
        outputs.spare(settings.file.as_deref())?;
        outputs.place("--session", path)?;
    }
    let text = match (&settings.file, saved) {
        (Some(file), _) => Some(read_text_once(file, printer)?),
        (None, Some(_)) => None,
        (None, None) => Some(document_from_stdin(settings, printer)?),
    };
    if text.as_ref().is_some_and(|text| text.trim().is_empty()) {
        return Err(user("the document is empty", "give a file with text in it"));
    }
    let model = settings.generation.load(printer)?;
    let (document, fresh) = match saved {
        Some(path) => {
            let document = Document::open(model, path)?;
            check_same(&document, settings, text.as_deref())?;
            printer
                .step("Opened", format_args!("{}: {} tokens", path.display(), document.tokens()));
            (document, false)
        }
        None => (read(model, settings, text.unwrap_or_default(), printer)?, true),
    };
    if let Some(path) = settings.session.as_ref().filter(|_| fresh) {
        document.save(path)?;
        printer
            .step("Saved", format_args!("{}: the next question needs no --file", path.display()));
    }
    answer(&document, settings, printer)
}

fn document_from_stdin(settings: &Settings, printer: &Printer) -> anyhow::Result<String> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        if let Some(session) = &settings.session {
            return Err(user(
                format!("there is no session {} yet", session.display()),
                "give the document with --file: it is read and kept there",
            ));
        }
        printer.note("reading the document from the terminal; end it with Ctrl-D");
    }
    read_piped(stdin.lock(), "standard input")
}

/// An error if a session is of something else than what was asked for.
fn check_same(document: &Document, settings: &Settings, text: Option<&str>) -> anyhow::Result<()> {
    let session = settings.session.as_deref().unwrap_or("".as_ref()).display();
    let other = |what: &str| {
        user(
            format!("the session {session} has another {what}"),
            "name another --session file, or remove this one to read again",
        )
    };
    if text.is_some_and(|text| text != document.text()) {
        return Err(other("document"));
    }
    match &settings.system {
        Some(system) if Some(system.as_str()) != document.system() => Err(other("system message")),
        _ => Ok(()),
    }
}

/// Has the model read the document.
fn read(
    model: Model,
    settings: &Settings,
    text: String,
    printer: &Printer,
) -> anyhow::Result<Document> {
    let name = match &settings.file {
        Some(path) => path.display().to_string(),
        None => "standard input".into(),
    };
    let bar = OnceLock::new();
    let rows = settings.generation.rows;
    let (system, cancel) = (settings.system.clone(), interrupt::flag());
    let document = Document::read(model, rows, text, system, &cancel, |new, total| {
        bar.get_or_init(|| Bar::new(printer, "Reading", &name, total, "tokens")).advance(new);
    })?;
    if let Some(bar) = bar.into_inner() {
        let speed = document.tokens() as f64 / bar.seconds().max(1e-9);
        bar.done(format_args!("{name}: {} tokens, {speed:.0}/s,", document.tokens()));
    }
    Ok(document)
}

fn answer(document: &Document, settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    interrupt::on_signal(OnSignal::Finish);
    let mut written = Ok(());
    let mut stream = stream_to(printer, !settings.json, &mut written);
    let answer = document.ask(&settings.question, &settings.generation.options, &mut stream)?;
    drop(stream);
    written?;
    let generation = &answer.generation;
    if answer.reread {
        printer.warn("the question changes how the document is cut into tokens: it was read again");
    }
    if let Some(warning) = &generation.warning {
        printer.warn(warning);
    }
    let (cache, dense) = (document.cache_bytes(), document.dense_bytes());
    let new = generation.ids.len();
    if settings.json {
        printer.json(&json!({
            "text": generation.text,
            "finish": finish_word(&generation.finish),
            "document_tokens": document.tokens(),
            "question_tokens": answer.read,
            "new_tokens": new,
            "first_token_seconds": generation.prefill_seconds,
            "decode_seconds": generation.decode_seconds,
            "cache_bytes": cache,
            "dense_cache_bytes": dense,
            "warning": generation.warning,
        }))?;
    } else {
        printer.stream("\n")?;
        printer.note(format_args!(
            "first token after {:.2} s, {new} written at {:.1}/s; cache {} of {} dense, {:.0} %; ended by {}",
            generation.prefill_seconds,
            new as f64 / generation.decode_seconds.max(1e-9),
            table::bytes(cache),
            table::bytes(dense),
            100.0 * cache as f64 / dense.max(1) as f64,
            super::generate::finish_phrase(&generation.finish),
        ));
    }
    match generation.finish {
        still_model::Finish::Interrupted => Err(Interrupted.into()),
        _ => Ok(()),
    }
}
