//! Facts planted in a text and asked for in words, as `still ask` asks.
//!
//! Needles of RULER say what they are and are asked for in their own words. Here a sentence like any other tells the fact, and the
//! question does not hint at where it is.

use std::collections::BTreeSet;

use rand::Rng;
use rand::seq::{IndexedRandom, index};
use rand_chacha::ChaCha8Rng;
use still_model::message_about;

use super::draft::{Draft, ItemBuilder, LongItem};
use super::fit::{Fit, fit};
use super::judge::Judge;
use super::text::Text;
use crate::error::{EvalError, Result};
use crate::task::{Item, Question};

/// Facts of one document, and so the questions about it.
const FACTS: usize = 10;
/// Sentences of a paragraph.
const PARAGRAPH: usize = 6;
/// Words that the first document is tried with.
const FIRST_GUESS: usize = 512;

const TOWNS: [&str; 16] = [
    "Aldbury", "Brenford", "Carrow", "Dunmere", "Eskdale", "Fenwick", "Garthby", "Hollin",
    "Kelsoe", "Lanmoor", "Marwick", "Norbeck", "Oakham", "Penrose", "Ravensby", "Thornley",
];
const NAMES: [&str; 16] = [
    "Abernathy",
    "Bianchi",
    "Castellanos",
    "Dvorak",
    "Eriksen",
    "Fitzgerald",
    "Grabowski",
    "Hashimoto",
    "Ivanova",
    "Jankowski",
    "Kowalczyk",
    "Lombardi",
    "Mbeki",
    "Nakamura",
    "Oyelaran",
    "Petrovic",
];
const ANIMALS: [&str; 8] =
    ["Biscuit", "Clover", "Domino", "Hazel", "Marble", "Nutmeg", "Pepper", "Thistle"];
const COLORS: [&str; 8] =
    ["crimson", "indigo", "lavender", "magenta", "maroon", "olive", "scarlet", "violet"];
const CITIES: [&str; 12] = [
    "Antwerp", "Bologna", "Cordoba", "Gdansk", "Helsinki", "Izmir", "Krakow", "Lisbon", "Nantes",
    "Oslo", "Porto", "Zagreb",
];
const DAYS: [&str; 7] =
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const WOODS: [&str; 8] = ["birch", "cedar", "cherry", "ebony", "larch", "maple", "teak", "walnut"];

/// What a fact tells.
#[derive(Clone, Copy, Debug)]
enum Value {
    OneOf(&'static [&'static str]),
    /// From the first up to, and without, the second.
    Number(u32, u32),
    /// Hours and minutes.
    Time,
}

impl Value {
    fn draw(self, rng: &mut ChaCha8Rng) -> String {
        match self {
            Self::OneOf(words) => (*words.choose(rng).unwrap_or(&"")).to_owned(),
            Self::Number(from, to) => rng.random_range(from..to).to_string(),
            Self::Time => {
                format!("{}:{:02}", rng.random_range(1..13), 5 * rng.random_range(1..12))
            }
        }
    }
}

/// A sentence and the question that it answers. `@` stands for a town, `#` for what the fact tells.
type Kind = (&'static str, &'static str, Value);

const KINDS: [Kind; 24] = [
    ("The mayor of @ is called #.", "What is the mayor of @ called?", Value::OneOf(&NAMES)),
    ("The train to @ departs at #.", "When does the train to @ depart?", Value::Time),
    (
        "The church in @ was built in #.",
        "In which year was the church in @ built?",
        Value::Number(1500, 1900),
    ),
    ("The bakery in @ opens at #.", "At what time does the bakery in @ open?", Value::Time),
    (
        "The teacher in @ comes from #.",
        "Where does the teacher in @ come from?",
        Value::OneOf(&CITIES),
    ),
    (
        "The innkeeper of @ has a dog called #.",
        "What is the dog of the innkeeper of @ called?",
        Value::OneOf(&ANIMALS),
    ),
    (
        "The door of the town hall of @ is #.",
        "What color is the door of the town hall of @?",
        Value::OneOf(&COLORS),
    ),
    (
        "The market of @ is held every #.",
        "On which day is the market of @ held?",
        Value::OneOf(&DAYS),
    ),
    (
        "The library of @ has # books.",
        "How many books does the library of @ have?",
        Value::Number(1100, 9900),
    ),
    (
        "The architect of the theater of @ was #.",
        "Who was the architect of the theater of @?",
        Value::OneOf(&NAMES),
    ),
    (
        "The room number of the inspector in @ is #.",
        "What is the room number of the inspector in @?",
        Value::Number(110, 990),
    ),
    (
        "The table of the council of @ is made of #.",
        "What is the table of the council of @ made of?",
        Value::OneOf(&WOODS),
    ),
    ("The population of @ is #.", "What is the population of @?", Value::Number(1100, 9900)),
    ("The doctor of @ studied in #.", "Where did the doctor of @ study?", Value::OneOf(&CITIES)),
    (
        "The ticket for the museum of @ costs # dollars.",
        "How much does the ticket for the museum of @ cost?",
        Value::Number(12, 99),
    ),
    (
        "The blacksmith of @ is named #.",
        "What is the name of the blacksmith of @?",
        Value::OneOf(&NAMES),
    ),
    ("The flag of @ is #.", "What color is the flag of @?", Value::OneOf(&COLORS)),
    ("The tower of @ is # feet tall.", "How tall is the tower of @?", Value::Number(110, 490)),
    ("The ferry from @ sails to #.", "Where does the ferry from @ sail to?", Value::OneOf(&CITIES)),
    (
        "The telephone number of the hotel in @ is #.",
        "What is the telephone number of the hotel in @?",
        Value::Number(21_000, 99_000),
    ),
    (
        "The great flood in @ happened in #.",
        "In which year did the great flood in @ happen?",
        Value::Number(1600, 1900),
    ),
    (
        "The winner of the boat race at @ was #.",
        "Who was the winner of the boat race at @?",
        Value::OneOf(&NAMES),
    ),
    (
        "The horse of the miller of @ is called #.",
        "What is the horse of the miller of @ called?",
        Value::OneOf(&ANIMALS),
    ),
    (
        "The evening meeting in @ begins at #.",
        "When does the evening meeting in @ begin?",
        Value::Time,
    ),
];

/// A planted fact.
#[derive(Clone, Debug)]
struct Fact {
    sentence: String,
    question: String,
    answer: String,
}

/// Of different kinds and with different answers.
fn facts(rng: &mut ChaCha8Rng) -> Vec<Fact> {
    let mut answers = BTreeSet::new();
    let kinds = index::sample(rng, KINDS.len(), FACTS);
    let towns = index::sample(rng, TOWNS.len(), FACTS);
    let fact = |(kind, town): (usize, usize)| {
        let (sentence, question, value) = KINDS[kind];
        let answer = loop {
            let answer = value.draw(rng);
            if answers.insert(answer.clone()) {
                break answer;
            }
        };
        let said = |text: &str| text.replace('@', TOWNS[town]).replace('#', &answer);
        Fact { sentence: said(sentence), question: said(question), answer }
    };
    kinds.into_iter().zip(towns).map(fact).collect()
}

/// So many words of a text from a sentence on, with facts at even distances.
fn document(text: &Text, start: usize, words: usize, facts: &[Fact]) -> String {
    let mut sentences = Vec::new();
    let mut count = 0;
    for sentence in text.sentences.iter().cycle().skip(start) {
        if count >= words {
            break;
        }
        count += 1 + sentence.matches(' ').count();
        sentences.push(sentence.as_str());
    }
    let step = sentences.len() as f64 / facts.len() as f64;
    for (n, fact) in facts.iter().enumerate().rev() {
        sentences.insert(((n as f64 + 0.5) * step) as usize, &fact.sentence);
    }
    let paragraphs: Vec<String> =
        sentences.chunks(PARAGRAPH).map(|lines| lines.join(" ")).collect();
    paragraphs.join("\n\n")
}

/// The questions about as many documents as are needed; those about one document begin alike. The builder renders them in the
/// model's chat template, if it has one.
pub(super) fn items(builder: &ItemBuilder<'_>, text: &Text) -> Result<Vec<Item>> {
    let mut items = Vec::with_capacity(builder.options.items);
    let mut guess = FIRST_GUESS;
    for n in 0..builder.options.items.div_ceil(FACTS) {
        let mut rng = builder.rng(n);
        let start = rng.random_range(0..text.sentences.len());
        let facts = facts(&mut rng);
        let fitted = fit(1..=usize::MAX, guess, builder.prompt_tokens(), |words| {
            let document = document(text, start, words, &facts);
            let asked = facts.iter().map(|fact| asked(builder, &document, fact));
            let asked = asked.collect::<Result<Vec<_>>>()?;
            let longest = asked.iter().map(|item| item.prompt_ids.len()).max().unwrap_or(0);
            Ok((asked, longest))
        })?;
        match fitted {
            Fit::Fits { units, made } => {
                guess = units;
                items.extend(made.into_iter().zip(n * FACTS..).map(|(item, id)| Item {
                    id: format!("{}-{id}", builder.task),
                    group: Some(format!("{}-{n}", builder.task)),
                    question: Question::Generation(Box::new(item)),
                }));
            }
            Fit::TooLong(tokens) => {
                let (needed, got) = (tokens + builder.new_tokens, builder.options.length);
                return Err(EvalError::TooShort { what: builder.task, needed, got });
            }
        }
    }
    items.truncate(builder.options.items);
    Ok(items)
}

fn asked(builder: &ItemBuilder<'_>, document: &str, fact: &Fact) -> Result<LongItem> {
    let said = message_about(document, &fact.question);
    let draft = Draft {
        // The question is the last that is said.
        question_from: said.len() - fact.question.len(),
        said,
        answer_prefix: if builder.options.chat { "" } else { "\n" }.into(),
        targets: vec![fact.answer.clone()],
        judge: Judge::All,
    };
    let prompt_ids = builder.encode(&draft)?;
    builder.item(draft, prompt_ids)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn every_fact_is_said_once_and_no_question_gives_its_answer_away() {
        let text = Text::new(&"Nothing of note happened here. It rained again. ".repeat(40));
        for seed in 0..20 {
            let facts = facts(&mut ChaCha8Rng::seed_from_u64(seed));
            assert_eq!(facts.len(), FACTS);
            let document = document(&text, 3, 200, &facts);
            for Fact { sentence, question, answer } in &facts {
                assert_eq!(document.matches(sentence.as_str()).count(), 1, "{sentence}");
                assert!(sentence.contains(answer.as_str()), "{sentence}");
                assert!(!question.contains(answer.as_str()), "{question}");
            }
        }
    }

    #[test]
    fn documents_have_the_words_asked_for() {
        let text = Text::new("One two three. Four five six.");
        let facts = facts(&mut ChaCha8Rng::seed_from_u64(0));
        let document = document(&text, 1, 30, &facts);
        assert!(document.starts_with("Four five six.") || document.starts_with(&facts[0].sentence));
        let planted: usize = facts.iter().map(|f| f.sentence.split(' ').count()).sum();
        assert_eq!(document.split_whitespace().count(), 30 + planted);
    }
}
