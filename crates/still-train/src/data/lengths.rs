//! Which length a step reads.

use rand::Rng;

use super::order::Purpose;
use crate::recipe::DataRecipe;

/// The lengths of windows, and when each is read.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    /// Tokens, increasing.
    pub lengths: Vec<usize>,
    order: Order,
}

#[derive(Clone, Debug)]
enum Order {
    /// Each step draws, with these cumulative probabilities.
    Mixed(Vec<f64>),
    /// One length after the other: the step at which each ends; the last does not.
    Ordered(Vec<usize>),
}

impl Schedule {
    /// Of a valid recipe.
    pub fn new(recipe: &DataRecipe) -> Self {
        let lengths = recipe.all_lengths().to_vec();
        let cumulative = |values: Vec<f64>| {
            values
                .iter()
                .scan(0.0, |sum, value| {
                    *sum += value;
                    Some(*sum)
                })
                .collect::<Vec<_>>()
        };
        let order = if recipe.length_steps.is_empty() {
            Order::Mixed(cumulative(recipe.step_shares()))
        } else {
            let mut sum = 0;
            Order::Ordered(
                recipe
                    .length_steps
                    .iter()
                    .map(|steps| {
                        sum += steps;
                        sum
                    })
                    .collect(),
            )
        };
        Self { lengths, order }
    }

    /// One length, always.
    pub fn single(length: usize) -> Self {
        Self { lengths: vec![length], order: Order::Mixed(vec![1.0]) }
    }

    /// The longest.
    pub fn longest(&self) -> usize {
        self.lengths.last().copied().unwrap_or(0)
    }

    /// Tokens read at each length, as shares; nothing for lengths one after another, where each reads everything.
    pub fn token_shares(&self) -> Option<Vec<f64>> {
        let Order::Mixed(cumulative) = &self.order else { return None };
        let mut before = 0.0;
        let tokens = cumulative.iter().zip(&self.lengths).map(|(&up_to, &length)| {
            let share = up_to - before;
            before = up_to;
            share * length as f64
        });
        let tokens: Vec<f64> = tokens.collect();
        let sum: f64 = tokens.iter().sum();
        Some(tokens.iter().map(|share| share / sum).collect())
    }

    /// Index of the length that a step reads: a function of the seed and the step.
    pub fn at(&self, seed: u64, step: usize) -> usize {
        let last = self.lengths.len() - 1;
        match &self.order {
            Order::Mixed(_) if last == 0 => 0,
            Order::Mixed(cumulative) => {
                let mut rng = Purpose::Steps.rng(seed, 0);
                // Two words make one number.
                rng.set_word_pos(2 * step as u128);
                let at: f64 = rng.random();
                cumulative.partition_point(|&up_to| up_to <= at).min(last)
            }
            Order::Ordered(ends) => ends.partition_point(|&end| end <= step).min(last),
        }
    }
}
