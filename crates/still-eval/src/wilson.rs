//! Wilson's score interval of a share.

use crate::bootstrap::Interval;
use crate::error::{EvalError, Result};

/// The normal distribution's 97.5 % quantile: what 95 % intervals reach to, in standard errors.
pub(crate) const Z: f64 = 1.959_963_984_540_054;

/// The 95 % interval of a share, `right` of `of` independent answers. Unlike one from the standard error it has a width where
/// all answers are right or none is, and never leaves 0 to 1 (Wilson 1927, "Probable inference, the law of succession, and
/// statistical inference", without correction for continuity).
///
/// # Errors
/// If there are no answers, or more right ones than answers.
pub fn wilson(right: usize, of: usize) -> Result<Interval> {
    if of == 0 || right > of {
        return Err(EvalError::Argument(format!("{right} right answers of {of} are no share")));
    }
    let n = of as f64;
    let share = right as f64 / n;
    let middle = share + Z * Z / (2.0 * n);
    let half = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    // Rounding must not put the end of an all-right or all-wrong share beyond it.
    let low = if right == 0 { 0.0 } else { (middle - half) / scale };
    let high = if right == of { 1.0 } else { (middle + half) / scale };
    Ok(Interval { mean: share, low, high })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ends are where the share is 1.96 of *its own* standard errors away: the interval's definition, solved by bisection.
    fn naive(right: usize, of: usize) -> (f64, f64) {
        let (share, n) = (right as f64 / of as f64, of as f64);
        let beyond = |p: f64| (share - p).abs() > Z * (p * (1.0 - p) / n).sqrt();
        let bisect = |mut outside: f64, mut inside: f64| {
            for _ in 0..200 {
                let middle = f64::midpoint(outside, inside);
                if beyond(middle) { outside = middle } else { inside = middle }
            }
            inside
        };
        (bisect(0.0, share), bisect(1.0, share))
    }

    #[test]
    fn ends_are_where_the_score_test_turns() {
        for (right, of) in [(1, 2), (5, 10), (9, 10), (1, 50), (123, 200), (1999, 2000)] {
            let (got, (low, high)) = (wilson(right, of).unwrap(), naive(right, of));
            assert!((got.low - low).abs() < 1e-12, "{right} of {of}: {got:?}, {low}");
            assert!((got.high - high).abs() < 1e-12, "{right} of {of}: {got:?}, {high}");
        }
    }

    #[test]
    fn all_and_none_have_a_width() {
        let none = wilson(0, 10).unwrap();
        assert_eq!((none.mean, none.low), (0.0, 0.0));
        assert!((none.high - 0.277_532_8).abs() < 1e-6, "{none:?}");
        let all = wilson(10, 10).unwrap();
        assert_eq!((all.mean, all.high), (1.0, 1.0));
        assert!((all.low - (1.0 - none.high)).abs() < 1e-12, "{all:?}");
    }

    #[test]
    fn no_answers_have_no_share() {
        assert!(wilson(0, 0).is_err());
        assert!(wilson(3, 2).is_err());
    }
}
