//! RULER's needles in a haystack: eight tasks of one family.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use rand::seq::{SliceRandom, index};
use rand_chacha::ChaCha8Rng;

use super::draft::Draft;
use super::family::Family;
use super::judge::Judge;
use super::text::Text;
use super::words::Kind;

/// A line of RULER's noise.
pub(super) const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// Depths in percent at which needles may lie in an essay: 40 from 0 to 100, evenly, rounded.
const DEPTHS: usize = 40;

#[derive(Debug)]
enum Haystack {
    /// Units are lines of noise.
    Noise,
    /// Units are words of a text.
    Essay(Text),
    /// Units are lines like the needle's, with keys and values that are not asked for.
    Needles,
}

/// Needles `One of the special magic … for KEY is: VALUE.` in a haystack.
#[derive(Debug)]
pub(super) struct Niah {
    haystack: Haystack,
    keys: usize,
    values_per_key: usize,
    queries: usize,
    key: Kind,
    value: Kind,
}

impl Niah {
    fn one(haystack: Haystack, key: Kind, value: Kind) -> Self {
        Self { haystack, keys: 1, values_per_key: 1, queries: 1, key, value }
    }

    fn in_essay(text: Text) -> Self {
        Self::one(Haystack::Essay(text), Kind::Words, Kind::Numbers)
    }

    pub fn single_1() -> Self {
        Self::one(Haystack::Noise, Kind::Words, Kind::Numbers)
    }

    pub fn single_2(text: Text) -> Self {
        Self::in_essay(text)
    }

    pub fn single_3(text: Text) -> Self {
        Self { value: Kind::Uuids, ..Self::in_essay(text) }
    }

    pub fn multikey_1(text: Text) -> Self {
        Self { keys: 4, ..Self::in_essay(text) }
    }

    pub fn multikey_2() -> Self {
        Self::one(Haystack::Needles, Kind::Words, Kind::Numbers)
    }

    pub fn multikey_3() -> Self {
        Self::one(Haystack::Needles, Kind::Uuids, Kind::Uuids)
    }

    pub fn multivalue(text: Text) -> Self {
        Self { values_per_key: 4, ..Self::in_essay(text) }
    }

    pub fn multiquery(text: Text) -> Self {
        Self { keys: 4, queries: 4, ..Self::in_essay(text) }
    }

    fn needle(&self, key: &str, value: &str) -> String {
        format!("One of the special magic {} for {key} is: {value}.", self.value.plural())
    }

    /// What is said before the question, the question, how the answer begins.
    fn said(&self, context: &str, query: &str) -> (String, String, String) {
        let asked = if self.queries * self.values_per_key == 1 {
            let kind = self.value.singular();
            (
                format!(
                    "A special magic {kind} is hidden within the following text. Make sure to memorize it. \
                     I will quiz you about the {kind} afterwards."
                ),
                format!(
                    "What is the special magic {kind} for {query} mentioned in the provided text?"
                ),
                format!(" The special magic {kind} for {query} mentioned in the provided text is"),
            )
        } else {
            let kind = self.value.plural();
            (
                format!(
                    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. \
                     I will quiz you about the {kind} afterwards."
                ),
                format!(
                    "What are all the special magic {kind} for {query} mentioned in the provided text?"
                ),
                format!(" The special magic {kind} for {query} mentioned in the provided text are"),
            )
        };
        let (before, question, answer_prefix) = asked;
        (format!("{before}\n{context}\n"), question, answer_prefix)
    }
}

impl Family for Niah {
    fn begins_alike(&self) -> bool {
        !matches!(self.haystack, Haystack::Needles)
    }

    fn units(&self, _: usize) -> RangeInclusive<usize> {
        // Every needle has a line of its own to stand before.
        self.keys * self.values_per_key..=usize::MAX
    }

    fn draft(&self, _: usize, units: usize, mut rng: ChaCha8Rng) -> Draft {
        let rng = &mut rng;
        let (mut taken_keys, mut taken_values) = (BTreeSet::new(), BTreeSet::new());
        let mut keys = Vec::with_capacity(self.keys);
        let mut needles = Vec::with_capacity(self.keys * self.values_per_key);
        for _ in 0..self.keys {
            let key = self.key.draw_new(&mut taken_keys, rng);
            let values: Vec<String> = (0..self.values_per_key)
                .map(|_| self.value.draw_new(&mut taken_values, rng))
                .collect();
            needles.extend(values.iter().map(|value| self.needle(&key, value)));
            keys.push((key, values));
        }
        needles.shuffle(rng);
        keys.shuffle(rng);
        keys.truncate(self.queries);

        let context = match &self.haystack {
            Haystack::Essay(text) => in_text(&text.first_words(units), &needles, rng),
            Haystack::Noise => in_lines(vec![NOISE.to_owned(); units], needles, rng),
            Haystack::Needles => {
                let places = index::sample(rng, units, needles.len());
                let lines = (0..units)
                    .map(|_| {
                        let key = self.key.draw_new(&mut taken_keys, rng);
                        self.needle(&key, &self.value.draw_new(&mut taken_values, rng))
                    })
                    .collect();
                insert(lines, needles, places.into_vec())
            }
        };
        let asked: Vec<&str> = keys.iter().map(|(key, _)| key.as_str()).collect();
        let query = match asked.split_last() {
            Some((last, first)) if !first.is_empty() => format!("{}, and {last}", first.join(", ")),
            _ => asked.concat(),
        };
        let (before, question, answer_prefix) = self.said(&context, &query);
        let targets = keys.into_iter().flat_map(|(_, values)| values).collect();
        Draft::new(before, &question, answer_prefix, targets, Judge::All)
    }
}

/// Needles before lines at random, in the order given.
fn in_lines(lines: Vec<String>, needles: Vec<String>, rng: &mut ChaCha8Rng) -> String {
    let places = index::sample(rng, lines.len(), needles.len());
    insert(lines, needles, places.into_vec())
}

fn insert(lines: Vec<String>, needles: Vec<String>, mut places: Vec<usize>) -> String {
    places.sort_unstable();
    let mut needles = places.into_iter().zip(needles).peekable();
    let mut all = Vec::with_capacity(lines.len() + needles.len());
    for (index, line) in lines.into_iter().enumerate() {
        if let Some((_, needle)) = needles.next_if(|&(place, _)| place == index) {
            all.push(needle);
        }
        all.push(line);
    }
    all.join("\n")
}

/// Needles between sentences, at different depths.
fn in_text(sentences: &[&str], needles: &[String], rng: &mut ChaCha8Rng) -> String {
    let depth = |step: usize| (100.0 * step as f64 / (DEPTHS - 1) as f64).round();
    let place = |step: usize| (sentences.len() as f64 * depth(step) / 100.0) as usize;
    let mut places: Vec<usize> =
        index::sample(rng, DEPTHS, needles.len()).into_iter().map(place).collect();
    places.sort_unstable();
    let mut all = Vec::with_capacity(sentences.len() + needles.len());
    let mut from = 0;
    for (place, needle) in places.into_iter().zip(needles) {
        all.extend_from_slice(&sentences[from..place]);
        all.push(needle.as_str());
        from = place;
    }
    all.extend_from_slice(&sentences[from..]);
    all.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn needles_stand_before_their_lines() {
        let strings = |texts: &[&str]| texts.iter().map(|&t| t.to_owned()).collect::<Vec<_>>();
        let text = insert(strings(&["a", "b", "c"]), strings(&["N", "M"]), vec![2, 0]);
        assert_eq!(text, "N\na\nb\nM\nc");
    }

    #[test]
    fn a_query_names_its_keys_and_the_answer_all_their_values() {
        let text = Text::new("One here. Two there. Three nowhere. Four.");
        let draft = Niah::multiquery(text.clone()).draft(0, 9, ChaCha8Rng::seed_from_u64(1));
        assert_eq!(draft.targets.len(), 4);
        assert!(draft.answer_prefix.starts_with(" The special magic numbers for "));
        assert_eq!(draft.answer_prefix.matches(", and ").count(), 1);
        let draft = Niah::multivalue(text.clone()).draft(0, 9, ChaCha8Rng::seed_from_u64(1));
        assert_eq!((draft.targets.len(), draft.said.matches(" for ").count()), (4, 5));
        let draft = Niah::single_3(text).draft(0, 9, ChaCha8Rng::seed_from_u64(1));
        assert!(draft.said.starts_with("A special magic uuid is hidden"), "{}", draft.said);
        assert!(draft.answer_prefix.ends_with("mentioned in the provided text is"));
    }
}
