//! Errors of the evaluators.

/// What can go wrong in an evaluation.
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
    /// A number that must be finite is not: the model is broken, and a mean over it would hide that.
    #[error("{what} is not finite at token {token} of window {window}")]
    NotFinite {
        /// What was computed.
        what: &'static str,
        /// The window.
        window: usize,
        /// The token's position in it.
        token: usize,
    },
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] still_model::ModelError),
    /// An error of the tensor library.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl EvalError {
    /// What the user can do about it; `None` if the error is not the user's to mend.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::TooShort { .. } => Some("give a longer text, or ask for less".into()),
            Self::Argument(_) => Some("mend the option".into()),
            Self::NotFinite { .. } => {
                Some("the model's weights are broken: train or convert it again".into())
            }
            Self::Model(error) => error.hint(),
            Self::Tensor(_) => None,
        }
    }
}

/// Result of the evaluators.
pub type Result<T> = std::result::Result<T, EvalError>;
