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
    /// Is multiplied by `factor`, not below the floor, whenever `patience` evaluations in a row have not lowered the
    /// held-out loss.
    Plateau {
        /// Below 1.
        factor: f64,
        /// Evaluations.
        patience: usize,
    },
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
    /// Evaluations since the best one or the last reduction.
    waited: usize,
    scale: Exact,
}

impl Default for Plateau {
    fn default() -> Self {
        Self { best: None, waited: 0, scale: 1.0.into() }
    }
}

impl Plateau {
    /// What the schedule has taken off so far: a factor of the rate.
    pub fn scale(&self) -> f64 {
        self.scale.get()
    }

    /// Takes note of a held-out loss.
    pub fn observe(&mut self, loss: f64, factor: f64, patience: usize) {
        if self.best.is_none_or(|best| loss < best.get()) {
            self.best = Some(loss.into());
            self.waited = 0;
            return;
        }
        self.waited += 1;
        if self.waited >= patience {
            self.waited = 0;
            self.scale = (self.scale() * factor).into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_rise_alike_and_end_where_they_say() {
        let plateau = Schedule::Plateau { factor: 0.5, patience: 1 };
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

    #[test]
    fn a_plateau_takes_off_after_its_patience() {
        let mut plateau = Plateau::default();
        let mut after = |loss| {
            plateau.observe(loss, 0.5, 2);
            plateau.scale()
        };
        let scales = [3.0, 2.0, 2.0, 2.5, 1.0, 1.5, 1.0, 1.0, 1.0].map(&mut after);
        assert_eq!(scales, [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]);
    }
}
