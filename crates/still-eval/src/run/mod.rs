//! Asks a model a task's questions: log-likelihoods on lanes of threads, written answers one after another, or many together
//! on a device.
//!
//! | file | content |
//! |---|---|
//! | `encode` | questions as runs of tokens whose ends are scored |
//! | `shared` | log-likelihoods; what sequences share at their beginnings is read once |
//! | `written` | written answers |
//! | `compressed` | answers of a dense model whose cache is compressed |
//! | `sample` | one item's answer, as the log keeps it |
//! | `log` | the log of samples |
//! | `scores` | what samples come to: means, intervals, differences |

mod compressed;
mod encode;
mod log;
mod sample;
mod scores;
mod shared;
mod written;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rayon::prelude::*;
use still_attention::RowDtype;
use still_model::{Batching, Cache, Model, lanes};

use self::encode::{Encoder, Sequence, window};
use self::sample::Cost;
use self::shared::{ItemRead, Reader};
use self::written::Writer;
use crate::compress::Compression;
use crate::error::{EvalError, Result};
use crate::nll::Guess;
use crate::task::{Generative, Item, Question, Task};

pub use self::log::{LoggedModel, SampleLog};
pub use self::sample::{Answer, Sample, hash_request};
pub use self::scores::{CurvePoint, Estimate, TaskScores, difference, mean};

/// Options of [`ask`]. They change answers by rounding at most.
#[derive(Clone, Copy, Debug)]
pub struct AskOptions {
    /// Dtype of exact rows in the attention cache.
    pub rows: RowDtype,
    /// Items of a batch on each lane: for log-likelihoods and, on a GPU, for written answers.
    pub batch_size: usize,
    /// Compression of a dense model's cache, if any.
    pub compression: Option<Compression>,
}

impl Default for AskOptions {
    fn default() -> Self {
        Self { rows: RowDtype::F32, batch_size: 16, compression: None }
    }
}

/// Receives answers, and may stop the asking. Several threads call it.
pub trait Listener: Sync {
    /// Receives an answer. Answers come in the items' order.
    ///
    /// # Errors
    /// An error ends the asking.
    fn answered(&self, task: &Task, sample: &Sample) -> Result<()>;

    /// Whether to stop after the answers in progress.
    fn stop(&self) -> bool {
        false
    }
}

impl<F: Fn(&Task, &Sample) -> Result<()> + Sync> Listener for F {
    fn answered(&self, task: &Task, sample: &Sample) -> Result<()> {
        self(task, sample)
    }
}

/// A listener that ignores everything.
///
/// # Errors
/// Never.
pub fn silent(_: &Task, _: &Sample) -> Result<()> {
    Ok(())
}

/// The answers to a task's questions.
#[derive(Clone, Debug)]
pub struct Asked {
    /// In the items' order, up to where the listener stopped.
    pub samples: Vec<Sample>,
    /// Whether every item has a sample.
    pub complete: bool,
    /// Tokens read for the new answers, without those that the model wrote. A prefix that several questions share counts once.
    pub tokens: usize,
    /// Seconds for the new answers.
    pub seconds: f64,
}

/// Asks every question of a task that has no answer in `known`.
///
/// # Errors
/// An item that the model cannot be asked, a likelihood that is not finite, an error of the model or the listener.
pub fn ask(
    model: &Model,
    task: &Task,
    known: Vec<Sample>,
    options: &AskOptions,
    listener: &dyn Listener,
) -> Result<Asked> {
    ask_after(model, task, None, known, options, listener)
}

/// [`ask`] with a prefix that was read before: its token ids, and a cache of `options.rows` with just these tokens. Prompts with
/// this prefix continue the cache. Other prompts are read whole. So are all prompts with a compressed cache, or on a device that
/// writes many answers together.
///
/// # Errors
/// As [`ask`].
pub fn ask_after(
    model: &Model,
    task: &Task,
    read: Option<(Vec<u32>, Cache)>,
    known: Vec<Sample>,
    options: &AskOptions,
    listener: &dyn Listener,
) -> Result<Asked> {
    if options.batch_size == 0 {
        return Err(EvalError::Argument("a batch has at least one item".into()));
    }
    if let Some(compression) = options.compression {
        return compressed::ask(model, task, known, options, compression, listener);
    }
    let started = Instant::now();
    let mut answered: HashMap<String, Sample> =
        known.into_iter().map(|sample| (sample.id.clone(), sample)).collect();
    let open = || task.items.iter().filter(|item| !answered.contains_key(&item.id));
    let written: Vec<(&Item, &dyn Generative)> =
        open().filter_map(|item| Some((item, generative(item)?))).collect();
    let likely: Vec<&Item> = open().filter(|item| generative(item).is_none()).collect();
    let asking = Asking {
        model,
        task,
        rows: options.rows,
        empty: model.new_cache(1, options.rows)?,
        batching: model.batching()?,
        listener,
    };
    let (new, mut tokens) = asking.likelihoods(&likely, options.batch_size)?;
    answered.extend(new.into_iter().map(|sample| (sample.id.clone(), sample)));
    let mut writer = Writer::new(model, &asking.empty, read);
    let lengths =
        written.iter().map(|(_, question)| question.prompt_ids().len() + question.max_new_tokens());
    let longest = lengths.max().unwrap_or(0);
    let together = match asking.batching.padded {
        true => Writer::together(model, options.batch_size, longest),
        false => 1,
    };
    for (n, group) in written.chunks(together).enumerate() {
        if listener.stop() {
            break;
        }
        let questions: Vec<&dyn Generative> = group.iter().map(|&(_, question)| question).collect();
        let answers = match questions[..] {
            [question] => {
                let next = written.get(n * together + 1).map(|(_, question)| question.prompt_ids());
                vec![writer.write(question, next)?]
            }
            _ => writer.write_together(&questions, options.rows)?,
        };
        for (&(item, _), (answer, cost)) in group.iter().zip(answers) {
            let sample = Sample::new(item, &task.metrics, answer, cost);
            listener.answered(task, &sample)?;
            answered.insert(sample.id.clone(), sample);
        }
    }
    tokens += writer.tokens;
    let samples: Vec<Sample> =
        task.items.iter().filter_map(|item| answered.remove(&item.id)).collect();
    let complete = samples.len() == task.items.len();
    Ok(Asked { samples, complete, tokens, seconds: started.elapsed().as_secs_f64() })
}

/// One call of [`ask`].
struct Asking<'a> {
    model: &'a Model,
    task: &'a Task,
    rows: RowDtype,
    empty: Cache,
    batching: Batching,
    listener: &'a dyn Listener,
}

/// Items that are read together.
struct Batch<'a> {
    items: Vec<&'a Item>,
    /// Tokens of what their group begins with.
    shared: Option<Arc<Vec<u32>>>,
}

impl Asking<'_> {
    /// Answers with likelihoods, and how many tokens were read.
    fn likelihoods(&self, items: &[&Item], batch_size: usize) -> Result<(Vec<Sample>, usize)> {
        let batches = self.batches(items, batch_size)?;
        if batches.is_empty() {
            return Ok((Vec::new(), 0));
        }
        let pools = lanes(batches.len().min(self.lanes()))?;
        let (next, failed, tokens) =
            (AtomicUsize::new(0), AtomicBool::new(false), AtomicUsize::new(0));
        let order = Mutex::new(InOrder::default());
        let lane = || -> Result<()> {
            let mut reader = Reader::new(self.model, self.rows, &self.empty, self.batching);
            while !self.listener.stop() && !failed.load(Ordering::Relaxed) {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let Some(batch) = batches.get(n) else { break };
                let samples = self.likelihoods_of(batch, &mut reader)?;
                let mut order = order.lock().unwrap_or_else(PoisonError::into_inner);
                order
                    .insert(n, samples, &mut |sample| self.listener.answered(self.task, sample))?;
            }
            tokens.fetch_add(reader.tokens, Ordering::Relaxed);
            Ok(())
        };
        let lane = &lane;
        let failed = &failed;
        let ended: Result<()> = std::thread::scope(|scope| {
            let lanes: Vec<_> = pools
                .iter()
                .map(|pool| {
                    scope.spawn(move || {
                        let unfinished = RaiseOnDrop(failed);
                        let ended = pool.install(lane);
                        if ended.is_ok() {
                            std::mem::forget(unfinished);
                        }
                        ended
                    })
                })
                .collect();
            // Every lane is waited for, whatever the first one says.
            let ended: Vec<Result<()>> = lanes
                .into_iter()
                .map(|lane| lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect();
            ended.into_iter().collect()
        });
        ended?;
        let order = order.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok((order.told, tokens.into_inner()))
    }

    fn likelihoods_of(&self, batch: &Batch<'_>, reader: &mut Reader<'_>) -> Result<Vec<Sample>> {
        // Where one lane asks everything, the other threads have nothing else to do.
        let sequences: Vec<Vec<Sequence>> =
            batch.items.par_iter().map(|item| encode(self.model, item)).collect::<Result<_>>()?;
        let shared = batch.shared.as_ref().map(|shared| shared.as_slice());
        let read = reader.read(&sequences, shared)?;
        let samples =
            batch.items.iter().zip(&sequences).zip(read).map(|((item, sequences), read)| {
                let ItemRead { guesses, cache_bytes } = read;
                if guesses.iter().flatten().any(|guess| !guess.nll.is_finite()) {
                    let (task, item) = (self.task.name.clone(), item.id.clone());
                    return Err(EvalError::ItemNotFinite { task, item });
                }
                let longest = sequences.iter().map(|sequence| sequence.ids.len()).max();
                let truncated = sequences.iter().any(|sequence| sequence.truncated);
                let answer = answer(&item.question, &guesses);
                let (tokens, cache_bytes) = (longest.unwrap_or(0), Some(cache_bytes));
                let cost = Cost { tokens, cache_bytes, truncated };
                Ok(Sample::new(item, &self.task.metrics, answer, cost))
            });
        samples.collect()
    }

    /// Threads that ask side by side.
    fn lanes(&self) -> usize {
        if self.batching.side_by_side { rayon::current_num_threads() } else { 1 }
    }

    /// Consecutive items of one group, at most `size`, and fewer if lanes would have nothing to do.
    fn batches<'b>(&self, items: &[&'b Item], size: usize) -> Result<Vec<Batch<'b>>> {
        let size = size.min(items.len().div_ceil(2 * self.lanes())).max(1);
        let mut batches = Vec::new();
        for group in items.chunk_by(|a, b| a.group == b.group) {
            let shared = match group[0].group {
                Some(_) => Some(Arc::new(self.shared_beginning(group)?)),
                None => None,
            };
            batches.extend(group.chunks(size).map(|items| {
                let (items, shared) = (items.to_vec(), shared.clone());
                Batch { items, shared }
            }));
        }
        Ok(batches)
    }

    /// Tokens of the text that all contexts of a group begin with.
    fn shared_beginning(&self, group: &[&Item]) -> Result<Vec<u32>> {
        let mut contexts = group.iter().flat_map(|item| match &item.question {
            Question::Choice(choice) => choice.requests.as_slice(),
            Question::Continuation(request) => std::slice::from_ref(request),
            _ => &[],
        });
        let Some(first) = contexts.next() else { return Ok(Vec::new()) };
        let mut length = first.context.len();
        for request in contexts {
            length = shared::equal(&first.context.as_bytes()[..length], request.context.as_bytes());
        }
        while !first.context.is_char_boundary(length) {
            length -= 1;
        }
        Ok(self.model.tokenizer.encode(&first.context[..length], true)?)
    }
}

/// The runs of tokens whose ends are scored for an item.
fn encode(model: &Model, item: &Item) -> Result<Vec<Sequence>> {
    let mut encoder = Encoder::new(model);
    match &item.question {
        Question::Choice(choice) => {
            choice.requests.iter().map(|request| encoder.request(request)).collect()
        }
        Question::Continuation(request) => Ok(vec![encoder.request(request)?]),
        Question::Window(of) => Ok(vec![window(of)?]),
        Question::Generation(_) => Ok(Vec::new()),
    }
}

/// The question of an item that is answered in writing.
fn generative(item: &Item) -> Option<&dyn Generative> {
    match &item.question {
        Question::Generation(question) => Some(question.as_ref()),
        _ => None,
    }
}

/// The answer to a question from the likelihoods of its sequences.
fn answer(question: &Question, guesses: &[Vec<Guess>]) -> Answer {
    // Six decimals are what the log keeps, and less than float32 knows.
    let loglikelihood = |guesses: &Vec<Guess>| {
        let sum: f64 = guesses.iter().map(|guess| f64::from(guess.nll)).sum();
        (-sum * 1e6).round() / 1e6
    };
    let greedy = |guesses: &Vec<Guess>| guesses.iter().all(|guess| guess.greedy);
    match question {
        Question::Choice(choice) => Answer::Choice {
            gold: choice.gold,
            loglikelihoods: guesses.iter().map(loglikelihood).collect(),
            greedy: guesses.iter().map(greedy).collect(),
        },
        Question::Window(window) => Answer::Window {
            nll: guesses[0].iter().map(|guess| guess.nll).collect(),
            scored_from: window.scored_from,
            bytes: window.bytes,
        },
        Question::Continuation(_) | Question::Generation(_) => Answer::Continuation {
            loglikelihood: guesses.first().map_or(0.0, loglikelihood),
            greedy: guesses.first().is_some_and(greedy),
        },
    }
}

/// Reports the samples of batches, which finish in any order, in the batches' order.
#[derive(Default)]
struct InOrder {
    next: usize,
    waiting: BTreeMap<usize, Vec<Sample>>,
    told: Vec<Sample>,
}

impl InOrder {
    fn insert(
        &mut self,
        n: usize,
        samples: Vec<Sample>,
        tell: &mut dyn FnMut(&Sample) -> Result<()>,
    ) -> Result<()> {
        self.waiting.insert(n, samples);
        while let Some(samples) = self.waiting.remove(&self.next) {
            self.next += 1;
            for sample in samples {
                tell(&sample)?;
                self.told.push(sample);
            }
        }
        Ok(())
    }
}

/// Tells the other lanes that one returned early or panicked.
struct RaiseOnDrop<'a>(&'a AtomicBool);

impl Drop for RaiseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
