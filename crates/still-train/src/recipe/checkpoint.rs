//! `[checkpoint]`: what is kept on disk.

use serde::{Deserialize, Serialize};

/// What is kept on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointRecipe {
    /// Steps between checkpoints.
    pub every: usize,
    /// Checkpoints kept.
    pub keep: usize,
}

impl Default for CheckpointRecipe {
    fn default() -> Self {
        Self { every: 50, keep: 2 }
    }
}
