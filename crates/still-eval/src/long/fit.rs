//! How many units of hay fit.

use std::ops::RangeInclusive;

use crate::error::Result;

/// Guesses by proportion before halving takes over.
const PROPORTIONAL: usize = 5;

/// What came of fitting.
#[derive(Debug, PartialEq)]
pub(super) enum Fit<A> {
    /// The prompt with so many units.
    Fits { units: usize, made: A },
    /// Even with the fewest units it has so many tokens.
    TooLong(usize),
}

/// The prompt with the most of `units` that has at most `budget` tokens.
///
/// `make` gives the prompt of a number of units and its tokens. Tokens must grow with units; where they do so only
/// on the whole (needles move about), the result fits and the same with one unit more does not.
pub(super) fn fit<A>(
    units: RangeInclusive<usize>,
    guess: usize,
    budget: usize,
    mut make: impl FnMut(usize) -> Result<(A, usize)>,
) -> Result<Fit<A>> {
    let (least, most) = units.into_inner();
    let mut next = guess.clamp(least, most);
    let mut fits: Option<(usize, usize, A)> = None;
    let mut over: Option<(usize, usize)> = None;
    for round in 0.. {
        let (made, tokens) = make(next)?;
        if tokens <= budget {
            fits = Some((next, tokens, made));
        } else {
            over = Some((next, tokens));
        }
        // Proportion alone would creep up to a budget that a fixed part of the prompt takes much of.
        let leap = 1_usize << round.min(30);
        next = match (&fits, over) {
            (Some((low, ..)), None) if *low == most => break,
            (Some((low, tokens, _)), None) => {
                (low * budget / (*tokens).max(1)).max(low + leap).clamp(low + 1, most)
            }
            (None, Some((high, tokens))) if high == least => return Ok(Fit::TooLong(tokens)),
            (None, Some((high, tokens))) => {
                (high * budget / tokens).min(high.saturating_sub(leap)).clamp(least, high - 1)
            }
            (Some((low, ..)), Some((high, _))) if high - low == 1 => break,
            (Some((low, below, _)), Some((high, above))) => {
                let step = match round {
                    0..PROPORTIONAL => (budget - below) * (high - low) / (above - below),
                    _ => (high - low) / 2,
                };
                (low + step).clamp(low + 1, high - 1)
            }
            (None, None) => unreachable!("a prompt fits or it does not"),
        };
    }
    match fits {
        Some((units, _, made)) => Ok(Fit::Fits { units, made }),
        None => unreachable!("the loop ends with a prompt that fits"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_units_that_fit_are_found_from_any_guess() {
        for guess in [0, 3, 50, 1_000] {
            for budget in 120..400 {
                let mut calls = 0;
                let fitted = fit(2..=60, guess, budget, |units| {
                    calls += 1;
                    Ok((units, 100 + 7 * units))
                });
                let expected = match (budget - 100) / 7 {
                    units @ 2.. => Fit::Fits { units: units.min(60), made: units.min(60) },
                    _ => Fit::TooLong(114),
                };
                assert_eq!(fitted.unwrap(), expected, "guess {guess}, budget {budget}");
                assert!(calls < 12, "{calls} prompts were made");
            }
        }
    }

    #[test]
    fn prompts_that_do_not_grow_evenly_still_fit() {
        let tokens = |units: usize| units * units / 3 + [5, 0, 9][units % 3];
        for budget in 10..2_000 {
            let fitted = fit(1..=200, 8, budget, |units| Ok((tokens(units), tokens(units))));
            let Fit::Fits { units, made } = fitted.unwrap() else { panic!("it fits") };
            assert!(made <= budget && (tokens(units + 1) > budget), "{units} units");
        }
    }
}
