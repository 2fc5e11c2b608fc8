//! Answers of a dense model whose cache is compressed.
//!
//! What is compressed, and what is read with what is left of it, depends on the question:
//!
//! | question | compressed | read after it |
//! |---|---|---|
//! | written answer | the prompt up to where the question begins; by prompt-aware methods all of it but the last token | the rest, and the answer |
//! | choice, continuation | the context but its last token | that token and the continuation |
//! | window | what comes before the first scored token, or half of the window where that is more | the rest |
//!
//! Nothing is predicted from what was dropped, but for a window's first half: it has the dense model's likelihoods.

use candle_core::{DType, Tensor};
use still_model::{Model, likeliest};

use super::encode::Sequence;
use super::sample::{Answer, Cost, Sample};
use super::{AskOptions, Asked, Listener, answer, encode, generative};
use crate::compress::{CompressedCache, Compression, Compressor};
use crate::error::{EvalError, Result};
use crate::nll::{Guess, guesses_of_hidden};
use crate::task::{Generative, Item, Question, Task};

/// [`super::ask`] with a compressed cache.
pub(super) fn ask(
    model: &Model,
    task: &Task,
    known: Vec<Sample>,
    options: &AskOptions,
    compression: Compression,
    listener: &dyn Listener,
) -> Result<Asked> {
    let started = std::time::Instant::now();
    let mut answering = Answering {
        compressor: Compressor::new(model, compression, options.rows)?,
        task,
        tokens: 0,
    };
    let mut answered: std::collections::HashMap<String, Sample> =
        known.into_iter().map(|sample| (sample.id.clone(), sample)).collect();
    let open: Vec<&Item> =
        task.items.iter().filter(|item| !answered.contains_key(&item.id)).collect();
    // A step of many sequences takes little longer than that of one on a device alone.
    let together = if model.batching()?.padded { options.batch_size } else { 1 };
    for items in open.chunks(together) {
        if listener.stop() {
            break;
        }
        for sample in answering.items(items)? {
            listener.answered(task, &sample)?;
            answered.insert(sample.id.clone(), sample);
        }
    }
    let samples: Vec<Sample> =
        task.items.iter().filter_map(|item| answered.remove(&item.id)).collect();
    let complete = samples.len() == task.items.len();
    let seconds = started.elapsed().as_secs_f64();
    Ok(Asked { samples, complete, tokens: answering.tokens, seconds })
}

struct Answering<'a> {
    compressor: Compressor<'a>,
    task: &'a Task,
    /// Read so far; what a method reads once more to score rows does not count.
    tokens: usize,
}

impl Answering<'_> {
    fn items(&mut self, items: &[&Item]) -> Result<Vec<Sample>> {
        let questions: Option<Vec<&dyn Generative>> =
            items.iter().map(|item| generative(item)).collect();
        let answers = match questions {
            Some(questions) => self.written(&questions)?,
            None => items.iter().map(|item| self.likely(item)).collect::<Result<_>>()?,
        };
        let sample = |(item, (answer, cost)): (&&Item, (Answer, Cost))| {
            Sample::new(item, &self.task.metrics, answer, cost)
        };
        Ok(items.iter().zip(answers).map(sample).collect())
    }

    /// Likelihoods, or of an item that is answered in writing among others that are not, that answer.
    fn likely(&mut self, item: &Item) -> Result<(Answer, Cost)> {
        if let Some(question) = generative(item) {
            let mut answers = self.written(&[question])?;
            return Ok(answers.remove(0));
        }
        let sequences = encode(self.compressor.model(), item)?;
        let (guesses, bytes) = match &item.question {
            Question::Window(_) => self.window(&sequences[0])?,
            _ => self.continuations(&sequences)?,
        };
        if guesses.iter().flatten().any(|guess| !guess.nll.is_finite()) {
            let (task, item) = (self.task.name.clone(), item.id.clone());
            return Err(EvalError::ItemNotFinite { task, item });
        }
        let cost = Cost {
            tokens: sequences.iter().map(|sequence| sequence.ids.len()).max().unwrap_or(0),
            cache_bytes: Some(bytes),
            truncated: sequences.iter().any(|sequence| sequence.truncated),
        };
        Ok((answer(&item.question, &guesses), cost))
    }

    /// How the targets of sequences fare, and the bytes of the largest cache. A context that several share is read once.
    fn continuations(&mut self, sequences: &[Sequence]) -> Result<(Vec<Vec<Guess>>, usize)> {
        let (mut guesses, mut bytes) = (Vec::new(), 0);
        let context = |sequence: &Sequence| sequence.ids[..=sequence.first_scored()].to_vec();
        for alike in sequences.chunk_by(|a, b| context(a) == context(b)) {
            let first_scored = alike[0].first_scored();
            let ids = &alike[0].ids;
            let (cache, _) = self.read(&ids[..first_scored], ids[first_scored])?;
            let mut cache = cache.repeat(alike.len())?;
            let fed: Vec<&[u32]> =
                alike.iter().map(|sequence| &sequence.ids[sequence.first_scored()..]).collect();
            let hidden = self.feed(&mut cache, &fed)?;
            for (n, sequence) in alike.iter().enumerate() {
                let own = hidden.get(n)?.narrow(0, 0, fed[n].len())?;
                guesses.push(self.guesses(&own, &sequence.targets)?);
                bytes = bytes.max(cache.size_bytes(n));
            }
        }
        Ok((guesses, bytes))
    }

    /// How the scored tokens of a window fare, and the bytes of the cache at its end.
    fn window(&mut self, sequence: &Sequence) -> Result<(Vec<Vec<Guess>>, usize)> {
        let first = sequence.first_scored();
        let cut = first.max(sequence.ids.len() / 2);
        let (context, rest) = sequence.ids.split_at(cut);
        let (dense, compressed) = sequence.targets.split_at(cut - first);
        let (mut cache, hidden) = self.read(context, rest[0])?;
        let mut guesses = match hidden {
            Some(hidden) if !dense.is_empty() => {
                self.guesses(&hidden.narrow(0, first, dense.len())?.contiguous()?, dense)?
            }
            _ => Vec::new(),
        };
        let hidden = self.feed(&mut cache, &[rest])?.squeeze(0)?;
        guesses.extend(self.guesses(&hidden, compressed)?);
        Ok((vec![guesses], cache.size_bytes(0)))
    }

    fn guesses(&self, hidden: &Tensor, targets: &[u32]) -> Result<Vec<Guess>> {
        let targets: Vec<&[u32]> = targets.chunks(1).collect();
        Ok(guesses_of_hidden(self.compressor.model(), hidden, &targets)?.concat())
    }

    /// Greedy answers, a token of each at a time.
    fn written(&mut self, questions: &[&dyn Generative]) -> Result<Vec<(Answer, Cost)>> {
        let model = self.compressor.model();
        let (mut caches, mut rest) = (Vec::new(), Vec::new());
        for question in questions {
            let prompt = question.prompt_ids();
            let Some(most) = prompt.len().checked_sub(1) else {
                return Err(EvalError::Argument("a prompt has no tokens".into()));
            };
            let context = match self.compressor.method().sees_question() {
                true => most,
                false => question.context_tokens().min(most),
            };
            caches.push(self.read(&prompt[..context], prompt[context])?.0);
            rest.push(&prompt[context..]);
        }
        let mut cache = CompressedCache::join(&caches.iter().collect::<Vec<_>>())?;
        drop(caches);
        let hidden = self.feed(&mut cache, &rest)?;
        let last = rest.iter().enumerate().map(|(n, rest)| hidden.get(n)?.get(rest.len() - 1));
        let mut last = Tensor::stack(&last.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let mut written: Vec<Vec<u32>> = vec![Vec::new(); questions.len()];
        let mut done: Vec<bool> =
            questions.iter().map(|question| question.max_new_tokens() == 0).collect();
        let mut bytes: Vec<usize> = (0..questions.len()).map(|n| cache.size_bytes(n)).collect();
        while !done.iter().all(|&done| done) {
            let logits = model.logits(&last)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            let mut next = Vec::with_capacity(questions.len());
            for (n, logits) in logits.iter().enumerate() {
                if logits.iter().any(|logit| logit.is_nan()) {
                    let item = questions[n].targets().join(", ");
                    return Err(EvalError::ItemNotFinite { task: self.task.name.clone(), item });
                }
                let token = likeliest(logits);
                done[n] |= model.config().eos_token_ids.contains(&token);
                if !done[n] {
                    written[n].push(token);
                    bytes[n] = cache.size_bytes(n);
                    done[n] = written[n].len() == questions[n].max_new_tokens();
                }
                next.push([token]);
            }
            if done.iter().all(|&done| done) {
                break;
            }
            let next: Vec<&[u32]> = next.iter().map(<[u32; 1]>::as_slice).collect();
            last = cache.feed(model, &next)?.squeeze(1)?;
        }
        let answers = questions.iter().zip(&written).zip(bytes).map(|((question, ids), bytes)| {
            let answer = Answer::Generation {
                text: model.tokenizer.decode(ids, true)?,
                new_tokens: ids.len(),
                targets: question.targets().to_vec(),
            };
            let tokens = question.prompt_ids().len();
            Ok((answer, Cost { tokens, cache_bytes: Some(bytes), truncated: false }))
        });
        answers.collect()
    }

    fn read(&mut self, ids: &[u32], next: u32) -> Result<(CompressedCache, Option<Tensor>)> {
        self.tokens += ids.len();
        self.compressor.read(ids, next)
    }

    fn feed(&mut self, cache: &mut CompressedCache, ids: &[&[u32]]) -> Result<Tensor> {
        self.tokens += ids.iter().map(|ids| ids.len()).sum::<usize>();
        cache.feed(self.compressor.model(), ids)
    }
}
