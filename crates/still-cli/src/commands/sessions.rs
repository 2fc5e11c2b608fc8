//! Sessions that `still ask` and `still chat` keep in files.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use still_model::{ChatSession, Model};

use super::generation::GenerationSettings;
use crate::errors::user;
use crate::interrupt;
use crate::outputs::{Existing, OutputKind, Outputs};
use crate::printer::Printer;
use crate::progress::{Bar, ReadingBar};
use crate::table;

/// Finds out, before a model is loaded, whether a session can be kept in a file: in place of none, or of another session.
///
/// # Errors
/// A place that cannot be written; a file of another kind; a file that is read.
pub fn check_place(path: &Path, read: Option<&Path>) -> anyhow::Result<()> {
    let mut outputs = Outputs::default();
    outputs.spare(read)?;
    outputs.file("--session", path, OutputKind::Session, Existing::Replace)
}

/// Opens a session that is there.
///
/// # Errors
/// A file that is damaged or of another model; another system message or row format than was asked for.
pub fn open(
    model: Model,
    path: &Path,
    generation: &GenerationSettings,
    system: Option<&str>,
    printer: &Printer,
) -> anyhow::Result<ChatSession> {
    let bar = Bar::new(printer, "Opening", &path.display().to_string(), 0, "");
    let session = ChatSession::open(model, path)?;
    drop(bar);
    if let Some(asked) = generation.rows.asked.filter(|&asked| asked != session.rows()) {
        return Err(user(
            format!(
                "--cache-dtype is {}, and the session {} keeps its rows in {}",
                asked.name(),
                path.display(),
                session.rows().name()
            ),
            "leave --cache-dtype out, or name another --session file to read again",
        ));
    }
    if system.is_some() && system != session.system() {
        return Err(differs(path, "system message"));
    }
    printer.step(
        "Opened",
        format_args!("{}: {} tokens", path.display(), table::count(session.tokens())),
    );
    Ok(session)
}

/// The error of a session that is of something else than what was asked for.
pub fn differs(path: &Path, what: &str) -> anyhow::Error {
    user(
        format!("the session {} has another {what}", path.display()),
        "name another --session file, or remove this one to read again",
    )
}

/// Has the model read a document, with a bar.
///
/// # Errors
/// What the template refuses; Ctrl-C.
pub fn read_document(
    session: &mut ChatSession,
    text: String,
    name: String,
    printer: &Printer,
) -> anyhow::Result<()> {
    // Until it is known how many tokens there are.
    let encoding = Mutex::new(Some(Bar::new(printer, "Reading", &name, 0, "")));
    let bar = ReadingBar::of_document(printer, name).within(session.trained_tokens());
    let (replaces, said) = (session.document().is_some(), !session.is_new());
    let reread = session.read_document(text, &interrupt::flag(), |new, total| {
        drop(encoding.lock().unwrap_or_else(PoisonError::into_inner).take());
        bar.advance(new, total);
    })?;
    bar.done();
    if replaces {
        printer.warn("the document before it was not asked about: this one takes its place");
    }
    if reread && said {
        printer.warn("the conversation before the document was read again");
    }
    Ok(())
}

/// `cache 14.4 MiB of 47.4 MiB dense, 30 %`
pub fn cache_line(cache_bytes: usize, dense_bytes: usize) -> String {
    let cache = format!("cache {}", table::bytes(cache_bytes));
    if dense_bytes == 0 {
        return cache;
    }
    let share = 100.0 * cache_bytes as f64 / dense_bytes as f64;
    format!("{cache} of {} dense, {share:.0} %", table::bytes(dense_bytes))
}
