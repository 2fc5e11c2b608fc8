//! `[guard]`: when a step is skipped, and when a run is given up.

use serde::{Deserialize, Serialize};

/// What a run does not put up with. A loss or gradient that is not a number always ends it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuardRecipe {
    /// A step is skipped if its loss or its gradient's norm is beyond this many times the median of the steps before
    /// it. 0: never.
    pub spike_factor: f64,
    /// Steps that the median is of; skipped ones do not count.
    pub spike_window: usize,
    /// The run stops, with advice, after so many skipped steps in a row. 0: never.
    pub max_skips: usize,
    /// The run stops, with advice, once the held-out loss is above this many times what it was at the beginning of
    /// the stage. 0: never.
    pub max_heldout_growth: f64,
}

impl Default for GuardRecipe {
    fn default() -> Self {
        Self { spike_factor: 10.0, spike_window: 32, max_skips: 5, max_heldout_growth: 2.0 }
    }
}

impl GuardRecipe {
    /// Nothing is skipped, nothing given up.
    pub fn off() -> Self {
        Self { spike_factor: 0.0, max_skips: 0, max_heldout_growth: 0.0, ..Self::default() }
    }
}
