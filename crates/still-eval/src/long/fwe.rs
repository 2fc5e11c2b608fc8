//! RULER's frequent words: a text of coded words whose frequencies fall by Zipf's law.

use std::collections::BTreeSet;
use std::f64::consts::PI;
use std::ops::RangeInclusive;

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::draft::Draft;
use super::family::Family;
use super::judge::Judge;

/// Letters of a coded word.
const LETTERS: usize = 6;
/// From so many words on, the third most frequent word comes more often than the fourth, and that than the fifth.
const FEWEST: usize = 120;

/// Units are the words that the law shares out among ranks; each rank's share is rounded down.
#[derive(Debug)]
pub(super) struct FrequentWords {
    vocabulary: usize,
}

impl FrequentWords {
    /// RULER's vocabulary for prompts of `length` tokens: one coded word for 50.
    pub fn new(length: usize) -> Self {
        Self { vocabulary: (length / 50).max(5) }
    }
}

impl Family for FrequentWords {
    fn units(&self, _: usize) -> RangeInclusive<usize> {
        FEWEST..=usize::MAX
    }

    fn draft(&self, _: usize, units: usize, mut rng: ChaCha8Rng) -> Draft {
        let mut taken = BTreeSet::new();
        let mut words: Vec<String> = Vec::with_capacity(self.vocabulary);
        while words.len() < self.vocabulary {
            let word: String = (0..LETTERS).map(|_| rng.random_range('a'..='z')).collect();
            if taken.insert(word.clone()) {
                words.push(word);
            }
        }
        // The most frequent is noise.
        words[0] = "...".into();
        let mut text: Vec<&str> = words
            .iter()
            .enumerate()
            .flat_map(|(rank, word)| vec![word.as_str(); times(units, rank + 1)])
            .collect();
        text.shuffle(&mut rng);
        let before = format!(
            "Read the following coded text and track the frequency of each coded word. Find the three most \
             frequently appeared coded words. {}\n",
            text.join(" ")
        );
        let question = "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three \
                        most frequently appeared words in the above coded text?";
        let answer_prefix = " Answer: According to the coded text above, the three most frequently \
                             appeared words are:";
        let targets = words[1..4].to_vec();
        Draft::new(before, question, answer_prefix.into(), targets, Judge::All)
    }
}

/// How often the word of a rank (from 1) comes: `units · rank⁻² / ζ(2)`.
fn times(units: usize, rank: usize) -> usize {
    let zeta = PI * PI / 6.0;
    (units as f64 / (rank * rank) as f64 / zeta) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ranks_are_always_told_apart() {
        for units in FEWEST..20_000 {
            let counts = [2, 3, 4, 5].map(|rank| times(units, rank));
            assert!(counts.is_sorted_by(|a, b| a > b), "{units} words: {counts:?}");
        }
    }
}
