//! RULER's common words: a numbered list in which ten words come more often than the others, after a solved example.

use std::ops::RangeInclusive;

use rand::seq::{SliceRandom, index};
use rand_chacha::ChaCha8Rng;

use super::draft::Draft;
use super::family::Family;
use super::judge::Judge;
use super::words::different_words;

/// Words to be found.
const COMMON: usize = 10;

/// Different words, and how often common and other ones come.
#[derive(Clone, Copy, Debug)]
struct List {
    words: usize,
    common: usize,
    others: usize,
}

/// Units are different words.
#[derive(Debug)]
pub(super) struct CommonWords {
    example: List,
    /// `words` is the number of units.
    list: List,
}

impl CommonWords {
    /// RULER's counts for prompts of `length` tokens.
    pub fn new(length: usize) -> Self {
        if length < 4096 {
            Self {
                example: List { words: 20, common: 3, others: 1 },
                list: List { words: 0, common: 6, others: 1 },
            }
        } else {
            Self {
                example: List { words: 40, common: 10, others: 3 },
                list: List { words: 0, common: 30, others: 3 },
            }
        }
    }
}

impl Family for CommonWords {
    fn units(&self, _: usize) -> RangeInclusive<usize> {
        COMMON..=different_words(usize::MAX).len()
    }

    fn draft(&self, _: usize, units: usize, mut rng: ChaCha8Rng) -> Draft {
        let (example, answer) = self.example.write(&mut rng);
        let (list, targets) = List { words: units, ..self.list }.write(&mut rng);
        let example = format!("{}{QUESTION}{ANSWER_PREFIX} {}", told(&example), numbered(&answer));
        let before = format!("{example}\n{}", told(&list));
        Draft::new(before, QUESTION, ANSWER_PREFIX.into(), targets, Judge::All)
    }
}

const QUESTION: &str = "Question: What are the 10 most common words in the above list?";
const ANSWER_PREFIX: &str = " Answer: The top 10 words that appear most often in the list are:";

/// What is said before the question.
fn told(list: &str) -> String {
    format!(
        "Below is a numbered list of words. In these words, some appear more often than others. \
         Memorize the ones that appear most often.\n{list}\n"
    )
}

impl List {
    /// The list and its common words.
    fn write(self, rng: &mut ChaCha8Rng) -> (String, Vec<String>) {
        let words = different_words(self.words);
        let drawn: Vec<&str> =
            index::sample(rng, words.len(), self.words).into_iter().map(|i| words[i]).collect();
        let (common, others) = drawn.split_at(COMMON);
        let mut list = common.repeat(self.common);
        list.extend(others.repeat(self.others));
        list.shuffle(rng);
        (numbered(&list), common.iter().map(|&word| word.to_owned()).collect())
    }
}

fn numbered<W: AsRef<str>>(words: &[W]) -> String {
    let lines: Vec<String> =
        words.iter().enumerate().map(|(i, word)| format!("{}. {}", i + 1, word.as_ref())).collect();
    lines.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn words_come_as_often_as_they_should() {
        let list = List { words: 25, common: 6, others: 1 };
        let (text, common) = list.write(&mut ChaCha8Rng::seed_from_u64(4));
        let words: Vec<&str> = text.split(' ').skip(1).step_by(2).collect();
        assert_eq!(words.len(), 10 * 6 + 15);
        for word in &words {
            let times = words.iter().filter(|other| *other == word).count();
            let expected = if common.iter().any(|c| c == word) { 6 } else { 1 };
            assert_eq!(times, expected, "{word}");
        }
        assert!(text.starts_with("1. ") && text.contains(" 75. "));
    }
}
