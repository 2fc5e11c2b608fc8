//! Errors of training.

use std::path::{Path, PathBuf};

use still_model::files::io_hint;

/// Errors of a run. The message says what is wrong and where; [`TrainError::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// An invalid recipe.
    #[error("recipe: {what}")]
    Recipe {
        /// What is wrong with it.
        what: String,
        /// What to do.
        hint: String,
    },
    /// Invalid training data.
    #[error("{}: {what}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        hint: String,
    },
    /// A loss or gradient that is not a number: the step was not taken.
    #[error("{stage} step {step}: {what} is {value}; the step was not taken")]
    NotFinite {
        /// The stage.
        stage: &'static str,
        /// The step that was refused.
        step: usize,
        /// Loss or gradient norm.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// Budgets that cannot be calibrated, or do not fit.
    #[error("budgets: {what}")]
    Calibration {
        /// What is wrong.
        what: String,
        /// What to do.
        hint: String,
    },
    /// A run directory in the wrong state.
    #[error("{}: {what}", path.display())]
    Run {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        hint: String,
    },
    /// The observer asked to stop. A checkpoint is saved.
    #[error("stopped at {stage} step {step}; saved in {}", path.display())]
    Interrupted {
        /// The stage.
        stage: &'static str,
        /// Steps done in it.
        step: usize,
        /// The checkpoint.
        path: PathBuf,
    },
    /// The run was stopped because it diverged. A checkpoint is saved.
    #[error("{stage} step {step}: {what}; saved in {}", path.display())]
    Diverged {
        /// The stage.
        stage: &'static str,
        /// Steps done in it.
        step: usize,
        /// The sign of divergence.
        what: String,
        /// The checkpoint.
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] still_model::ModelError),
    /// An error of an evaluator.
    #[error(transparent)]
    Evaluation(#[from] still_eval::EvalError),
    /// An error of the operator.
    #[error(transparent)]
    Attention(#[from] still_attention::AttentionError),
    /// An error of the tensor library.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, TrainError>;

impl TrainError {
    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Recipe { hint, .. }
            | Self::Data { hint, .. }
            | Self::Calibration { hint, .. }
            | Self::Run { hint, .. } => Some(hint.clone()),
            Self::NotFinite { .. } => {
                Some("lower the learning rate, or look for damaged data".into())
            }
            Self::Interrupted { .. } => {
                Some("the same command with --resume goes on from here".into())
            }
            Self::Diverged { stage, .. } => Some(format!(
                "start again with a lower {stage}.optimizer.lr, a longer {stage}.optimizer.warmup or a lower \
                 {stage}.optimizer.clip; look for damaged data; or loosen [guard]"
            )),
            Self::Evaluation(error) => error.hint(),
            Self::Io { source, .. } => io_hint(source.kind()).map(Into::into),
            Self::Model(error) => error.hint(),
            Self::Attention(_) | Self::Tensor(_) => None,
        }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action: "cannot read", path, source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action: "cannot write", path, source }
    }
}
