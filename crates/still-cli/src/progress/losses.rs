//! First and last loss of a stage.

use serde::Serialize;

/// First and last loss of a stage, for its closing line.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Losses {
    /// Of the first step.
    #[serde(rename = "first_loss")]
    first: Option<f64>,
    /// Of the last step so far.
    #[serde(rename = "last_loss")]
    last: Option<f64>,
}

impl Losses {
    /// Takes note of a step's loss.
    pub fn add(&mut self, loss: f64) {
        self.first.get_or_insert(loss);
        self.last = Some(loss);
    }
}

impl std::fmt::Display for Losses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.first, self.last) {
            (Some(first), Some(last)) => {
                write!(f, "loss {first:.3e} at first, {last:.3e} at last,")
            }
            _ => f.write_str("nothing left to do,"),
        }
    }
}
