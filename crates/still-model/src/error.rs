//! Errors of loading, running and saving models.

use std::path::{Path, PathBuf};

use still_attention::AttentionError;

use crate::files::io_hint;

/// Errors of a model. The message says what is wrong and where; [`ModelError::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file or directory could not be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as in "cannot read".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file is damaged or of another kind.
    #[error("{}: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// A valid model, file or option that this project does not support.
    #[error("{what} is not supported{}", at(found_in))]
    Unsupported {
        /// The thing, by its own name.
        what: String,
        /// The file in which it was found, if any.
        found_in: Option<PathBuf>,
        /// What to do.
        hint: String,
    },
    /// A value that contradicts another.
    #[error("{0}")]
    Invalid(String),
    /// A model could not be found or fetched.
    #[error("{what}")]
    NotFound {
        /// What was looked for and where.
        what: String,
        /// What to do.
        hint: String,
    },
    /// The tokenizer library refused something.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template could not be rendered.
    #[error("chat template: {0}")]
    ChatTemplate(String),
    /// The caller's [`Cancel`](crate::Cancel) was raised.
    #[error("cancelled")]
    Cancelled,
    /// Another thread of the same work failed; that thread has the error that says why.
    #[error(transparent)]
    Threads(#[from] still_compute::threads::Failed),
    /// An error of the operator.
    #[error(transparent)]
    Attention(#[from] still_attention::AttentionError),
    /// An error of the tensor library.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

fn at(path: &Option<PathBuf>) -> String {
    path.as_ref().map(|path| format!(" (in {})", path.display())).unwrap_or_default()
}

/// The error without the backtrace that `RUST_BACKTRACE` adds to its text.
fn plain(error: candle_core::Error) -> candle_core::Error {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => plain(*inner),
        other => other,
    }
}

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, ModelError>;

impl ModelError {
    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Corrupt { hint, .. }
            | Self::Unsupported { hint, .. }
            | Self::NotFound { hint, .. } => Some(hint.clone()),
            Self::Io { source, .. } => io_hint(source.kind()).map(Into::into),
            _ => None,
        }
    }

    /// For `map_err` on reading.
    pub fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        Self::io("cannot read", path)
    }

    /// For `map_err` on writing.
    pub fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        Self::io("cannot write", path)
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// This error as one of loading `path`. An error of the tensor library then means a damaged file; while computing it means a
    /// bug.
    #[must_use]
    pub fn while_loading(self, path: &Path) -> Self {
        let error = match self {
            Self::Tensor(error) | Self::Attention(AttentionError::Tensor(error)) => error,
            other => return other,
        };
        match plain(error) {
            // The device's, whatever the file.
            error @ candle_core::Error::Cuda(_) => Self::Tensor(error),
            error => Self::corrupt(path, error.to_string()),
        }
    }

    /// A broken file and the usual advice.
    pub fn corrupt(path: &Path, reason: impl Into<String>) -> Self {
        Self::Corrupt {
            path: path.to_path_buf(),
            reason: reason.into(),
            hint: "the file is damaged or incomplete: fetch or export it again".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One error of the tensor library is a file's or ours, by where it was met.
    #[test]
    fn errors_of_loading_are_the_files() {
        let error = || candle_core::Error::Msg("unexpected shape".into()).bt();
        let path = Path::new("model.gguf");
        for met in
            [ModelError::Tensor(error()), ModelError::Attention(AttentionError::Tensor(error()))]
        {
            let told = met.while_loading(path);
            assert!(matches!(&told, ModelError::Corrupt { .. }), "{told:?}");
            assert_eq!(told.to_string(), "model.gguf: unexpected shape");
            assert!(told.hint().is_some());
        }
        let device = ModelError::Tensor(candle_core::Error::Cuda("no memory".into()));
        assert!(matches!(device.while_loading(path), ModelError::Tensor(_)));
        let invalid = ModelError::Invalid("x".into()).while_loading(path);
        assert!(matches!(invalid, ModelError::Invalid(_)));
    }
}
