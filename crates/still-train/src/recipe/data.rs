//! `[data]`: what is read, and how.

use serde::{Deserialize, Serialize};

use super::invalid;
use crate::error::Result;

/// How text becomes windows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataRecipe {
    /// Tokens of a window.
    pub length: usize,
    /// Documents and their ends shorter than this are left out.
    pub min_length: usize,
}

impl Default for DataRecipe {
    fn default() -> Self {
        Self { length: 1024, min_length: 64 }
    }
}

impl DataRecipe {
    /// Checks that the values fit each other.
    pub(super) fn validate(&self) -> Result<()> {
        if self.min_length < 2 || self.length < self.min_length {
            return Err(invalid(
                format!(
                    "data.length {} and data.min_length {} do not fit",
                    self.length, self.min_length
                ),
                "2 <= min_length <= length",
            ));
        }
        Ok(())
    }
}
