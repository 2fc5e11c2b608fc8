//! Scales from values to positions, and the ticks of an axis.

/// How values lie on an axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Equal steps, equal distances.
    #[default]
    Linear,
    /// Equal factors, equal distances; values that are not positive have no place.
    Log,
}

impl Scale {
    /// Logarithmic if the values are positive and differ by more than a factor of ten.
    pub fn fitting(values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = range(values);
        if low > 0.0 && high > 10.0 * low { Self::Log } else { Self::Linear }
    }
}

/// One axis: a range of values over a range of places.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    /// A value that is shown whatever the others are, and that bars begin at.
    floor: Option<f64>,
    /// Values are counts: nothing lies between two of them.
    whole: bool,
}

impl Axis {
    /// An axis that shows all finite values, from place `from` to place `to`. `floor` is shown too, if it is given.
    pub fn over(
        values: impl IntoIterator<Item = f64>,
        floor: Option<f64>,
        scale: Scale,
        (from, to): (f64, f64),
    ) -> Self {
        let mut whole = scale == Scale::Linear;
        let shown = values
            .into_iter()
            .filter(|&value| scale == Scale::Linear || value > 0.0)
            .inspect(|value| whole &= value.fract() == 0.0 || !value.is_finite());
        let (mut low, mut high) = range(shown.chain(floor));
        if low > high {
            (low, high) = (1.0, 1.0);
        }
        if low == high {
            // A single value lies in the middle.
            (low, high) = match scale {
                Scale::Log => (low / 2.0, high * 2.0),
                Scale::Linear if low == 0.0 => (0.0, 1.0),
                Scale::Linear => (low - low.abs() / 2.0, high + high.abs() / 2.0),
            };
        }
        Self { scale, low, high, from, to, floor, whole }
    }

    /// Room beyond both ends, as a share of the whole; none below the floor.
    pub fn with_margin(mut self, share: f64) -> Self {
        match self.scale {
            Scale::Linear => {
                let room = share * (self.high - self.low);
                // What is never negative gets no negative part of an axis.
                let floor = if self.low >= 0.0 { 0.0 } else { f64::NEG_INFINITY };
                self.low = (self.low - room).max(floor);
                self.high += room;
            }
            Scale::Log => {
                let room = (self.high / self.low).powf(share);
                self.low /= if self.floor == Some(self.low) { 1.0 } else { room };
                self.high *= room;
            }
        }
        self
    }

    /// Where a value lies; nowhere if it is not finite, or not positive on a logarithmic axis.
    pub fn at(&self, value: f64) -> Option<f64> {
        let share = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        share.is_finite().then_some(self.from + share * (self.to - self.from))
    }

    /// Where bars begin: at the floor, or at the low end without one.
    pub fn base(&self) -> f64 {
        self.floor.and_then(|floor| self.at(floor)).unwrap_or(self.from)
    }

    /// The values to name: few and round.
    pub fn ticks(&self) -> Vec<f64> {
        let ticks = match self.scale {
            Scale::Linear => Vec::new(),
            Scale::Log => self.decades(),
        };
        // Less than a decade has too few round powers.
        if ticks.len() < 3 { self.equal_steps() } else { ticks }
    }

    fn equal_steps(&self) -> Vec<f64> {
        let rough = (self.high - self.low) / 5.0;
        let rough = if self.whole { rough.max(1.0) } else { rough };
        let power = 10f64.powf(rough.log10().floor());
        let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|nice| nice * power);
        let fits = |step: &f64| *step >= rough * 0.999 && (!self.whole || step.fract() == 0.0);
        let step = steps.into_iter().find(fits).unwrap_or(rough);
        let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
        (first..=last).map(|multiple| multiple as f64 * step).collect()
    }

    fn decades(&self) -> Vec<f64> {
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let within = |ticks: Vec<f64>| -> Vec<f64> {
            ticks.into_iter().filter(|tick| (self.low..=self.high).contains(tick)).collect()
        };
        let every = ((last - first) / 6).max(1) as usize;
        let whole = within((first..=last).step_by(every).map(|power| 10f64.powi(power)).collect());
        if whole.len() >= 3 {
            return whole;
        }
        let halves = |power: i32| [1.0, 2.0, 5.0].map(|nice| nice * 10f64.powi(power));
        within((first..=last).flat_map(halves).collect())
    }
}

/// The least and the greatest finite value; turned around if there is none.
fn range(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    values
        .into_iter()
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(values: &[f64]) -> Axis {
        Axis::over(values.iter().copied(), None, Scale::Linear, (0.0, 100.0))
    }

    #[test]
    fn the_ends_lie_at_the_ends() {
        let axis = linear(&[2.0, 4.0, f64::NAN]);
        assert_eq!(axis.at(2.0), Some(0.0));
        assert_eq!(axis.at(3.0), Some(50.0));
        assert_eq!(axis.at(4.0), Some(100.0));
        assert_eq!(axis.at(f64::NAN), None);
        let axis = Axis::over([1e-4, 1.0, 0.0], None, Scale::Log, (100.0, 0.0));
        assert!((axis.at(1e-2).unwrap() - 50.0).abs() < 1e-9);
        assert_eq!(axis.at(0.0), None);
        assert_eq!(axis.at(-1.0), None);
    }

    #[test]
    fn ticks_are_few_round_and_inside() {
        let ticks =
            |low: f64, high: f64, scale| Axis::over([low, high], None, scale, (0.0, 1.0)).ticks();
        assert_eq!(ticks(0.0, 24.0, Scale::Linear), [0.0, 5.0, 10.0, 15.0, 20.0]);
        assert_eq!(ticks(0.0, 1.25, Scale::Linear), [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]);
        // Between two steps there is none.
        assert_eq!(ticks(1.0, 3.0, Scale::Linear), [1.0, 2.0, 3.0]);
        assert_eq!(ticks(1e-4, 1.0, Scale::Log).len(), 5);
        assert_eq!(ticks(1.0, 20.0, Scale::Log), [1.0, 2.0, 5.0, 10.0, 20.0]);
        assert_eq!(ticks(3.0, 4.25, Scale::Log), [3.0, 3.25, 3.5, 3.75, 4.0, 4.25]);
        for (low, high) in [(1e-12, 3e9), (0.011, 0.013), (7.0, 7.0), (0.0, 0.0), (-3.0, 2.0)] {
            for scale in [Scale::Linear, Scale::Log] {
                let count = ticks(low, high, scale).len();
                assert!((2..=9).contains(&count), "{low} to {high}: {count} ticks");
            }
        }
    }

    #[test]
    fn nothing_to_show_is_no_panic() {
        for scale in [Scale::Linear, Scale::Log] {
            let axis = Axis::over([f64::NAN], None, scale, (0.0, 1.0)).with_margin(0.1);
            assert!(axis.at(1.0).is_some());
            assert!(!axis.ticks().is_empty());
        }
    }

    #[test]
    fn wide_ranges_are_logarithmic() {
        assert_eq!(Scale::fitting([1e-5, 1e-2]), Scale::Log);
        assert_eq!(Scale::fitting([3.0, 2.0]), Scale::Linear);
        assert_eq!(Scale::fitting([0.0, 100.0]), Scale::Linear);
        assert_eq!(Scale::fitting([]), Scale::Linear);
    }
}
