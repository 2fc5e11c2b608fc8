//! Errors of the operator.

/// What can go wrong when the operator is configured or called.
#[derive(Debug, thiserror::Error)]
pub enum AttentionError {
    /// The configuration contradicts itself or the head geometry.
    #[error("attention configuration: {0}")]
    Config(String),
    /// A tensor does not have the shape that the operator needs.
    #[error("{op}: {tensor} has shape {got:?}, expected {expected}")]
    Shape {
        /// The entry point that was called.
        op: &'static str,
        /// The tensor's name in that call.
        tensor: &'static str,
        /// What it should have been, in words.
        expected: String,
        /// What it was.
        got: Vec<usize>,
    },
    /// A tensor is of a dtype or on a device that this entry point has no kernel for.
    #[error("{op}: {tensor} is {got}, expected {expected}")]
    Unsupported {
        /// The entry point that was called.
        op: &'static str,
        /// The tensor's name in that call.
        tensor: &'static str,
        /// What is supported.
        expected: &'static str,
        /// What was given.
        got: String,
    },
    /// An error of the tensor library.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of the operator's entry points.
pub type Result<T> = std::result::Result<T, AttentionError>;
