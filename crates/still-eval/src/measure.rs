//! One model measured as another was: the same windows, the same questions, speed at the same contexts.
//!
//! `still demo` and the verdict of `still linearize` are made of this.

use std::collections::BTreeMap;

use still_attention::RowDtype;
use still_model::{Model, OnRead};

use crate::bootstrap::{Interval, PairedBootstrap};
use crate::error::Result;
use crate::perplexity::Nll;
use crate::run::{AskOptions, Sample, ask, ask_after, difference, mean};
use crate::speed::{BenchPoint, ModelBench};
use crate::task::{Metric, Task};

/// A text that a model reads once, and what it is asked about it.
#[derive(Debug)]
pub struct Document {
    /// The text in tokens, with what a prompt begins with.
    pub ids: Vec<u32>,
    /// Questions with written answers; their prompts begin with `ids`.
    pub tasks: Vec<Task>,
}

/// What models are measured by, the same for each of them. What is empty or 0 is left out.
#[derive(Debug, Default)]
pub struct Yardstick {
    /// Read once; speed is timed while it is read.
    pub document: Option<Document>,
    /// Asked by themselves: windows, pass keys and others.
    pub tasks: Vec<Task>,
    /// Contexts, in tokens, at which speed is timed on made-up prompts.
    pub contexts: Vec<usize>,
    /// Decode steps timed after each context.
    pub decode_steps: usize,
}

/// What a model answered, and how fast.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Answers by task.
    samples: BTreeMap<String, Vec<Sample>>,
    /// Speed and cache bytes at each context, in the yardstick's order.
    pub points: Vec<BenchPoint>,
    /// The same while the document was read.
    pub document: Option<BenchPoint>,
}

impl Yardstick {
    /// Questions and windows in all.
    pub fn items(&self) -> usize {
        let document = self.document.iter().flat_map(|document| &document.tasks);
        self.tasks.iter().chain(document).map(|task| task.items.len()).sum()
    }

    /// Measures a model whose cache stores exact rows as `rows`. `on_read` is told how much of the document has been read,
    /// `on_answer` of every answer, from several threads.
    ///
    /// # Errors
    /// An item that the model cannot be asked, a likelihood that is not finite, an error of the model.
    pub fn measure(
        &self,
        model: &Model,
        rows: RowDtype,
        on_read: &OnRead,
        on_answer: &(dyn Fn() + Sync),
    ) -> Result<Measured> {
        let options = AskOptions { rows, ..AskOptions::default() };
        let told = |_: &Task, _: &Sample| {
            on_answer();
            Ok(())
        };
        let mut samples = BTreeMap::new();
        let mut read = None;
        if let Some(Document { ids, tasks }) = &self.document {
            let bench = ModelBench::new(model, 1, rows)?;
            let (point, cache) = bench.time_text(ids, self.decode_steps, on_read)?;
            for task in tasks {
                let before = Some((ids.clone(), cache.clone()));
                let asked = ask_after(model, task, before, Vec::new(), &options, &told)?;
                samples.insert(task.name.clone(), asked.samples);
            }
            read = Some(point);
        }
        for task in &self.tasks {
            let asked = ask(model, task, Vec::new(), &options, &told)?;
            samples.insert(task.name.clone(), asked.samples);
        }
        let mut points = Vec::new();
        if !self.contexts.is_empty() {
            let bench = ModelBench::new(model, 1, rows)?;
            let timed = self.contexts.iter().map(|&at| bench.time(at, self.decode_steps));
            points = timed.collect::<Result<_>>()?;
        }
        Ok(Measured { samples, points, document: read })
    }
}

impl Measured {
    /// The answers to a task; none if it was not asked.
    pub fn samples(&self, task: &str) -> &[Sample] {
        self.samples.get(task).map_or(&[], Vec::as_slice)
    }

    /// Losses of a task's windows; `None` if it was not asked.
    pub fn nll(&self, task: &str) -> Option<Nll> {
        let samples = self.samples(task);
        (!samples.is_empty()).then(|| Nll::of(samples))
    }

    /// How many of a task's questions were answered right, and of how many; `None` if it was not asked.
    pub fn right(&self, task: &str) -> Option<(usize, usize)> {
        let samples = self.samples(task);
        let right = samples.iter().filter(|sample| sample.scores.get(&Metric::Score) == Some(&1.0));
        (!samples.is_empty()).then(|| (right.count(), samples.len()))
    }

    /// The mean of a metric over a task; of windows nats a token. `None` if it was not asked.
    pub fn mean(&self, task: &str, metric: Metric) -> Option<f64> {
        let samples = self.samples(task);
        (!samples.is_empty()).then(|| mean(samples, metric))
    }
}

/// A model's perplexity on a task's windows over another's, with its 95 % interval: blocks of 256 tokens are resampled in
/// pairs. `None` if one of the two was not asked.
///
/// # Errors
/// If they were asked different windows.
pub fn perplexity_ratio(
    task: &str,
    model: &Measured,
    other: &Measured,
    seed: u64,
) -> Result<Option<Interval>> {
    let (a, b) = (model.samples(task), other.samples(task));
    if a.is_empty() || b.is_empty() {
        return Ok(None);
    }
    let bootstrap = PairedBootstrap { seed, ..PairedBootstrap::default() };
    let Interval { mean, low, high } = difference(a, b, Metric::Perplexity, &bootstrap)?;
    Ok(Some(Interval { mean: mean.exp(), low: low.exp(), high: high.exp() }))
}
