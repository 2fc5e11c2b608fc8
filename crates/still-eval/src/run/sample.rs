//! One item's answer, as it is kept in the log of samples.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::bootstrap::blocks;
use crate::task::{Choice, Item, Metric, Question, Request};

/// Tokens of a window whose errors are taken as one when intervals are drawn: neighbors' errors are correlated.
const BLOCK: usize = 256;

/// A model's answer to one item, and its scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Of the item.
    pub id: String,
    /// Of the item.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Hashes of what was asked ([`hash_request`]), one per request: the same questions have the same hashes.
    pub asked: Vec<String>,
    /// The answer.
    #[serde(flatten)]
    pub answer: Answer,
    /// Tokens of the longest sequence that was read for it.
    pub tokens: usize,
    /// Bytes of the attention cache after the sequence that took most, its answer included; logs of older versions lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_bytes: Option<usize>,
    /// The question was too long for the model and lost its beginning.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    /// Score by metric. For perplexity it is the negative log-likelihood in nats (a window's mean).
    pub scores: BTreeMap<Metric, f64>,
}

/// An answer, by the kind of question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Answer {
    /// Of a multiple-choice question.
    Choice {
        /// The right one.
        gold: usize,
        /// By choice, nats, rounded to 10⁻⁶.
        loglikelihoods: Vec<f64>,
        /// By choice: greedy decoding writes it.
        greedy: Vec<bool>,
    },
    /// Of a continuation.
    Continuation {
        /// Nats, rounded to 10⁻⁶.
        loglikelihood: f64,
        /// Greedy decoding writes it.
        greedy: bool,
    },
    /// Of a window.
    Window {
        /// `−ln p` of each scored token, nats.
        nll: Vec<f32>,
        /// Index of the first of them in the window.
        scored_from: usize,
        /// Bytes of text that they stand for, if they are text.
        bytes: Option<usize>,
    },
    /// A written answer.
    Generation {
        /// Decoded, without special tokens.
        text: String,
        /// Tokens of it.
        new_tokens: usize,
        /// The right answer.
        targets: Vec<String>,
    },
}

/// What an answer cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    pub tokens: usize,
    pub cache_bytes: Option<usize>,
    pub truncated: bool,
}

impl Sample {
    /// Judges an answer.
    pub(super) fn new(item: &Item, metrics: &[Metric], answer: Answer, cost: Cost) -> Self {
        let score = |&metric: &Metric| Some((metric, score(&item.question, &answer, metric)?));
        let scores = metrics.iter().filter_map(score).collect();
        let (id, group) = (item.id.clone(), item.group.clone());
        let Cost { tokens, cache_bytes, truncated } = cost;
        let asked = hashes(&item.question);
        Self { id, group, asked, answer, tokens, cache_bytes, truncated, scores }
    }

    /// The same answer judged again; `None` if it answers another question than `item`'s.
    pub(super) fn judged_again(self, item: &Item, metrics: &[Metric]) -> Option<Self> {
        let same = self.id == item.id && self.asked == hashes(&item.question);
        let Self { tokens, cache_bytes, truncated, .. } = self;
        same.then(|| Self::new(item, metrics, self.answer, Cost { tokens, cache_bytes, truncated }))
    }

    /// `(sum, weight)` of what is averaged for a metric, in parts that are resampled whole.
    pub(crate) fn parts(&self, metric: Metric) -> Vec<(f64, f64)> {
        match &self.answer {
            Answer::Window { nll, .. } if metric == Metric::Perplexity => blocks(nll, BLOCK),
            _ => self.scores.get(&metric).map(|&score| (score, 1.0)).into_iter().collect(),
        }
    }
}

fn score(question: &Question, answer: &Answer, metric: Metric) -> Option<f64> {
    Some(match (question, answer) {
        (Question::Choice(choice), Answer::Choice { loglikelihoods, .. }) => {
            let lengths: Vec<usize> = match metric {
                Metric::Acc => vec![1; choice.choices.len()],
                Metric::AccNorm => choice.choices.iter().map(|text| text.chars().count()).collect(),
                Metric::AccBytes => choice.choices.iter().map(String::len).collect(),
                _ => return None,
            };
            let per_length: Vec<f64> = loglikelihoods
                .iter()
                .zip(lengths)
                .map(|(&loglikelihood, length)| loglikelihood / length as f64)
                .collect();
            f64::from(u8::from(first_largest(&per_length) == choice.gold))
        }
        (Question::Continuation(_), Answer::Continuation { loglikelihood, greedy }) => match metric
        {
            Metric::Acc => f64::from(u8::from(*greedy)),
            Metric::Perplexity => -loglikelihood,
            _ => return None,
        },
        (Question::Window(_), Answer::Window { nll, .. }) if metric == Metric::Perplexity => {
            nll.iter().map(|&nll| f64::from(nll)).sum::<f64>() / nll.len() as f64
        }
        (Question::Generation(question), Answer::Generation { text, .. })
            if metric == Metric::Score =>
        {
            question.score(text)
        }
        _ => return None,
    })
}

/// Index of the largest value; of equal ones, the first.
fn first_largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

/// What a question is recognized by, request by request.
fn hashes(question: &Question) -> Vec<String> {
    match question {
        Question::Choice(Choice { requests, .. }) => requests.iter().map(hash_request).collect(),
        Question::Continuation(request) => vec![hash_request(request)],
        Question::Window(window) => {
            vec![hash_ids(window.ids.iter().chain([&(window.scored_from as u32)]))]
        }
        Question::Generation(question) => {
            vec![hash_ids(
                question.prompt_ids().iter().chain([&(question.max_new_tokens() as u32)]),
            )]
        }
    }
}

/// The first 16 hexadecimal digits of SHA-256 over the context, a zero byte and the continuation.
pub fn hash_request(request: &Request) -> String {
    let mut hash = Sha256::new();
    hash.update(&request.context);
    hash.update([0]);
    hash.update(&request.continuation);
    digits(hash)
}

fn hash_ids<'a>(ids: impl Iterator<Item = &'a u32>) -> String {
    let mut hash = Sha256::new();
    for id in ids {
        hash.update(id.to_le_bytes());
    }
    digits(hash)
}

fn digits(hash: Sha256) -> String {
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(choices: [&str; 2], loglikelihoods: [f64; 2]) -> [Option<f64>; 3] {
        let requests =
            choices.map(|choice| Request { context: "c".into(), continuation: choice.into() });
        let question = Question::Choice(Choice {
            requests: requests.to_vec(),
            choices: choices.map(str::to_owned).to_vec(),
            gold: 0,
        });
        let answer =
            Answer::Choice { gold: 0, loglikelihoods: loglikelihoods.to_vec(), greedy: vec![] };
        [Metric::Acc, Metric::AccNorm, Metric::AccBytes]
            .map(|metric| score(&question, &answer, metric))
    }

    #[test]
    fn lengths_are_characters_or_bytes() {
        // Per character −1 and −0.9; per byte −0.5 and −0.9.
        assert_eq!(choice(["éé", "xxxx"], [-2.0, -3.6]), [Some(1.0), Some(0.0), Some(1.0)]);
        assert_eq!(choice(["ab", "xxxx"], [-4.0, -3.0]), [Some(0.0); 3]);
    }

    #[test]
    fn of_equal_choices_the_first_is_chosen() {
        assert_eq!(choice(["ab", "cd"], [-1.0, -1.0]), [Some(1.0); 3]);
        assert_eq!(first_largest(&[-2.0, -1.0, -1.0]), 1);
    }

    #[test]
    fn samples_survive_their_log() {
        let answers = [
            Answer::Choice {
                gold: 1,
                loglikelihoods: vec![-1.25, -33.123457],
                greedy: vec![true, false],
            },
            Answer::Continuation { loglikelihood: -0.1, greedy: true },
            Answer::Window { nll: vec![0.1, 3.333_333_3], scored_from: 1, bytes: None },
            Answer::Generation {
                text: "a \"b\"\n".into(),
                new_tokens: 3,
                targets: vec!["b".into()],
            },
        ];
        for answer in answers {
            let sample = Sample {
                id: "7".into(),
                group: Some("law".into()),
                asked: vec!["0123456789abcdef".into()],
                answer,
                tokens: 12,
                cache_bytes: Some(345),
                truncated: true,
                scores: [(Metric::AccNorm, 1.0)].into(),
            };
            let line = serde_json::to_string(&sample).unwrap();
            assert_eq!(serde_json::from_str::<Sample>(&line).unwrap(), sample, "{line}");
        }
    }
}
