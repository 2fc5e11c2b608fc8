//! What routing decided in one call, kept where it was decided.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use crate::cuda::DeviceRouting;
use crate::{AttentionError, Result, Selection};

/// The routing of one call: made by [`crate::hybrid_attention`], or given to it to be used again.
///
/// On a GPU it stays there: only [`Routing::selection`] and [`Routing::scores`] copy it, and wait for it.
#[derive(Clone, Debug)]
pub struct Routing(Place);

#[derive(Clone, Debug)]
enum Place {
    Host {
        selection: Arc<Selection>,
        /// `[B, S, N]`; none of a selection that came from elsewhere.
        scores: Option<Arc<Vec<f32>>>,
    },
    #[cfg(feature = "cuda")]
    Cuda(DeviceRouting),
}

impl Routing {
    pub(crate) fn on_host(selection: Selection, scores: Vec<f32>) -> Self {
        Self(Place::Host { selection: Arc::new(selection), scores: Some(Arc::new(scores)) })
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(routing: DeviceRouting) -> Self {
        Self(Place::Cuda(routing))
    }

    /// The routing as it lies on a GPU, if it does.
    #[cfg(feature = "cuda")]
    pub(crate) fn device(&self) -> Option<&DeviceRouting> {
        match &self.0 {
            Place::Host { .. } => None,
            Place::Cuda(routing) => Some(routing),
        }
    }

    /// When each token enters the linear state.
    ///
    /// # Errors
    /// An error of the device that it is copied from.
    pub fn selection(&self) -> Result<Arc<Selection>> {
        match &self.0 {
            Place::Host { selection, .. } => Ok(selection.clone()),
            #[cfg(feature = "cuda")]
            Place::Cuda(routing) => Ok(Arc::new(routing.selection()?)),
        }
    }

    /// Router scores `[B, S, N]`, row-major.
    ///
    /// # Errors
    /// A selection that was made elsewhere has no scores; an error of the device that they are copied from.
    pub fn scores(&self) -> Result<Arc<Vec<f32>>> {
        match &self.0 {
            Place::Host { scores, .. } => scores.clone().ok_or_else(|| {
                AttentionError::Config("this selection was given: no scores made it".into())
            }),
            #[cfg(feature = "cuda")]
            Place::Cuda(routing) => Ok(Arc::new(routing.scores()?)),
        }
    }
}

impl From<Selection> for Routing {
    fn from(selection: Selection) -> Self {
        Self(Place::Host { selection: Arc::new(selection), scores: None })
    }
}
