//! Errors of the evaluators.

use std::path::PathBuf;

/// Errors of an evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The text or the context is too short for what was asked.
    #[error("{what} needs {needed} tokens, {got} are there")]
    TooShort {
        /// What was to be measured.
        what: &'static str,
        /// Tokens that it needs.
        needed: usize,
        /// Tokens that were given.
        got: usize,
    },
    /// An argument is out of its range.
    #[error("{0}")]
    Argument(String),
    /// A task is made from a file, and none was given.
    #[error("{task} needs {what}, and no file was given")]
    NoFile {
        /// The task.
        task: &'static str,
        /// What the file holds.
        what: &'static str,
    },
    /// A likelihood is not finite: the model is broken, and a mean over it would hide that.
    #[error("a likelihood is not finite in item {item} of {task}")]
    ItemNotFinite {
        /// The task.
        task: String,
        /// The item.
        item: String,
    },
    /// A data file that is not there.
    #[error("there is no {}", path.display())]
    NoData {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A line that is not what its file should hold.
    #[error("{}, line {line}: {reason}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A log of samples that a run cannot go on with.
    #[error("{}, line {line}: {reason}", path.display())]
    Samples {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as in "cannot read".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] still_model::ModelError),
    /// An error of the tensor library.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl EvalError {
    /// What the user can do. `None` if the user cannot fix it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::TooShort { .. } => Some("give a longer text, or ask for less".into()),
            Self::Argument(_) => Some("correct the option".into()),
            Self::NoFile { .. } => Some(
                "give its path, or leave the task out; docs/long_context.md says what is where"
                    .into(),
            ),
            Self::ItemNotFinite { .. } => {
                Some("the model's weights are broken: train or convert it again".into())
            }
            Self::NoData { .. } => Some(
                "give the directory with the data files as --data-dir; docs/evaluation.md says what they hold"
                    .into(),
            ),
            Self::Data { .. } => {
                Some("the file is damaged or of another format; docs/evaluation.md says what it holds".into())
            }
            Self::Samples { .. } => {
                Some("name another file for --samples, or leave out --resume".into())
            }
            Self::Io { source, .. } => Some(
                still_model::files::io_hint(source.kind())
                    .unwrap_or("check the file and the disk")
                    .into(),
            ),
            Self::Model(error) => error.hint(),
            Self::Tensor(_) => None,
        }
    }
}

/// Result of the evaluators.
pub type Result<T> = std::result::Result<T, EvalError>;
