//! Scores of a task from its samples.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::sample::{Answer, Sample};
use crate::bootstrap::{Interval, PairedBootstrap, differences};
use crate::error::{EvalError, Result};
use crate::task::{Metric, Task};
use crate::wilson::{Z, wilson};

/// Points of a curve over a window's positions.
const CURVE_POINTS: usize = 16;

/// A task's result.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskScores {
    /// The task.
    pub task: String,
    /// Tokens that its windows or prompts were made to have, if they were.
    pub length: Option<usize>,
    /// Items that were answered.
    pub n: usize,
    /// What guessing reaches at the first metric.
    pub chance: Option<f64>,
    /// By metric, the task's first one first.
    pub metrics: Vec<(Metric, Estimate)>,
    /// Mean of the first metric over each group, with its items, in order of appearance.
    pub groups: Vec<(String, usize, f64)>,
    /// Of windows: by position.
    pub curve: Vec<CurvePoint>,
    /// Of windows of text: bits for each byte of it, which no tokenizer's choice flatters.
    pub bits_per_byte: Option<f64>,
    /// Mean over items of the tokens of the longest sequence read for it.
    pub mean_tokens: f64,
    /// Mean over items of the bytes of the attention cache; `None` if a log of an older version does not have them all.
    pub cache_bytes: Option<f64>,
    /// Items that lost their beginning because they were too long for the model.
    pub truncated: usize,
}

/// A value with its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Over all items.
    pub value: f64,
    /// `None` if there are too few items to say. Of perplexities by the delta method.
    pub stderr: Option<f64>,
    /// Ends of the 95 % interval. Where every answer is right or wrong, Wilson's; else 1.96 standard errors to either side, of
    /// perplexities before the exponential. `None` if there are too few items to say.
    pub interval: Option<[f64; 2]>,
}

/// Mean negative log-likelihood of some positions of a window.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// First token.
    pub from: usize,
    /// One past the last.
    pub to: usize,
    /// Nats per token.
    pub nll: f64,
}

impl TaskScores {
    /// Of samples that answer items of `task`.
    ///
    /// # Errors
    /// If there are none.
    pub fn of(task: &Task, samples: &[Sample]) -> Result<Self> {
        if samples.is_empty() {
            return Err(EvalError::Argument(format!("{}: no item was answered", task.name)));
        }
        let groups = groups(samples);
        let metrics = task
            .metrics
            .iter()
            .map(|&metric| (metric, estimate(samples, &groups, metric)))
            .collect();
        let first = task.metrics.first().copied().unwrap_or(Metric::Score);
        Ok(Self {
            task: task.name.clone(),
            length: task.length,
            n: samples.len(),
            chance: task.chance(),
            metrics,
            groups: groups
                .iter()
                .map(|samples| {
                    let name = samples[0].group.clone().unwrap_or_default();
                    (name, samples.len(), mean_of(&parts(samples, first)))
                })
                .collect(),
            curve: curve(samples),
            bits_per_byte: bits_per_byte(samples),
            mean_tokens: samples.iter().map(|sample| sample.tokens as f64).sum::<f64>()
                / samples.len() as f64,
            cache_bytes: samples
                .iter()
                .map(|sample| sample.cache_bytes)
                .sum::<Option<usize>>()
                .map(|sum| sum as f64 / samples.len() as f64),
            truncated: samples.iter().filter(|sample| sample.truncated).count(),
        })
    }

    /// `{"acc", "acc_norm", …, "stderr", "acc_norm_stderr", …, "n", …}`: `stderr` is that of the first metric.
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        for (metric, estimate) in &self.metrics {
            object.insert(metric.name().into(), json!(estimate.value));
        }
        for (n, (metric, estimate)) in self.metrics.iter().enumerate() {
            let name = if n == 0 { "stderr".into() } else { format!("{}_stderr", metric.name()) };
            object.insert(name, json!(estimate.stderr));
        }
        let interval = |(metric, estimate): &(Metric, Estimate)| {
            Some((metric.name().into(), json!(estimate.interval?)))
        };
        let intervals: Map<String, Value> = self.metrics.iter().filter_map(interval).collect();
        object.insert("intervals".into(), Value::Object(intervals));
        object.insert("n".into(), json!(self.n));
        object.insert("chance".into(), json!(self.chance));
        if let Some(length) = self.length {
            object.insert("length".into(), json!(length));
        }
        object.insert("mean_tokens".into(), json!(self.mean_tokens));
        object.insert("cache_bytes".into(), json!(self.cache_bytes));
        object.insert("truncated".into(), json!(self.truncated));
        if let Some(bits) = self.bits_per_byte {
            object.insert("bits_per_byte".into(), json!(bits));
        }
        if !self.curve.is_empty() {
            object.insert("curve".into(), json!(self.curve));
        }
        if !self.groups.is_empty() {
            let group = |(name, n, value): &(String, usize, f64)| {
                let first = self.metrics.first().map_or("score", |(metric, _)| metric.name());
                let mut group = Map::new();
                group.insert(first.into(), json!(value));
                group.insert("n".into(), json!(n));
                (name.clone(), Value::Object(group))
            };
            let groups: Map<String, Value> = self.groups.iter().map(group).collect();
            object.insert("groups".into(), Value::Object(groups));
        }
        Value::Object(object)
    }
}

/// The interval of what `a` has more than `b` at a metric, over the items that both answered: points of accuracy or score; of
/// perplexity, nats of negative log-likelihood. Items are resampled, of windows their blocks of 256 tokens.
///
/// # Errors
/// If no item was answered by both.
pub fn difference(
    a: &[Sample],
    b: &[Sample],
    metric: Metric,
    bootstrap: &PairedBootstrap,
) -> Result<Interval> {
    let others: std::collections::HashMap<&str, &Sample> =
        b.iter().map(|sample| (sample.id.as_str(), sample)).collect();
    let mut blocks = Vec::new();
    for sample in a {
        let Some(other) = others.get(sample.id.as_str()) else { continue };
        blocks.extend(differences(sample.parts(metric), other.parts(metric)));
    }
    bootstrap.of_blocks(&blocks)
}

/// Samples by group, if they have groups.
fn groups(samples: &[Sample]) -> Vec<Vec<&Sample>> {
    let mut groups: Vec<Vec<&Sample>> = Vec::new();
    for sample in samples.iter().filter(|sample| sample.group.is_some()) {
        match groups.iter_mut().rev().find(|group| group[0].group == sample.group) {
            Some(group) => group.push(sample),
            None => groups.push(vec![sample]),
        }
    }
    groups
}

fn estimate(samples: &[Sample], groups: &[Vec<&Sample>], metric: Metric) -> Estimate {
    let all = parts(&samples.iter().collect::<Vec<_>>(), metric);
    let value = mean_of(&all);
    let stderr = if groups.is_empty() {
        stderr(&all)
    } else {
        pooled_stderr(&groups.iter().map(|group| parts(group, metric)).collect::<Vec<_>>())
    };
    let normal = stderr.map(|stderr| [value - Z * stderr, value + Z * stderr]);
    if metric == Metric::Perplexity {
        let (nats, value) = (normal, value.exp());
        let stderr = stderr.map(|stderr| stderr * value);
        return Estimate { value, stderr, interval: nats.map(|nats| nats.map(f64::exp)) };
    }
    let interval = match right(&all) {
        Some(right) => wilson(right, all.len()).ok().map(|share| [share.low, share.high]),
        // Some answers are right in part.
        None => normal.map(|ends| ends.map(|end| end.clamp(0.0, 1.0))),
    };
    Estimate { value, stderr, interval }
}

/// How many answers are right, if each is right or wrong.
fn right(parts: &[(f64, f64)]) -> Option<usize> {
    let whole = parts.iter().all(|&part| part == (0.0, 1.0) || part == (1.0, 1.0));
    whole.then(|| parts.iter().filter(|part| part.0 == 1.0).count())
}

/// `(sum, weight)` of every part.
fn parts(samples: &[&Sample], metric: Metric) -> Vec<(f64, f64)> {
    samples.iter().flat_map(|sample| sample.parts(metric)).collect()
}

/// The mean of a metric over what was answered; of perplexity the negative log-likelihood, nats per token.
pub fn mean(samples: &[Sample], metric: Metric) -> f64 {
    mean_of(&parts(&samples.iter().collect::<Vec<_>>(), metric))
}

fn mean_of(parts: &[(f64, f64)]) -> f64 {
    let (sum, weight) = parts.iter().fold((0.0, 0.0), |all, part| (all.0 + part.0, all.1 + part.1));
    sum / weight
}

/// The harness's `mean_stderr`: the sample's standard deviation (over n − 1) by √n.
fn stderr(parts: &[(f64, f64)]) -> Option<f64> {
    if parts.len() < 2 {
        return None;
    }
    let n = parts.len() as f64;
    let means: Vec<f64> = parts.iter().map(|(sum, weight)| sum / weight).collect();
    let mean = means.iter().sum::<f64>() / n;
    let squares: f64 = means.iter().map(|x| (x - mean).powi(2)).sum();
    Some((squares / (n - 1.0)).sqrt() / n.sqrt())
}

/// The harness's `pooled_sample_stderr` of groups.
fn pooled_stderr(groups: &[Vec<(f64, f64)>]) -> Option<f64> {
    let items: usize = groups.iter().map(Vec::len).sum();
    let freedom = items.checked_sub(groups.len()).filter(|&freedom| freedom > 0)? as f64;
    let squares: f64 = groups
        .iter()
        .filter_map(|group| {
            let n = group.len() as f64;
            Some((n - 1.0) * stderr(group)?.powi(2) * n)
        })
        .sum();
    Some((squares / freedom / items as f64).sqrt())
}

fn curve(samples: &[Sample]) -> Vec<CurvePoint> {
    let (mut sums, mut counts) = (Vec::new(), Vec::new());
    for sample in samples {
        if let Answer::Window { nll, scored_from, .. } = &sample.answer {
            let end = scored_from + nll.len();
            if sums.len() < end {
                sums.resize(end, 0.0);
                counts.resize(end, 0_usize);
            }
            for (n, &nll) in nll.iter().enumerate() {
                sums[scored_from + n] += f64::from(nll);
                counts[scored_from + n] += 1;
            }
        }
    }
    let step = sums.len().div_ceil(CURVE_POINTS).max(1);
    let point = |from: usize| {
        let to = (from + step).min(sums.len());
        let count: usize = counts[from..to].iter().sum();
        let nll = sums[from..to].iter().sum::<f64>() / count as f64;
        (count > 0).then_some(CurvePoint { from, to, nll })
    };
    (0..sums.len()).step_by(step).filter_map(point).collect()
}

fn bits_per_byte(samples: &[Sample]) -> Option<f64> {
    let (mut nats, mut all) = (0.0, 0);
    for sample in samples {
        let Answer::Window { nll, bytes: Some(bytes), .. } = &sample.answer else { return None };
        nats += nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
        all += bytes;
    }
    (all > 0).then(|| nats / std::f64::consts::LN_2 / all as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ones_and_zeros(ones: usize, zeros: usize) -> Vec<(f64, f64)> {
        [vec![(1.0, 1.0); ones], vec![(0.0, 1.0); zeros]].concat()
    }

    #[test]
    fn stderr_is_over_one_less() {
        // p = 1/4 of 4: variance 3/16 · 4/3, over 4.
        let got = stderr(&ones_and_zeros(1, 3)).unwrap();
        assert!((got - 0.25).abs() < 1e-12, "{got}");
        assert_eq!(stderr(&ones_and_zeros(1, 0)), None);
    }

    #[test]
    fn right_and_wrong_answers_are_counted() {
        assert_eq!(right(&ones_and_zeros(3, 2)), Some(3));
        assert_eq!(right(&[(1.0, 1.0), (0.5, 1.0)]), None);
        // Blocks of tokens are no answers.
        assert_eq!(right(&[(1.0, 256.0)]), None);
    }

    #[test]
    fn groups_are_pooled() {
        let groups = [ones_and_zeros(1, 3), ones_and_zeros(1, 1), ones_and_zeros(1, 0)];
        // ((4−1)·0.25²·4 + (2−1)·0.5²·2) / (7 − 3) / 7
        let expected = ((0.75 + 0.5) / 4.0 / 7.0_f64).sqrt();
        assert!((pooled_stderr(&groups).unwrap() - expected).abs() < 1e-12);
        assert_eq!(pooled_stderr(&[ones_and_zeros(1, 0), ones_and_zeros(0, 1)]), None);
    }
}
