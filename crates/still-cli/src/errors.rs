//! Errors on the terminal: one line, a hint, and an exit code that says who can fix it.

use std::error::Error;
use std::fmt;
use std::io;

use still_attention::AttentionError;
use still_eval::EvalError;
use still_model::ModelError;
#[cfg(feature = "serve")]
use still_serve::EngineError;
use still_train::TrainError;

use crate::interrupt::EXIT_INTERRUPTED;
use crate::printer::{self, Printer, StdoutError};
use crate::shown::shown_in_line;

/// All is done.
pub const EXIT_DONE: u8 = 0;
/// The user can fix it: a bad argument, a file that is missing or corrupt, no network.
pub const EXIT_USER: u8 = 1;
/// A bug.
pub const EXIT_INTERNAL: u8 = 2;

const REPORT_IT: &str = "this is a bug in still; please report it with the command that led here";

const NO_DEVICE_MEMORY: &str = "the GPU's memory is full: use --compute-dtype bf16; lower data.length, transfer.batch or finetune.batch \
     and set finetune.recompute when training, --contexts or --batch of bench, --batch-size or --lengths of eval; `nvidia-smi` tells who \
     else has memory";

/// An error that the user can fix.
#[derive(Debug)]
pub struct UserError {
    message: String,
    hint: String,
}

impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for UserError {}

/// Builds a [`UserError`]: what was wrong, and what to do.
pub fn user(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    UserError { message: message.into(), hint: hint.into() }.into()
}

/// That this build was made without one of the crate's features.
#[cfg(not(feature = "serve"))]
pub fn left_out(what: &str, feature: &str) -> anyhow::Error {
    user(
        format!("this build of still has no {what}"),
        format!(
            "build it with the feature `{feature}`, which it has unless --no-default-features is given"
        ),
    )
}

/// A signal, after which the command ended by itself.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Says what happened on stderr and returns the exit code.
pub fn report(printer: &Printer, error: &anyhow::Error) -> u8 {
    if let Some(error) = error.chain().find_map(|cause| cause.downcast_ref::<StdoutError>()) {
        return stdout_ended(printer, error);
    }
    let verdict = judge(error);
    let message = match verdict {
        Verdict::Interrupted => Interrupted.to_string(),
        _ => one_line(error),
    };
    printer.error(&message, Some(verdict.hint()));
    match verdict {
        Verdict::Interrupted => EXIT_INTERRUPTED,
        Verdict::User(_) => EXIT_USER,
        Verdict::Internal => EXIT_INTERNAL,
    }
}

/// What kind of error it is: who can fix it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The user can: a bad argument, a missing or damaged file.
    User,
    /// Nobody needs to: the command was asked to stop.
    Interrupted,
    /// A bug of this project.
    Internal,
}

/// An error as the command reports it.
#[derive(Clone, Debug)]
pub struct Description {
    /// What was wrong, in one line.
    pub message: String,
    /// What to do.
    pub hint: String,
    /// Who can do it.
    pub kind: ErrorKind,
}

/// An error as the command reports it, for programs that report it in their own way.
pub fn describe(error: &anyhow::Error) -> Description {
    let verdict = judge(error);
    let kind = match verdict {
        Verdict::User(_) => ErrorKind::User,
        Verdict::Interrupted => ErrorKind::Interrupted,
        Verdict::Internal => ErrorKind::Internal,
    };
    Description { message: one_line(error), hint: verdict.hint().to_owned(), kind }
}

/// Whether the user can fix an error, and the command may go on.
pub fn is_users(error: &anyhow::Error) -> bool {
    let stdout_ended = error.chain().any(|cause| cause.is::<StdoutError>());
    !stdout_ended && matches!(judge(error), Verdict::User(_))
}

/// Reports an error on stderr; the command goes on.
pub fn tell(printer: &Printer, error: &anyhow::Error) {
    printer.error(&one_line(error), Some(judge(error).hint()));
}

/// Standard output takes no more. Whoever reads it has read enough if it is closed: `still … | head` is no failure. A full disk is
/// one.
pub fn stdout_ended(printer: &Printer, error: &StdoutError) -> u8 {
    if error.is_closed() {
        return EXIT_DONE;
    }
    printer.error(&error.to_string(), Some(io_hint(error.kind())));
    EXIT_USER
}

/// From now on a panic is reported as an internal error, in the same two lines.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        if still_model::panics_are_expected() {
            return;
        }
        let payload = panic.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let message = text
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        let place = panic.location().map_or_else(String::new, |at| format!(" ({at})"));
        let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
        // Nothing that could panic again: no colors, no locks but stderr's.
        printer::say(&format!(
            "error: internal error: {}{place}\nhint: {REPORT_IT}\n",
            shown_in_line(&message)
        ));
    }));
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    User(String),
    Interrupted,
    Internal,
}

impl Verdict {
    fn hint(&self) -> &str {
        match self {
            Self::User(hint) => hint,
            Self::Interrupted => "what was printed is all there is: start it again for the rest",
            Self::Internal => REPORT_IT,
        }
    }
}

/// The first cause that has a hint decides. An error without any is internal.
fn judge(error: &anyhow::Error) -> Verdict {
    // The tensor library's errors are text by the time they are here.
    if error.chain().any(|cause| cause.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY")) {
        return Verdict::User(NO_DEVICE_MEMORY.into());
    }
    error.chain().find_map(verdict_of).unwrap_or(Verdict::Internal)
}

fn verdict_of(cause: &(dyn Error + 'static)) -> Option<Verdict> {
    if let Some(error) = cause.downcast_ref::<UserError>() {
        return Some(Verdict::User(error.hint.clone()));
    }
    if cause.is::<Interrupted>() {
        return Some(Verdict::Interrupted);
    }
    if let Some(error) = cause.downcast_ref::<ModelError>() {
        return Some(of_model(error));
    }
    #[cfg(feature = "serve")]
    if let Some(error) = cause.downcast_ref::<EngineError>() {
        return Some(match error {
            EngineError::Model(error) => of_model(error),
            _ => error.hint().map_or(Verdict::Internal, Verdict::User),
        });
    }
    if let Some(error) = cause.downcast_ref::<EvalError>() {
        return Some(match error {
            EvalError::Model(error) => of_model(error),
            _ => error.hint().map_or(Verdict::Internal, Verdict::User),
        });
    }
    if let Some(error) = cause.downcast_ref::<TrainError>() {
        return Some(of_training(error));
    }
    io_kind(cause).map(|kind| Verdict::User(io_hint(kind).into()))
}

fn of_model(error: &ModelError) -> Verdict {
    let generic = match error {
        ModelError::Cancelled => return Verdict::Interrupted,
        ModelError::Tensor(_) | ModelError::Attention(AttentionError::Tensor(_)) => {
            return Verdict::Internal;
        }
        ModelError::Io { source, .. } => io_hint(source.kind()),
        ModelError::Tokenizer(_) => "check the model's tokenizer files",
        ModelError::ChatTemplate(_) => "check the model's chat template, or use `still generate`",
        _ => "check the model's config.json, or export the model again",
    };
    Verdict::User(error.hint().unwrap_or_else(|| generic.into()))
}

fn of_training(error: &TrainError) -> Verdict {
    let generic = match error {
        TrainError::Model(error) => return of_model(error),
        TrainError::Evaluation(EvalError::Model(error)) => return of_model(error),
        TrainError::Evaluation(EvalError::Tensor(_)) => return Verdict::Internal,
        TrainError::Tensor(_) | TrainError::Attention(AttentionError::Tensor(_)) => {
            return Verdict::Internal;
        }
        TrainError::Io { source, .. } => io_hint(source.kind()),
        _ => "check the recipe's [attention] section against the model",
    };
    Verdict::User(error.hint().filter(|hint| !hint.is_empty()).unwrap_or_else(|| generic.into()))
}

fn io_kind(cause: &(dyn Error + 'static)) -> Option<io::ErrorKind> {
    cause.downcast_ref::<io::Error>().map(io::Error::kind)
}

fn io_hint(kind: io::ErrorKind) -> &'static str {
    still_model::files::io_hint(kind).unwrap_or("check the file and the disk")
}

/// The chain of causes, joined by colons. A cause that the line already contains is left out.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_chain_is_one_line_without_repeats() {
        let error = anyhow::anyhow!("no such\nfile").context("cannot read a.txt: no such\nfile");
        assert_eq!(one_line(&error), "cannot read a.txt: no such file");
        let error = anyhow::anyhow!("inner").context("outer");
        assert_eq!(one_line(&error), "outer: inner");
    }

    #[test]
    fn hints_are_found_below_context() {
        let error: anyhow::Result<()> = Err(user("bad", "do better"));
        let error = error.context("while testing").unwrap_err();
        assert_eq!(judge(&error), Verdict::User("do better".into()));
    }

    #[test]
    fn a_full_gpu_is_the_users_to_empty() {
        let error = r#"DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")"#;
        let error = ModelError::Tensor(candle_core::Error::Msg(error.into()));
        assert_eq!(judge(&error.into()), Verdict::User(NO_DEVICE_MEMORY.into()));
    }

    #[test]
    fn an_error_without_a_hint_is_internal() {
        assert_eq!(judge(&anyhow::anyhow!("surprise")), Verdict::Internal);
    }
}
