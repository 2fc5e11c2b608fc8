//! What a model is asked: a task is a list of items, and an item is one question with a known answer.
//!
//! Four kinds of question cover the benchmarks ([`Question`]); [`crate::run`] asks them and knows no benchmark. A new
//! benchmark is a function that returns a [`Task`].
//!
//! | file | content |
//! |---|---|
//! | `standard` | the harness's short tasks |
//! | `hellaswag`, `mmlu` | what these two do besides |
//! | `perplexity` | windows of a text |
//! | `data` | JSON lines, whose errors name file and line |

mod data;
mod hellaswag;
mod mmlu;
mod perplexity;
mod standard;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use perplexity::{WindowOptions, id_windows, windows};
pub use standard::{STANDARD, StandardOptions, standard};

/// A benchmark, ready to be asked.
#[derive(Debug)]
pub struct Task {
    /// As EleutherAI's lm-evaluation-harness calls it, where it has the task.
    pub name: String,
    /// In the order of the data.
    pub items: Vec<Item>,
    /// What each item is judged by; the first is the one that the task is known for.
    pub metrics: Vec<Metric>,
    /// Tokens that its windows or prompts were made to have, if they were made to have any.
    pub length: Option<usize>,
}

/// One question with its answer.
#[derive(Debug)]
pub struct Item {
    /// Unique in the task, and the same in every run over the same data.
    pub id: String,
    /// A part of the task whose items share how they begin (MMLU's subjects); they stand together. What they share is read
    /// once, and the task's standard error is pooled over the parts.
    pub group: Option<String>,
    /// What is asked.
    pub question: Question,
}

/// The kinds of question.
#[derive(Debug)]
pub enum Question {
    /// Which of several continuations is the likeliest?
    Choice(Choice),
    /// How likely is this continuation as a whole, and would greedy decoding write it?
    Continuation(Request),
    /// How likely is each token of a text?
    Window(Window),
    /// Greedy decoding writes an answer, which is judged.
    Generation(Box<dyn Generative>),
}

/// A multiple-choice question.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// One per choice; the contexts are usually the same.
    pub requests: Vec<Request>,
    /// The choices' own text, whose lengths `acc_norm` and `acc_bytes` divide by.
    pub choices: Vec<String>,
    /// Index of the right choice.
    pub gold: usize,
}

/// A text to have the log-likelihood of, tokenized as the harness does: context and continuation together, and what lies
/// beyond the tokens of the context alone is the continuation. White space at the context's end belongs to the continuation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What comes before; may be empty.
    pub context: String,
    /// What is to be scored, with the space before it.
    pub continuation: String,
}

/// A run of tokens whose end is scored, token by token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Fed as they are.
    pub ids: Vec<u32>,
    /// Index of the first token that is scored; at least 1.
    pub scored_from: usize,
    /// Bytes of text that the scored tokens stand for, if they are text.
    pub bytes: Option<usize>,
}

impl Window {
    /// The window as an item that shares its beginning with no other.
    pub fn item(self, id: String) -> Item {
        Item { id, group: None, question: Question::Window(self) }
    }
}

/// A question that is answered in writing.
pub trait Generative: fmt::Debug + Send + Sync {
    /// The whole prompt, with a beginning-of-sequence token where the model wants one.
    fn prompt_ids(&self) -> &[u32];

    /// Tokens of the prompt that come before the question: what can be read without knowing it. All, where there is no such place.
    fn context_tokens(&self) -> usize {
        self.prompt_ids().len()
    }

    /// The answer is cut there; the end-of-sequence token ends it before.
    fn max_new_tokens(&self) -> usize;

    /// What would be right, for the log of samples.
    fn targets(&self) -> &[String];

    /// Judges the decoded answer (special tokens left out): 0 for wrong to 1 for right.
    fn score(&self, answer: &str) -> f64;
}

/// How items are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The right choice is the likeliest, or greedy decoding writes the continuation.
    Acc,
    /// The right choice has the largest log-likelihood per character of its text. The harness speaks of bytes here and
    /// divides by characters; so does this.
    AccNorm,
    /// The right choice has the largest log-likelihood per byte of its text in UTF-8.
    AccBytes,
    /// `exp` of the mean negative log-likelihood: of a continuation as a whole, of a window by token.
    Perplexity,
    /// What [`Generative::score`] says.
    Score,
}

impl Metric {
    /// As results name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Acc => "acc",
            Self::AccNorm => "acc_norm",
            Self::AccBytes => "acc_bytes",
            Self::Perplexity => "perplexity",
            Self::Score => "score",
        }
    }

    /// Whether more is better.
    pub fn higher_is_better(self) -> bool {
        self != Self::Perplexity
    }
}

impl Task {
    /// What guessing would reach at the first metric: for choices, the mean of one over their number. `None` for questions
    /// that cannot be guessed.
    pub fn chance(&self) -> Option<f64> {
        let share = |item: &Item| match &item.question {
            Question::Choice(choice) => Some(1.0 / choice.requests.len() as f64),
            _ => None,
        };
        let shares: Option<Vec<f64>> = self.items.iter().map(share).collect();
        shares
            .filter(|shares| !shares.is_empty())
            .map(|shares| shares.iter().sum::<f64>() / shares.len() as f64)
    }
}
