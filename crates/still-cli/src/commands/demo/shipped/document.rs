//! The demo's document: pages of a book with facts planted in them, and questions about both.

use serde::Deserialize;
use still_eval::Document;
use still_eval::long::{Judge, LongItem};
use still_eval::task::{Item, Metric, Question, Task};
use still_model::{Message, Tokenizer, message_about};

const TEXT: &str = include_str!("../../../../demo/document.txt");
const QUESTIONS: &str = include_str!("../../../../demo/questions.json");

/// The task of the planted facts.
pub const FACTS: &str = "facts";
/// The task of the question that has more than one good answer.
pub const OPEN: &str = "open";
/// Tokens that the answer to a fact may have.
const FACT_TOKENS: usize = 24;
/// Tokens that the answer to the open question may have.
const OPEN_TOKENS: usize = 48;

#[derive(Debug, Deserialize)]
struct Questions {
    facts: Vec<Fact>,
    open: String,
}

/// A fact that was planted in the document.
#[derive(Debug, Deserialize)]
struct Fact {
    /// The sentence in the document.
    #[cfg_attr(not(test), allow(dead_code, reason = "a test looks for it"))]
    planted: String,
    question: String,
    answer: String,
}

/// The document in tokens and its questions, as `still ask` puts them.
///
/// # Errors
/// If the tokenizer or the template fails.
pub fn document(tokenizer: &Tokenizer) -> anyhow::Result<Document> {
    let questions: Questions = serde_json::from_str(QUESTIONS)?;
    let prompt = |question: &str| -> anyhow::Result<Vec<u32>> {
        let message = message_about(TEXT, question);
        Ok(match tokenizer.chat_template() {
            Some(template) => {
                let turn = template.render(&[Message::new("user", message.as_str())], true)?;
                tokenizer.encode(&turn, false)?
            }
            None => tokenizer.encode(&format!("{message}\n"), true)?,
        })
    };
    let item = |n: usize, prompt_ids, context_tokens, max_new_tokens, targets| {
        let judge = Judge::All;
        let item = LongItem { prompt_ids, context_tokens, max_new_tokens, targets, judge };
        let question = Question::Generation(Box::new(item));
        Item { id: n.to_string(), group: None, question }
    };
    let mut facts = Vec::new();
    let open = prompt(&questions.open)?;
    // What all prompts begin with is read once.
    let mut shared = open.len();
    for (n, fact) in questions.facts.iter().enumerate() {
        let ids = prompt(&fact.question)?;
        let common = ids.iter().zip(&open).take_while(|(a, b)| a == b).count();
        shared = shared.min(common);
        facts.push(item(n, ids, common, FACT_TOKENS, vec![fact.answer.clone()]));
    }
    let ids = open[..shared].to_vec();
    let open = vec![item(0, open, shared, OPEN_TOKENS, Vec::new())];
    let task = |name: &str, items| {
        let (name, metrics) = (name.to_owned(), vec![Metric::Score]);
        Task { name, items, metrics, length: None }
    };
    Ok(Document { ids, tasks: vec![task(FACTS, facts), task(OPEN, open)] })
}

/// What a task asks, in words, by item.
///
/// # Errors
/// If the embedded questions are damaged.
pub fn questions(task: &str) -> anyhow::Result<Vec<String>> {
    let questions: Questions = serde_json::from_str(QUESTIONS)?;
    Ok(match task {
        OPEN => vec![questions.open],
        _ => questions.facts.into_iter().map(|fact| fact.question).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fact_is_planted_once_and_said_nowhere_else() {
        let questions: Questions = serde_json::from_str(QUESTIONS).unwrap();
        assert_eq!(questions.facts.len(), 10);
        for Fact { planted, answer, question, .. } in &questions.facts {
            assert_eq!(TEXT.matches(planted.as_str()).count(), 1, "{planted}");
            assert!(planted.contains(answer.as_str()), "{planted}");
            let rest = TEXT.replace(planted.as_str(), "");
            assert!(!rest.contains(answer.as_str()), "{answer}");
            assert!(!question.contains(answer.as_str()), "{question}");
        }
        let words = TEXT.split_whitespace().count();
        assert!((4500..5500).contains(&words), "{words}");
    }
}
