//! BABILong: bAbI's facts scattered in a running text.

use std::ops::RangeInclusive;
use std::path::Path;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use still_model::Tokenizer;

use super::draft::Draft;
use super::family::Family;
use super::judge::Judge;
use super::text::{Text, malformed, read};
use crate::error::Result;

/// Shorter sentences are no background.
const FEWEST_TOKENS: usize = 10;

const PLACES: &[&str] = &["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"];
const PEOPLE_AND_THINGS: &[&str] = &["Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"];

/// One of bAbI's tasks. Units are sentences of background.
#[derive(Debug)]
pub(super) struct BabiLong {
    prompt: &'static Prompt,
    labels: &'static [&'static str],
    questions: Vec<Question>,
    background: Vec<String>,
}

/// A question and what its story tells before it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Question {
    facts: Vec<String>,
    question: String,
    answer: String,
}

impl BabiLong {
    /// Task `number` (1 to 5) with its test file, in a text.
    pub fn new(number: u8, facts: &Path, text: Text, tokenizer: &Tokenizer) -> Result<Self> {
        let questions =
            parse(&read(facts)?).map_err(|(line, reason)| malformed(facts, line, reason))?;
        let long_enough = |sentence: String| match tokenizer.encode(&sentence, false) {
            Ok(ids) if ids.len() < FEWEST_TOKENS => None,
            Ok(_) => Some(Ok(sentence)),
            Err(error) => Some(Err(error.into())),
        };
        let background =
            text.sentences.into_par_iter().filter_map(long_enough).collect::<Result<Vec<_>>>()?;
        let labels = if number == 5 { PEOPLE_AND_THINGS } else { PLACES };
        let prompt = &PROMPTS[usize::from(number) - 1];
        Ok(Self { prompt, labels, questions, background })
    }
}

/// Every question of a file in bAbI's format: numbered lines, a question with its answer and the numbers of the facts
/// that it rests on between tabs; a story begins at line 1. An error is a line and what is wrong with it.
fn parse(text: &str) -> std::result::Result<Vec<Question>, (usize, &'static str)> {
    let mut questions = Vec::new();
    let mut facts = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |what: &'static str| (index + 1, what);
        let (number, said) = line.split_once(' ').ok_or_else(|| wrong("no number and text"))?;
        let number: usize = number.parse().map_err(|_| wrong("it does not begin with a number"))?;
        if number == 1 {
            facts.clear();
        }
        match said.split('\t').collect::<Vec<_>>()[..] {
            [fact] => facts.push(fact.trim().to_owned()),
            [question, answer, _] if !facts.is_empty() => questions.push(Question {
                facts: facts.clone(),
                question: question.trim().to_owned(),
                answer: answer.trim().to_owned(),
            }),
            [_, _, _] => return Err(wrong("a question before any fact")),
            _ => {
                return Err(wrong("a question needs an answer and supporting facts, between tabs"));
            }
        }
    }
    if questions.is_empty() { Err((1, "there is no question in it")) } else { Ok(questions) }
}

impl Family for BabiLong {
    fn available(&self) -> Option<usize> {
        Some(self.questions.len())
    }

    fn units(&self, _: usize) -> RangeInclusive<usize> {
        if self.background.is_empty() { 0..=0 } else { 0..=usize::MAX }
    }

    fn draft(&self, index: usize, units: usize, mut rng: ChaCha8Rng) -> Draft {
        let Question { facts, question, answer } = &self.questions[index];
        let from = rng.random_range(0..self.background.len().max(1));
        let mut background = self.background.iter().cycle().skip(from).take(units);
        let mut places: Vec<usize> = facts.iter().map(|_| rng.random_range(0..=units)).collect();
        places.sort_unstable();
        let mut facts = places.into_iter().zip(facts).peekable();
        let mut context = Vec::new();
        for place in 0..=units {
            while let Some((_, fact)) = facts.next_if(|&(at, _)| at == place) {
                context.push(fact.as_str());
            }
            context.extend(background.next().map(String::as_str));
        }
        let Prompt { instruction, examples, format } = self.prompt;
        let before = format!(
            "{instruction}\n\n{examples}\n\n{format}\n\n<context>\n{}\n</context>\n\n",
            context.join(" ")
        );
        let asked = format!("Question: {question}");
        let judge = Judge::OnlyLabel { labels: self.labels, question: question.clone() };
        Draft::new(before, &asked, String::new(), vec![answer.clone()], judge)
    }
}

/// What BABILong tells a model before the context.
#[derive(Debug)]
struct Prompt {
    instruction: &'static str,
    examples: &'static str,
    format: &'static str,
}

/// BABILong's own (Apache-2.0).
const PROMPTS: [Prompt; 5] = [
    Prompt {
        instruction: "I will give you context with the facts about positions of different persons hidden in some \
            random text and a question. You need to answer the question based only on the information from the facts. \
            If a person was in different locations, use the latest location to answer the question.",
        examples: "<example>\nCharlie went to the hallway. Judith come back to the kitchen. Charlie travelled to \
            balcony. Where is Charlie?\nAnswer: The most recent location of Charlie is balcony.\n</example>\n\n\
            <example>\nAlan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to \
            balcony. Where is Alan?\nAnswer: The most recent location of Alan is shop.\n</example>",
        format: "Always return your answer in the following format: The most recent location of ’person’ is \
            ’location’. Do not write anything else after that.",
    },
    Prompt {
        instruction: "I give you context with the facts about locations and actions of different persons hidden in \
            some random text and a question.You need to answer the question based only on the information from the \
            facts.\nIf a person got an item in the first location and travelled to the second location the item is \
            also in the second location. If a person dropped an item in the first location and moved to the second \
            location the item remains in the first location.",
        examples: "<example>\nCharlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. Where \
            is the bottle?\nAnswer: The bottle is in the balcony.\n</example>\n<example>\nAlan moved to the garage. \
            Alan got a screw driver. Alan moved to the kitchen. Where is the screw driver?\nAnswer: The screw driver \
            is in the kitchen.\n</example>",
        format: "Always return your answer in the following format: The ’item’ is in ’location’. Do not write \
            anything else after that.",
    },
    Prompt {
        instruction: "I give you context with the facts about locations and actions of different persons hidden in \
            some random text and a question. You need to answer the question based only on the information from the \
            facts.\nIf a person got an item in the first location and travelled to the second location the item is \
            also in the second location. If a person dropped an item in the first location and moved to the second \
            location the item remains in the first location.",
        examples: "<example>\nJohn journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. \
            Daniel journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the kitchen. Where was the \
            apple before the kitchen?\nAnswer: Before the kitchen the apple was in the bathroom.\n</example>\n\
            <example>\nJohn went back to the bedroom. John went back to the garden. John went back to the kitchen. \
            Sandra took the football. Sandra travelled to the garden. Sandra journeyed to the bedroom. Where was the \
            football before the bedroom?\nAnswer: Before the bedroom the football was in the garden.\n</example>",
        format: "Always return your answer in the following format: Before the $location_1$ the $item$ was in the \
            $location_2$. Do not write anything else after that.",
    },
    Prompt {
        instruction: "I will give you context with the facts about different people, their location and actions, \
            hidden in some random text and a question. You need to answer the question based only on the information \
            from the facts.",
        examples: "<example>\nThe hallway is south of the kitchen. The bedroom is north of the kitchen. What is the \
            kitchen south of?\nAnswer: bedroom\n</example>\n<example>\nThe garden is west of the bedroom. The bedroom \
            is west of the kitchen. What is west of the bedroom?\nAnswer: garden\n</example>",
        format: "Your answer should contain only one word - location. Do not write anything else after that.",
    },
    Prompt {
        instruction: "I will give you context with the facts about locations and their relations hidden in some \
            random text and a question. You need to answer the question based only on the information from the facts.",
        examples: "<example>\nMary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. \
            Bill took the milk there. Who did Mary give the apple to?\nAnswer: Fred\n</example>\n<example>\nJeff took \
            the football there. Jeff passed the football to Fred. Jeff got the milk there. Bill travelled to the \
            bedroom. Who gave the football?\nAnswer: Jeff\n</example>\n<example>\nFred picked up the apple there. \
            Fred handed the apple to Bill. Bill journeyed to the bedroom. Jeff went back to the garden. What did Fred \
            give to Bill?\nAnswer: apple\n</example>",
        format: "Your answer should contain only one word. Do not write anything else after that. Do not explain \
            your answer.",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_has_the_facts_of_its_story_so_far() {
        let text = "1 A went home.\n2 Where is A? \thome\t1\n3 B slept.\n4 Where is B? \tbed\t3\n\
                    1 C sat.\n2 Who sat? \tC\t1\n";
        let questions = parse(text).unwrap();
        let facts: Vec<_> = questions.iter().map(|q| q.facts.join(" ")).collect();
        assert_eq!(facts, ["A went home.", "A went home. B slept.", "C sat."]);
        assert_eq!(questions[1].question, "Where is B?");
        assert_eq!(questions[1].answer, "bed");
    }

    #[test]
    fn a_malformed_file_names_its_line() {
        for (text, expected) in [
            ("1 A went home.\nWhere is A?\thome\t1\n", (2, "it does not begin with a number")),
            ("1 Where is A?\thome\t1\n", (1, "a question before any fact")),
            (
                "1 A sat.\n2 Who sat?\tA\n",
                (2, "a question needs an answer and supporting facts, between tabs"),
            ),
            ("1 A sat.\n", (1, "there is no question in it")),
        ] {
            assert_eq!(parse(text).unwrap_err(), expected);
        }
    }
}
