//! The measurements of one model.

use serde::{Deserialize, Serialize};
use still_eval::task::Metric;
use still_eval::{BenchPoint, Interval, Measured, perplexity_ratio};

use super::yardstick::{HELDOUT, REPEATED};

/// The row that the others are compared with.
pub const TEACHER: &str = "teacher";

/// One model's numbers; what was not measured is absent.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Row {
    /// `teacher`, `untrained`, `trained` or `student`.
    pub model: String,
    /// On the held-out windows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Its perplexity over the teacher's, with the ends of the 95 % interval (paired bootstrap).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity_ratio: Option<Interval>,
    /// What it found in long prompts, by task.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recall: Vec<Recall>,
    /// Loss on the second copy of a random sequence, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeated_nll: Option<f64>,
    /// Bytes of the attention cache after the context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_bytes: Option<usize>,
    /// Tokens of the context read per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_s: Option<f64>,
    /// Tokens decoded per second after the context, from the median step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<f64>,
}

/// Answers to questions that are found in a long prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recall {
    /// What was asked for, in the plural: `pass keys`.
    pub what: String,
    /// Right answers.
    pub right: usize,
    /// Questions.
    pub of: usize,
    /// Tokens of the prompts.
    pub length: usize,
}

impl Row {
    /// A row without numbers.
    pub fn named(model: &str) -> Self {
        Self { model: model.into(), ..Self::default() }
    }

    /// A model's numbers, perplexity compared with `teacher`'s. `recall` names tasks: what is asked for, the task, its length.
    ///
    /// # Errors
    /// If the teacher was asked other windows.
    pub fn of(
        model: &str,
        measured: &Measured,
        teacher: Option<&Measured>,
        recall: &[(&str, &str, usize)],
        seed: u64,
    ) -> still_eval::Result<Self> {
        let ratio = match teacher {
            Some(teacher) => perplexity_ratio(HELDOUT, measured, teacher, seed)?,
            None => None,
        };
        let found = |&(what, task, length): &(&str, &str, usize)| {
            let (right, of) = measured.right(task)?;
            Some(Recall { what: what.into(), right, of, length })
        };
        let speed = measured.document.or_else(|| measured.points.first().copied());
        Ok(Self {
            perplexity: measured.nll(HELDOUT).map(|nll| nll.perplexity()),
            perplexity_ratio: ratio,
            recall: recall.iter().filter_map(found).collect(),
            repeated_nll: measured.mean(REPEATED, Metric::Perplexity),
            ..Self::named(model).with_speed(speed)
        })
    }

    fn with_speed(self, point: Option<BenchPoint>) -> Self {
        let Some(point) = point else { return self };
        Self {
            cache_bytes: Some(point.prefilled_cache_bytes),
            prefill_tokens_per_s: Some(point.prefill_tokens_per_s),
            decode_tokens_per_s: Some(1e3 / point.decode_p50_ms),
            ..self
        }
    }

    /// Right answers and questions over all tasks.
    pub fn found(&self) -> (usize, usize) {
        let sum = |of: fn(&Recall) -> usize| self.recall.iter().map(of).sum();
        (sum(|recall| recall.right), sum(|recall| recall.of))
    }
}
