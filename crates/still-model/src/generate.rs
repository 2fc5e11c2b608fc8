//! Generation of one sequence.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::continuation::Continuation;
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::read::OnRead;
use crate::sampler::{Constraints, Sampler, any_nan};

/// Options of a generation.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// Temperature; 0 takes the likeliest token.
    pub temperature: f64,
    /// Nucleus sampling: draw from the likeliest tokens that together have this probability; 1 is off.
    pub top_p: f64,
    /// Draw from this many of the likeliest tokens; 0 is off.
    pub top_k: usize,
    /// Draw from tokens with at least this share of the likeliest one's probability; 0 is off.
    pub min_p: f64,
    /// Divides positive logits, and multiplies negative ones, of tokens that were generated before; 1 is off. The prompt's tokens
    /// do not count, so that an answer may quote it.
    pub repetition_penalty: f64,
    /// Subtracted from the logits of tokens that were generated before; 0 is off.
    pub presence_penalty: f64,
    /// Subtracted from a token's logit for each time that it was generated before; 0 is off.
    pub frequency_penalty: f64,
    /// Added to the logits of these tokens, after the penalties.
    pub logit_bias: Vec<(u32, f32)>,
    /// What the text must follow: a grammar or a JSON schema.
    pub constraints: Constraints,
    /// Seed of the sampling.
    pub seed: u64,
    /// Texts that end the generation. They are not part of the output.
    pub stop: Vec<String>,
    /// Cancels the prefill. To end the generation after it, return `Break` from `on_text`.
    pub cancel: Cancel,
    /// Progress of the prefill.
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
            constraints: Constraints::default(),
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
    /// The caller's callback returned `Break`.
    Interrupted,
}

/// The result of a generation.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The new ids, without the end-of-sequence id.
    pub ids: Vec<u32>,
    /// How many of them, the end-of-sequence id included, the cache has read.
    pub fed: usize,
    /// Their text, up to a stop string.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// A warning, if the sequence is longer than the positions that the base was trained for.
    pub warning: Option<String>,
    /// Seconds of the prefill, until the first token's logits.
    pub prefill_seconds: f64,
    /// Seconds after that.
    pub decode_seconds: f64,
}

/// Continues a sequence. It feeds `ids` first; the cache may hold earlier tokens. `on_text` receives the text as it grows, and
/// ends the generation by returning `Break`.
///
/// # Errors
/// An empty prompt, an id outside the vocabulary, sampling options out of range; a constraint that fails or allows no token;
/// [`ModelError::Cancelled`] while the prompt is read.
pub fn generate(
    model: &Model,
    ids: &[u32],
    cache: &mut Cache,
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation> {
    options.validate()?;
    let start = Instant::now();
    let hidden = model.prefill_until(ids, cache, &options.cancel, &options.on_read)?;
    let first = model.logits(&hidden)?.flatten_all()?.to_vec1::<f32>()?;
    let mut logits = first.as_slice();
    let prefill_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();

    let mut sampler = Sampler::new(options);
    let mut continuation = Continuation::new(model, options.max_new_tokens, &options.stop);
    let (mut fed, mut finish) = (0, Finish::Length);
    while continuation.ids().len() < options.max_new_tokens {
        if any_nan(logits) {
            return Err(ModelError::Invalid(
                "the model's logits are not numbers: its weights are damaged".into(),
            ));
        }
        let id = sampler.sample(logits)?;
        let pushed = continuation.push(id)?;
        let interrupted = !pushed.text.is_empty() && on_text(&pushed.text).is_break();
        match pushed.finish {
            Some(ended) if ended != Finish::Length || !interrupted => finish = ended,
            _ if interrupted => finish = Finish::Interrupted,
            _ => {
                logits = model.decode(&[id], cache)?;
                fed += 1;
                continue;
            }
        }
        break;
    }
    let trained = model.config().max_position_embeddings;
    let reached = cache.position(0);
    let warning = (reached > trained).then(|| {
        format!("the sequence reached {reached} tokens; the base was trained for {trained}: expect worse text")
    });
    let decode_seconds = start.elapsed().as_secs_f64();
    Ok(Generation {
        fed,
        text: continuation.text().to_owned(),
        ids: continuation.into_ids(),
        finish,
        warning,
        prefill_seconds,
        decode_seconds,
    })
}
