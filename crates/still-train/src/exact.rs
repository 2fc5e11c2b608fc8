//! Numbers that a checkpoint gives back bit for bit.

use serde::{Deserialize, Serialize};

/// A float64, saved by its bits: decimal digits may come back another number, and a resumed run would drift from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Exact(u64);

impl From<f64> for Exact {
    fn from(value: f64) -> Self {
        Self(value.to_bits())
    }
}

impl Exact {
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}
