//! What a model is asked: a task is a list of items, and an item is one question with a known answer.
//!
//! Four kinds of question cover the benchmarks ([`Question`]); the runner asks them and knows no benchmark. A new
//! benchmark is a function that returns a [`Task`].

use std::fmt;

/// A benchmark, ready to be asked.
#[derive(Debug)]
pub struct Task {
    /// As EleutherAI's lm-evaluation-harness calls it, where it has the task.
    pub name: String,
    /// In the order of the data.
    pub items: Vec<Item>,
    /// What each item is judged by; the first is the one that the task is known for.
    pub metrics: Vec<Metric>,
}

/// One question with its answer.
#[derive(Debug)]
pub struct Item {
    /// Unique in the task, and the same in every run over the same data.
    pub id: String,
    /// A part of the task whose items share how they begin (MMLU's subjects). The runner reads a shared beginning once.
    pub group: Option<String>,
    /// What is asked.
    pub question: Question,
}

/// The kinds of question.
#[derive(Debug)]
pub enum Question {
    /// Which of several continuations is the likeliest?
    Choice(Choice),
    /// How likely is this continuation, and would greedy decoding write it?
    Continuation(Request),
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

/// Something to have the log-likelihood of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Text, tokenised as the harness does (see docs/evaluation.md).
    Text {
        /// What comes before; may be empty.
        context: String,
        /// What is to be scored, with the space before it.
        continuation: String,
    },
    /// Token ids, as they are.
    Tokens {
        /// What comes before; at least one token.
        context: Vec<u32>,
        /// What is to be scored; at least one token.
        continuation: Vec<u32>,
    },
}

/// A question that is answered in writing.
pub trait Generative: fmt::Debug + Send + Sync {
    /// The whole prompt, with a beginning-of-sequence token where the model wants one.
    fn prompt_ids(&self) -> &[u32];

    /// The answer is cut there; the end-of-sequence token ends it before.
    fn max_new_tokens(&self) -> usize;

    /// What would be right, for the log of samples.
    fn targets(&self) -> &[String];

    /// Judges the decoded answer (special tokens left out): 0 for wrong to 1 for right.
    fn score(&self, answer: &str) -> f64;
}

/// How items are judged. A task's value is the mean over its items, of [`Metric::Perplexity`] the exponential of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Metric {
    /// The right choice is the likeliest, or greedy decoding writes the continuation.
    Acc,
    /// The right choice has the largest log-likelihood per character of its text. The harness documents this as
    /// normalised by bytes and divides by characters; so do we.
    AccNorm,
    /// The same per byte of UTF-8.
    AccBytes,
    /// `exp` of the mean negative log-likelihood of an item's continuation, nats.
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
}
