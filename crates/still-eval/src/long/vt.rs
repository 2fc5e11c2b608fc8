//! RULER's variable tracking: a chain of assignments in noise, after a solved example.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use rand::Rng;
use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use still_model::Tokenizer;

use super::draft::Draft;
use super::family::Family;
use super::fit::{Fit, fit};
use super::judge::Judge;
use super::niah::NOISE;
use crate::error::Result;

/// Variables of a chain: the first is given a number, four more take it over.
const VARIABLES: usize = 5;
/// The example may have so many tokens.
const EXAMPLE_TOKENS: usize = 500;

/// `VAR A = 12345`, `VAR B = VAR A`, … Units are lines of noise.
#[derive(Debug)]
pub(super) struct VariableTracking {
    /// Lines of noise in the example.
    example_lines: usize,
}

impl VariableTracking {
    pub fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let example = |lines: usize| {
            let chain = chain(lines, 3, &mut ChaCha8Rng::seed_from_u64(0));
            let text = chain.solved();
            Ok((lines, tokenizer.encode(&text, false)?.len()))
        };
        let example_lines = match fit(VARIABLES..=usize::MAX, VARIABLES, EXAMPLE_TOKENS, example)? {
            Fit::Fits { units, .. } => units,
            // Tokens as short as bytes: the example is then longer than RULER's.
            Fit::TooLong(_) => VARIABLES,
        };
        Ok(Self { example_lines })
    }
}

impl Family for VariableTracking {
    fn units(&self, _: usize) -> RangeInclusive<usize> {
        VARIABLES..=usize::MAX
    }

    fn draft(&self, _: usize, units: usize, mut rng: ChaCha8Rng) -> Draft {
        let example = chain(self.example_lines, 3, &mut rng).solved();
        let Chain { text, question, answer_prefix, variables } = chain(units, 5, &mut rng);
        let before = format!("{example}\n{text}");
        Draft::new(before, &question, answer_prefix, variables, Judge::All)
    }
}

/// A chain of variables.
#[derive(Debug)]
struct Chain {
    /// What is said before the question.
    text: String,
    question: String,
    /// How the answer begins.
    answer_prefix: String,
    variables: Vec<String>,
}

impl Chain {
    /// Question and answer, as an example.
    fn solved(&self) -> String {
        let Self { text, question, answer_prefix, variables } = self;
        format!("{text}{question}{answer_prefix} {}\n", variables.join(" "))
    }
}

/// A chain of variables with names of `letters` letters in `lines` lines of noise.
fn chain(lines: usize, letters: usize, rng: &mut ChaCha8Rng) -> Chain {
    let mut taken = BTreeSet::new();
    let mut variables: Vec<String> = Vec::with_capacity(VARIABLES);
    while variables.len() < VARIABLES {
        let name: String = (0..letters).map(|_| rng.random_range('A'..='Z')).collect();
        if taken.insert(name.clone()) {
            variables.push(name);
        }
    }
    let value = rng.random_range(10_000..99_999);
    let mut places = index::sample(rng, lines, VARIABLES).into_vec();
    places.sort_unstable();
    let assignment = |i: usize| match i {
        0 => format!("VAR {} = {value}", variables[0]),
        // RULER's lines end in a space.
        i => format!("VAR {} = VAR {} ", variables[i], variables[i - 1]),
    };
    let mut text = Vec::with_capacity(lines + VARIABLES);
    for line in 0..lines {
        if let Ok(i) = places.binary_search(&line) {
            text.push(assignment(i));
        }
        text.push(NOISE.to_owned());
    }
    let text = format!(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{}\n",
        text.join("\n")
    );
    let question = format!(
        "Question: Find all variables that are assigned the value {value} in the text above."
    );
    let answer_prefix = format!(
        " Answer: According to the chain(s) of variable assignment in the text above, {VARIABLES} variables are \
         assigned the value {value}, they are:"
    );
    Chain { text, question, answer_prefix, variables }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_come_in_order_and_once() {
        for seed in 0..20 {
            let Chain { text: said, variables, .. } =
                chain(7, 5, &mut ChaCha8Rng::seed_from_u64(seed));
            let mut from = 0;
            for (i, name) in variables.iter().enumerate() {
                let defined = format!("VAR {name} = ");
                assert_eq!(said.matches(&defined).count(), 1);
                let at = said.find(&defined).unwrap();
                assert!(at > from, "variable {i} comes too early");
                from = at;
            }
            assert_eq!(said.matches(NOISE).count(), 7);
        }
    }
}
