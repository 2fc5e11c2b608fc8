//! Steps that are far out of line with those before them.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::exact::Exact;
use crate::recipe::GuardRecipe;

/// Steps that must have been taken before one can be out of line.
pub(crate) const FEWEST: usize = 5;

/// Losses and gradient norms of the last steps that were taken, and how often one was not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spikes {
    losses: VecDeque<Exact>,
    norms: VecDeque<Exact>,
    /// Steps skipped since the last one that was taken.
    pub in_a_row: usize,
}

impl Spikes {
    /// Whether a step of this loss and gradient norm is to be skipped; takes note of it.
    pub fn refuses(&mut self, guard: &GuardRecipe, loss: f64, norm: f64) -> bool {
        if guard.spike_factor == 0.0 {
            return false;
        }
        let out_of_line = |history: &VecDeque<Exact>, value: f64| {
            median(history).is_some_and(|usual| usual > 0.0 && value > guard.spike_factor * usual)
        };
        if out_of_line(&self.losses, loss) || out_of_line(&self.norms, norm) {
            self.in_a_row += 1;
            return true;
        }
        self.in_a_row = 0;
        for (history, value) in [(&mut self.losses, loss), (&mut self.norms, norm)] {
            history.push_back(value.into());
            while history.len() > guard.spike_window {
                history.pop_front();
            }
        }
        false
    }
}

fn median(history: &VecDeque<Exact>) -> Option<f64> {
    if history.len() < FEWEST {
        return None;
    }
    let mut values: Vec<f64> = history.iter().map(|value| value.get()).collect();
    let middle = values.len() / 2;
    let (_, median, _) = values.select_nth_unstable_by(middle, f64::total_cmp);
    Some(*median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_out_of_line_is_refused_and_forgotten() {
        let guard = GuardRecipe::default();
        let mut spikes = Spikes::default();
        // Too few steps to know what is usual.
        assert!(!spikes.refuses(&guard, 1000.0, 1.0));
        for _ in 0..5 {
            assert!(!spikes.refuses(&guard, 1.0, 2.0));
        }
        assert!(!spikes.refuses(&guard, 9.9, 19.0));
        assert!(spikes.refuses(&guard, 10.1, 2.0), "the loss is a spike");
        assert!(spikes.refuses(&guard, 1.0, 20.1), "the norm is a spike");
        assert_eq!(spikes.in_a_row, 2);
        assert_eq!(spikes.losses.len(), 7, "a skipped step is no part of what is usual");
        assert!(!spikes.refuses(&guard, 1.0, 2.0));
        assert_eq!(spikes.in_a_row, 0);
        assert!(!spikes.refuses(&GuardRecipe::off(), 1e9, 1e9));
    }

    #[test]
    fn only_the_last_steps_count_and_a_checkpoint_keeps_them() {
        let guard = GuardRecipe { spike_window: 5, ..GuardRecipe::default() };
        let mut spikes = Spikes::default();
        for step in 0..100 {
            spikes.refuses(&guard, 0.1 * f64::from(step), 1.0 / 3.0);
        }
        assert_eq!(spikes.losses.len(), 5);
        let saved = serde_json::to_string(&spikes).unwrap();
        assert_eq!(serde_json::from_str::<Spikes>(&saved).unwrap(), spikes);
    }
}
