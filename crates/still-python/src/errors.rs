//! Errors as Python's exceptions, which `still/_errors.py` declares.

use std::any::Any;
use std::panic;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use still_cli::{Description, ErrorKind, describe};

/// What the last panic said, and where.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

const REPORT_IT: &str = "this is a bug in still; please report it with the call that led here";

/// Panics become exceptions: they have nothing to say on stderr.
pub fn keep_panics_quiet() {
    panic::set_hook(Box::new(|panic| {
        if still_model::panics_are_expected() {
            return;
        }
        let place = panic.location().map_or_else(String::new, |at| format!(" ({at})"));
        let message = format!("{}{place}", message_of(panic.payload()));
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
    }));
}

fn message_of(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// The exception of an error.
pub fn exception(py: Python<'_>, error: &anyhow::Error) -> PyErr {
    let Description { message, hint, kind } = describe(error);
    match kind {
        ErrorKind::User => new(py, "InputError", &message, &hint),
        ErrorKind::Interrupted => PyKeyboardInterrupt::new_err(()),
        ErrorKind::Internal => new(py, "InternalError", &message, REPORT_IT),
    }
}

/// The exception of a panic.
pub fn panicked(py: Python<'_>, payload: &(dyn Any + Send)) -> PyErr {
    let told = PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
    let message = told.unwrap_or_else(|| message_of(payload).to_owned());
    new(py, "InternalError", &message, REPORT_IT)
}

/// An error of what the caller gave.
pub fn input(py: Python<'_>, message: &str, hint: &str) -> PyErr {
    new(py, "InputError", message, hint)
}

fn new(py: Python<'_>, class: &str, message: &str, hint: &str) -> PyErr {
    let made = py
        .import("still._errors")
        .and_then(|module| module.getattr(class))
        .and_then(|class| class.call1((message, hint)));
    made.map_or_else(|error| error, PyErr::from_value)
}
