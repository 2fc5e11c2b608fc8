//! `[evaluation]`: what is measured while a run goes on, and what follows from it.

use serde::{Deserialize, Serialize};

use super::invalid;
use crate::error::Result;

/// Measurements of the student between steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationRecipe {
    /// Steps between evaluations; one more before the first step and one at the end of each stage. 0: none at all.
    pub every: usize,
    /// Held-out windows whose next-token loss is measured. 0: none.
    pub windows: usize,
    /// Pass keys asked for. 0: none.
    pub passkey_keys: usize,
    /// Tokens of a pass key's prompt and its answer together.
    pub passkey_length: usize,
    /// Tokens of a random sequence that is fed twice: the loss on its second copy. 0: not measured.
    pub repeated_text: usize,
    /// The run's result is the student with the lowest held-out loss, not the last one. It is kept in
    /// `checkpoints/best`.
    pub keep_best: bool,
    /// A stage ends after so many evaluations in a row that have not lowered its held-out loss. 0: never.
    pub early_stop: usize,
}

impl Default for EvaluationRecipe {
    fn default() -> Self {
        Self {
            every: 0,
            windows: 4,
            passkey_keys: 0,
            passkey_length: 1024,
            repeated_text: 0,
            keep_best: false,
            early_stop: 0,
        }
    }
}

impl EvaluationRecipe {
    /// Whether the held-out loss is known during a run.
    pub fn measures_loss(&self) -> bool {
        self.every > 0 && self.windows > 0
    }

    /// Checks that the values fit each other.
    pub(super) fn validate(&self) -> Result<()> {
        let wants_loss = [
            ("evaluation.keep_best", self.keep_best),
            ("evaluation.early_stop", self.early_stop > 0),
        ];
        for (key, wanted) in wants_loss {
            if wanted && !self.measures_loss() {
                return Err(needs_loss(key));
            }
        }
        if self.repeated_text == 1 {
            return Err(invalid("evaluation.repeated_text is 1".into(), "use 2 or more, or 0"));
        }
        Ok(())
    }
}

/// The error for a setting that goes by the held-out loss where none is measured.
pub(super) fn needs_loss(key: &str) -> crate::TrainError {
    invalid(
        format!("{key} goes by the held-out loss, which is not measured"),
        "set evaluation.every and evaluation.windows",
    )
}
