//! Generation: sampling, streaming, stopping.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::read::OnRead;
use crate::sampler::{Constraint, Sampler};

/// How to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus of this share; 1 is off.
    pub top_p: f64,
    /// The best so many; 0 is off.
    pub top_k: usize,
    /// Only tokens that have at least this share of the likeliest one's probability; 0 is off.
    pub min_p: f64,
    /// Divides positive logits of tokens that were generated already, multiplies negative ones; 1 is off. The prompt does not
    /// count: an answer may quote it.
    pub repetition_penalty: f64,
    /// Is subtracted from the logits of tokens that were generated already; 0 is off.
    pub presence_penalty: f64,
    /// Is subtracted from a token's logit once for each time it was generated; 0 is off.
    pub frequency_penalty: f64,
    /// Is added to the logits of these tokens, after the penalties.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the sampling.
    pub seed: u64,
    /// Texts that end the generation; they are not part of the output.
    pub stop: Vec<String>,
    /// Looked at while the prompt is read; the text that follows is `on_text`'s to end.
    pub cancel: Cancel,
    /// Told how much of the prompt has been read.
    pub on_read: OnRead,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            stop: Vec::new(),
            cancel: Cancel::default(),
            on_read: OnRead::default(),
        }
    }
}

impl GenerateOptions {
    /// Checks the sampling's ranges.
    ///
    /// # Errors
    /// The first value that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let given = self.temperature;
            return Err(ModelError::Invalid(format!(
                "temperature {given} is not a number from 0 up"
            )));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let given = self.top_p;
            return Err(ModelError::Invalid(format!("top-p {given} is not above 0 and at most 1")));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            let given = self.min_p;
            return Err(ModelError::Invalid(format!("min-p {given} is not from 0 to 1")));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            let given = self.repetition_penalty;
            return Err(ModelError::Invalid(format!(
                "repetition penalty {given} is not a number above 0"
            )));
        }
        if let Some((id, bias)) = self.logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
            return Err(ModelError::Invalid(format!(
                "the logit bias {bias} of token {id} is not a number"
            )));
        }
        let others = [("presence", self.presence_penalty), ("frequency", self.frequency_penalty)];
        match others.into_iter().find(|(_, penalty)| !penalty.is_finite()) {
            Some((name, given)) => {
                Err(ModelError::Invalid(format!("{name} penalty {given} is not a number")))
            }
            None => Ok(()),
        }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence id.
    EndOfSequence,
    /// A stop string.
    StopString,
    /// `max_new_tokens`.
    Length,
    /// The caller's callback said so.
    Interrupted,
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The new ids, without the end-of-sequence id.
    pub ids: Vec<u32>,
    /// How many of them, and of the end-of-sequence id, the cache has been fed.
    pub fed: usize,
    /// Their text, up to a stop string.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Said where the sequence left the positions that the base was trained for.
    pub warning: Option<String>,
    /// Seconds until the first token's logits.
    pub prefill_seconds: f64,
    /// Seconds after that.
    pub decode_seconds: f64,
}

/// Continues a sequence. `ids` are fed first (the cache may hold earlier ones); `on_text` gets the text as it grows
/// and is not called again once it has returned `Break`.
///
/// # Errors
/// An empty prompt, an id outside the vocabulary, sampling options out of range; [`ModelError::Cancelled`] while the prompt is read.
pub fn generate(
    model: &Model,
    ids: &[u32],
    cache: &mut Cache,
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation> {
    generate_within(model, ids, cache, options, None, on_text)
}

/// [`generate`] within a constraint: a grammar, a JSON schema.
///
/// # Errors
/// As there; a constraint that fails or allows no token.
pub fn generate_within(
    model: &Model,
    ids: &[u32],
    cache: &mut Cache,
    options: &GenerateOptions,
    constraint: Option<Box<dyn Constraint>>,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation> {
    options.validate()?;
    let start = Instant::now();
    let hidden = model.prefill_until(ids, cache, &options.cancel, &options.on_read)?;
    let first = model.logits(&hidden)?.flatten_all()?.to_vec1::<f32>()?;
    let mut logits = first.as_slice();
    let prefill_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();

    let mut sampler = Sampler::new(options).with_constraint(constraint);
    let mut stream = model.tokenizer.stream();
    let mut output = StopBuffer::new(&options.stop);
    // Text of special tokens is never shown: such a stop string is met as an id.
    let stop_ids: Vec<u32> =
        options.stop.iter().flat_map(|stop| model.tokenizer.ids_of_text(stop)).collect();
    let (mut new, mut fed) = (Vec::new(), 0);
    let mut finish = Finish::Length;
    // Interrupted, or what comes after the text is not wanted.
    let (mut interrupted, mut stopped) = (false, false);
    let mut emit = |text: &str, interrupted: &mut bool| {
        *interrupted = *interrupted || on_text(text).is_break();
    };
    while new.len() < options.max_new_tokens {
        if logits.iter().any(|x| x.is_nan()) {
            return Err(ModelError::Invalid(
                "the model's logits are not numbers: its weights are damaged".into(),
            ));
        }
        let id = sampler.sample(logits)?;
        if model.config().eos_token_ids.contains(&id) {
            finish = Finish::EndOfSequence;
            break;
        }
        new.push(id);
        if stop_ids.contains(&id) {
            finish = Finish::StopString;
            break;
        }
        if let Some(text) = stream.push(id)?
            && output.push(&text, &mut |text| emit(text, &mut interrupted))
        {
            finish = Finish::StopString;
            stopped = true;
            break;
        }
        if interrupted {
            finish = Finish::Interrupted;
            break;
        }
        if new.len() < options.max_new_tokens {
            logits = model.decode(&[id], cache)?;
            fed += 1;
        }
    }
    if !stopped && finish != Finish::Interrupted {
        let rest = stream.finish()?.unwrap_or_default();
        if output.push(&rest, &mut |text| emit(text, &mut interrupted)) {
            finish = Finish::StopString;
        } else {
            output.flush(&mut |text| emit(text, &mut interrupted));
        }
    }
    let trained = model.config().max_position_embeddings;
    let reached = cache.position(0);
    let warning = (reached > trained).then(|| {
        format!("the sequence reached {reached} tokens; the base was trained for {trained}: expect worse text")
    });
    let decode_seconds = start.elapsed().as_secs_f64();
    Ok(Generation {
        ids: new,
        fed,
        text: output.text,
        finish,
        warning,
        prefill_seconds,
        decode_seconds,
    })
}

/// Holds back text that may be the beginning of a stop string.
#[derive(Debug)]
struct StopBuffer<'a> {
    stop: &'a [String],
    /// Everything given out.
    text: String,
    /// Not given out yet.
    held: String,
}

impl<'a> StopBuffer<'a> {
    fn new(stop: &'a [String]) -> Self {
        Self { stop, text: String::new(), held: String::new() }
    }

    /// Adds text; returns whether a stop string was met (text before it is given out).
    fn push(&mut self, text: &str, emit: &mut dyn FnMut(&str)) -> bool {
        self.held.push_str(text);
        let stops = self.stop.iter().filter(|stop| !stop.is_empty());
        if let Some(at) = stops.filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            self.flush(emit);
            return true;
        }
        let keep = self.longest_beginning();
        let rest = self.held.split_off(self.held.len() - keep);
        self.flush(emit);
        self.held = rest;
        false
    }

    /// Bytes at the end of `held` that begin a stop string.
    fn longest_beginning(&self) -> usize {
        let begins = |at: &usize| {
            let tail = &self.held[*at..];
            self.stop.iter().any(|stop| stop.len() > tail.len() && stop.starts_with(tail))
        };
        let starts = self.held.char_indices().map(|(at, _)| at);
        starts.into_iter().find(begins).map_or(0, |at| self.held.len() - at)
    }

    fn flush(&mut self, emit: &mut dyn FnMut(&str)) {
        if !self.held.is_empty() {
            emit(&self.held);
            self.text.push_str(&self.held);
            self.held.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stop: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let stop: Vec<String> = stop.iter().map(|s| (*s).to_owned()).collect();
        let mut buffer = StopBuffer::new(&stop);
        let mut emitted = Vec::new();
        let mut stopped = false;
        for piece in pieces {
            stopped |= buffer.push(piece, &mut |text| emitted.push(text.to_owned()));
            if stopped {
                break;
            }
        }
        if !stopped {
            buffer.flush(&mut |text| emitted.push(text.to_owned()));
        }
        (emitted, buffer.text, stopped)
    }

    #[test]
    fn a_stop_string_across_pieces_never_leaks() {
        let (emitted, text, stopped) = run(&["END."], &["one E", "N", "D. two"]);
        assert_eq!((emitted, text.as_str(), stopped), (vec!["one ".to_owned()], "one ", true));
    }

    #[test]
    fn a_false_beginning_is_given_out_late() {
        let (emitted, text, stopped) = run(&["END."], &["one E", "NE", "X"]);
        assert_eq!(emitted, ["one ", "EN", "EX"]);
        assert_eq!((text.as_str(), stopped), ("one ENEX", false));
    }

    #[test]
    fn the_earliest_of_several_counts() {
        let (_, text, stopped) = run(&["b", "ab"], &["xxab"]);
        assert_eq!((text.as_str(), stopped), ("xx", true));
    }
}
