//! Learning-rate schedules.

use serde::{Deserialize, Serialize};

use crate::exact::Exact;

/// How the learning rate goes on after its linear warmup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Stays at its peak.
    Constant,
    /// Half a cosine to the floor at the last step.
    #[default]
    Cosine,
    /// A line to the floor at the last step.
    Linear,
    /// Is multiplied by `factor`, not below the floor, when the held-out loss has stopped falling: PyTorch's `ReduceLROnPlateau`.
    Plateau {
        /// Below 1.
        factor: f64,
        /// Evaluations in a row without improvement that are put up with: the next one lowers the rate.
        patience: usize,
        /// What counts as an improvement: a loss below the best one by more than this share of it.
        #[serde(default = "default_threshold")]
        threshold: f64,
        /// Evaluations after each reduction that are not counted.
        #[serde(default)]
        cooldown: usize,
    },
}

/// PyTorch's.
fn default_threshold() -> f64 {
    1e-4
}

impl Schedule {
    /// The share of the peak rate at `step` of `total`, counted from 0: the first step already moves.
    ///
    /// What a plateau has taken off comes on top: that is not a function of the step.
    pub fn share(self, step: usize, warmup: usize, total: usize, floor: f64) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let span = total.saturating_sub(warmup + 1).max(1) as f64;
        let progress = ((step - warmup) as f64 / span).min(1.0);
        match self {
            Self::Constant | Self::Plateau { .. } => 1.0,
            Self::Cosine => {
                floor + (1.0 - floor) * (0.5 * (1.0 + (std::f64::consts::PI * progress).cos()))
            }
            Self::Linear => floor + (1.0 - floor) * (1.0 - progress),
        }
    }
}

/// What [`Schedule::Plateau`] remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plateau {
    best: Option<Exact>,
    /// Evaluations since the best one, the last reduction or its cooldown.
    waited: usize,
    /// Evaluations that are not counted yet.
    #[serde(default)]
    cooling: usize,
    scale: Exact,
}

impl Default for Plateau {
    fn default() -> Self {
        Self { best: None, waited: 0, cooling: 0, scale: 1.0.into() }
    }
}

impl Plateau {
    /// What the schedule has taken off so far: a factor of the rate.
    pub fn scale(&self) -> f64 {
        self.scale.get()
    }

    /// Takes note of a held-out loss; other schedules do not go by it.
    pub fn observe(&mut self, loss: f64, schedule: Schedule) {
        let Schedule::Plateau { factor, patience, threshold, cooldown } = schedule else { return };
        if self.best.is_none_or(|best| loss < best.get() * (1.0 - threshold)) {
            self.best = Some(loss.into());
            self.waited = 0;
        } else {
            self.waited += 1;
        }
        if self.cooling > 0 {
            self.cooling -= 1;
            self.waited = 0;
        }
        if self.waited > patience {
            self.scale = (self.scale() * factor).into();
            self.cooling = cooldown;
            self.waited = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_rise_alike_and_end_where_they_say() {
        let plateau = plateau(0.5, 1, 0.0, 0);
        for (schedule, last) in [
            (Schedule::Constant, 1.0),
            (Schedule::Cosine, 0.1),
            (Schedule::Linear, 0.1),
            (plateau, 1.0),
        ] {
            let share = |step| schedule.share(step, 4, 20, 0.1);
            assert_eq!((share(0), share(3), share(4)), (0.25, 1.0, 1.0));
            assert!((share(19) - last).abs() < 1e-12, "{schedule:?}");
            assert!((share(100) - last).abs() < 1e-12, "{schedule:?}");
            assert!((4..19).all(|step| share(step + 1) < share(step) || last == 1.0));
        }
        assert!((Schedule::Linear.share(5, 1, 10, 0.0) - 0.5).abs() < 1e-12);
    }

    fn plateau(factor: f64, patience: usize, threshold: f64, cooldown: usize) -> Schedule {
        Schedule::Plateau { factor, patience, threshold, cooldown }
    }

    fn scales(schedule: Schedule, losses: &[f64]) -> Vec<f64> {
        let mut plateau = Plateau::default();
        let mut after = |&loss: &f64| {
            plateau.observe(loss, schedule);
            plateau.scale()
        };
        losses.iter().map(&mut after).collect()
    }

    #[test]
    fn a_plateau_takes_off_after_its_patience() {
        let losses = [3.0, 2.0, 2.0, 2.5, 1.0, 1.5, 1.0, 1.0, 1.0];
        let expected = [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125];
        assert_eq!(scales(plateau(0.5, 1, 0.0, 0), &losses), expected);
    }

    /// Where `torch.optim.lr_scheduler.ReduceLROnPlateau` (2.9, mode "min", relative threshold) lowers the rate on the same losses.
    #[test]
    fn a_plateau_is_pytorchs() {
        let losses = [
            3.03, 3.0297, 3.0297, 3.0294, 3.09, 3.09, 3.1518, 3.1518, 3.1518, 3.1833, 3.0878,
            3.1496, 3.1494, 3.2124, 3.1963, 3.1963, 3.1004, 3.0849, 2.9924, 2.9921, 2.9919, 3.0518,
            3.0365, 3.0364, 3.0667, 2.9747, 3.0045, 2.9895, 2.8998, 2.8998,
        ];
        let impatient = [
            1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 20, 21, 22, 23, 24, 26, 27, 29,
        ];
        for (schedule, expected) in [
            (plateau(0.1, 0, 1e-4, 0), &impatient[..]),
            (plateau(0.1, 3, 1e-4, 0), &[7, 11, 15, 23]),
            (plateau(0.5, 1, 0.02, 0), &[2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26]),
            (plateau(0.25, 1, 0.0, 3), &[5, 10, 15, 22, 27]),
        ] {
            let scales = scales(schedule, &losses);
            let lowered: Vec<usize> =
                (1..losses.len()).filter(|&n| scales[n] < scales[n - 1]).collect();
            assert_eq!(lowered, expected, "{schedule:?}");
        }
    }

    #[test]
    fn what_it_remembers_survives_a_checkpoint() {
        let schedule = plateau(0.5, 1, 1e-2, 3);
        let mut state = Plateau::default();
        let losses = [3.0, 3.0, 3.0, 2.99, 3.1, 3.1, 3.1, 3.1, 3.1, 2.0, 3.0, 3.0, 3.0];
        for (n, loss) in losses.into_iter().enumerate() {
            state.observe(loss, schedule);
            let text = serde_json::to_string(&state).unwrap();
            assert_eq!(serde_json::from_str::<Plateau>(&text).unwrap(), state, "{n}");
        }
        assert!(state.scale() < 0.5);
    }
}
