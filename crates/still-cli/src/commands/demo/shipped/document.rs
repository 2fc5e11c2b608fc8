//! The demo's document: pages of a book with facts planted in them, and questions about both.

use serde::Deserialize;
use still_eval::Document;
use still_eval::long::{Judge, LongItem};
use still_eval::task::{Item, Metric, Question, Task};
use still_model::{Message, Tokenizer};

const TEXT: &str = include_str!("../../../../demo/document.txt");
const QUESTIONS: &str = include_str!("../../../../demo/questions.json");

/// The task of the planted facts.
pub const FACTS: &str = "facts";
/// The task of the question that has more than one good answer.
pub const OPEN: &str = "open";
/// Tokens that the answer to a fact may have.
const FACT_TOKENS: usize = 16;
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
    /// How the answer begins; the model goes on from there, as RULER has it.
    begins: String,
    answer: String,
}

/// The document in tokens, as the beginning of a user's message where the model has a chat template; and its questions.
///
/// # Errors
/// If the tokenizer or the template fails.
pub fn document(tokenizer: &Tokenizer) -> anyhow::Result<Document> {
    const PLACE: &str = "[document]";
    let questions: Questions = serde_json::from_str(QUESTIONS)?;
    let (before, after) = match tokenizer.chat_template() {
        Some(template) => {
            let turn = template.render(&[Message::new("user", PLACE)], true)?;
            let parts = turn.split_once(PLACE);
            let (before, after) = parts.unwrap_or((turn.as_str(), ""));
            (before.to_owned(), after.to_owned())
        }
        None => (String::new(), "\n".to_owned()),
    };
    let special = tokenizer.chat_template().is_none();
    let ids = tokenizer.encode(&format!("{before}{}", TEXT.trim_end()), special)?;
    let item = |n: usize, asked: String, max_new_tokens, targets| -> anyhow::Result<Item> {
        let mut prompt_ids = ids.clone();
        prompt_ids.extend(tokenizer.encode(&asked, false)?);
        let item = LongItem { prompt_ids, max_new_tokens, targets, judge: Judge::All };
        let question = Question::Generation(Box::new(item));
        Ok(Item { id: n.to_string(), group: None, question })
    };
    let facts = questions.facts.iter().enumerate().map(|(n, fact)| {
        let asked = format!("\n\n{}{after}{}", fact.question, fact.begins);
        item(n, asked, FACT_TOKENS, vec![fact.answer.clone()])
    });
    let facts = facts.collect::<anyhow::Result<_>>()?;
    let open = item(0, format!("\n\n{}{after}", questions.open), OPEN_TOKENS, Vec::new())?;
    let task = |name: &str, items| {
        let (name, metrics) = (name.to_owned(), vec![Metric::Score]);
        Task { name, items, metrics, length: None }
    };
    let tasks = vec![task(FACTS, facts), task(OPEN, vec![open])];
    Ok(Document { ids, tasks })
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
