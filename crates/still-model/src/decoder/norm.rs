//! Weights of norms.

use candle_core::{Result, Tensor};

/// The weight of a root-mean-square norm.
#[derive(Clone, Debug)]
pub struct NormWeight {
    /// What normed rows are multiplied by, `[width]`.
    pub scale: Tensor,
    /// As files have it, where that is the scale less an offset: added once, when the model is loaded, but saved bit by bit.
    stored: Option<Tensor>,
}

impl NormWeight {
    /// From a file's tensor, to which `offset` is to be added.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn from_stored(stored: Tensor, offset: f64) -> Result<Self> {
        if offset == 0.0 {
            return Ok(stored.into());
        }
        Ok(Self { scale: (&stored + offset)?, stored: Some(stored) })
    }

    /// The file's tensor.
    pub fn stored(&self) -> &Tensor {
        self.stored.as_ref().unwrap_or(&self.scale)
    }
}

impl From<Tensor> for NormWeight {
    /// A weight that files have as it is.
    fn from(scale: Tensor) -> Self {
        Self { scale, stored: None }
    }
}
