//! Errors of templates.

/// Why a template failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// It does not parse.
    Syntax,
    /// The template called `raise_exception`; the message is the template's own.
    Raised,
    /// It used a value that is undefined.
    Undefined,
    /// An operation on a value that Python does not allow.
    Type,
    /// An access that the sandbox forbids.
    Security,
    /// Too many steps, too much text, or too deep nesting.
    Limit,
    /// A feature of Jinja that this crate does not support.
    Unsupported,
}

/// An error with the line of the template where it happened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", at(*line, *kind))]
pub struct Error {
    /// Why.
    pub kind: ErrorKind,
    /// In words.
    pub message: String,
    /// The line, from 1.
    pub line: Option<u32>,
}

/// A message of the template itself has no line.
fn at(line: Option<u32>, kind: ErrorKind) -> String {
    match (line, kind) {
        (Some(line), kind) if kind != ErrorKind::Raised => format!("line {line}: "),
        _ => String::new(),
    }
}

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), line: None }
    }

    /// Sets the line unless an inner place has.
    pub(crate) fn on_line(mut self, line: u32) -> Self {
        self.line.get_or_insert(line);
        self
    }
}

pub(crate) fn type_error(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Type, message)
}
