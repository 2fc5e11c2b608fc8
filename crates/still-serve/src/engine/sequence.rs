//! A request that has a cache.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use still_attention::RowDtype;
use still_model::{Cache, Cancel, Continuation, Finish, Model, ModelError, Sampler, any_nan};
use tokio::sync::mpsc::UnboundedSender;

use super::TokenLogprobs;
use super::metrics::Metrics;
use super::request::{Event, Failure, Request, Usage};
use super::worker::{Submission, copy};
use crate::states::{Chain, Kept, StateError};

/// The phase of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It waits for a state from the store.
    Looking,
    /// It waits for another sequence that reads their common prefix, up to this position.
    Waiting { other: u64, position: usize },
    /// Prefill.
    Reading,
    /// Decode.
    Decoding,
}

/// Rules for cutting a prompt into pieces.
#[derive(Clone, Copy, Debug)]
pub struct Cuts {
    /// Pieces end, and states are kept, at multiples of this many tokens.
    pub unit: usize,
    /// Whether tokens after the last whole unit are always a separate piece.
    pub last: bool,
}

#[derive(Debug)]
pub struct Sequence {
    pub id: u64,
    pub phase: Phase,
    /// The prompt, then what was generated and fed.
    pub tokens: Vec<u32>,
    pub prompt_tokens: usize,
    pub chain: Chain,
    pub cache: Cache,
    pub cuts: Cuts,
    /// Whether decode steps computed a part of the state.
    pub decoded: bool,
    /// Tokens that a kept state had read.
    pub cached: usize,
    /// Positions in the prompt after which the state is kept: multiples of the unit.
    pub keep_at: BTreeSet<usize>,
    pub sampler: Sampler,
    pub continuation: Continuation,
    pub max_new_tokens: usize,
    /// The chosen token that was not fed yet.
    pub next: u32,
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
    /// Log-probabilities of the prompt's tokens.
    pub of_prompt: Vec<Option<TokenLogprobs>>,
    pub continues: Option<String>,
    pub save_as: Option<String>,
    pub events: UnboundedSender<Event>,
    pub cancel: Cancel,
    pub arrived: Instant,
    pub first_token: Option<Duration>,
    pub last_token: Instant,
}

impl Sequence {
    pub fn new(
        id: u64,
        submission: Submission,
        model: &Model,
        (cache, cuts): (Cache, Cuts),
        mut chain: Chain,
    ) -> Self {
        let Submission { request, events, cancel, arrived } = submission;
        let Request {
            prompt,
            sampler,
            max_new_tokens,
            stop,
            shown,
            ignore_end_of_sequence,
            logprobs,
            prompt_logprobs,
            continues,
            save_as,
        } = request;
        let mut continuation = Continuation::new(model, max_new_tokens, &stop).showing(shown);
        if ignore_end_of_sequence {
            continuation = continuation.past_end_of_sequence();
        }
        chain.extend(&prompt);
        Self {
            id,
            phase: Phase::Looking,
            prompt_tokens: prompt.len(),
            tokens: prompt,
            chain,
            cache,
            cuts,
            decoded: false,
            cached: 0,
            keep_at: BTreeSet::new(),
            sampler,
            continuation,
            max_new_tokens,
            next: 0,
            logprobs,
            prompt_logprobs,
            of_prompt: Vec::new(),
            continues,
            save_as,
            events,
            cancel,
            arrived,
            first_token: None,
            last_token: arrived,
        }
    }

    /// Tokens that its cache has read.
    pub fn position(&self) -> usize {
        self.cache.position(0)
    }

    /// Tokens of the prompt that remain to be read.
    pub fn unread(&self) -> usize {
        self.prompt_tokens.saturating_sub(self.position())
    }

    /// The last position in the prompt where it may be cut and that leaves at least one token.
    pub fn last_cut(&self) -> usize {
        self.cut_before(self.prompt_tokens.saturating_sub(1))
    }

    /// The last position up to `position` where its prompt may be cut.
    pub fn cut_before(&self, position: usize) -> usize {
        position / self.cuts.unit * self.cuts.unit
    }

    /// Whether a kept state may be continued.
    pub fn takes_states(&self) -> bool {
        self.prompt_logprobs.is_none() && self.continues.is_none()
    }

    /// Whether its client has disconnected.
    pub fn is_given_up(&self) -> bool {
        self.events.is_closed() || self.cancel.is_raised()
    }

    /// Continues a kept state of a prefix of its tokens. Returns the earlier cache.
    ///
    /// # Errors
    /// No memory for a copy of the state. The sequence is unchanged then.
    pub fn restore(&mut self, kept: &Kept, decoded: bool) -> Result<Cache, ModelError> {
        let before = std::mem::replace(&mut self.cache, copy(&kept.cache)?);
        (self.decoded, self.cached) = (decoded, kept.tokens.len());
        Ok(before)
    }

    /// Whether it continued a kept state without a name, which other sequences may continue too.
    pub fn has_kept_state(&self) -> bool {
        self.continues.is_none() && self.cached > 0
    }

    /// Replaces the kept state by an empty cache.
    pub fn start_again(&mut self, empty: Cache) {
        self.cache = empty;
        (self.decoded, self.cached) = (false, 0);
        self.phase = Phase::Reading;
    }

    /// Continues a named state: puts its tokens before the prompt.
    pub fn continue_from(&mut self, tokens: &[u32], cache: Cache) {
        self.tokens.splice(0..0, tokens.iter().copied());
        self.prompt_tokens = self.tokens.len();
        self.cache = cache;
        // Nobody knows how it was computed.
        (self.decoded, self.cached) = (true, tokens.len());
    }

    /// Chooses the next token from the logits and reports it to the client. If the sequence has ended: the reason and the rest of
    /// the text.
    ///
    /// # Errors
    /// NaN logits; an error of the tokenizer.
    pub fn choose(
        &mut self,
        logits: &[f32],
        metrics: &Metrics,
    ) -> Result<Option<(Finish, String)>, Failure> {
        if any_nan(logits) {
            return Err(self.no_numbers());
        }
        let id = self.sampler.sample(logits)?;
        let pushed = self.continuation.push(id)?;
        let now = Instant::now();
        if self.first_token.is_none() {
            let waited = now - self.arrived;
            self.first_token = Some(waited);
            metrics.first_token.observe(waited.as_secs_f64());
        } else {
            metrics.between_tokens.observe((now - self.last_token).as_secs_f64());
        }
        self.last_token = now;
        if let Some(finish) = pushed.finish
            && self.continuation.ends_at(id)
        {
            return Ok(Some((finish, pushed.text)));
        }
        metrics.generated_tokens.inc();
        self.next = id;
        let logprobs = self.logprobs.map(|most| TokenLogprobs::new(logits, id, most));
        // A client that has gone is noticed before the next step.
        let _ = self.events.send(Event::Token { id, text: pushed.text, logprobs });
        Ok(pushed.finish.map(|finish| (finish, String::new())))
    }

    /// The error of NaN logits: the continued state is damaged, or else the model.
    fn no_numbers(&self) -> Failure {
        match &self.continues {
            Some(name) => StateError::NoNumbers(name.clone()).into(),
            None if self.cached > 0 => StateError::KeptNoNumbers(self.cached).into(),
            None => Failure::Model(ModelError::Invalid(
                "the model's logits are not numbers: its weights are damaged".into(),
            )),
        }
    }

    pub fn usage(&self, model: &Model) -> Usage {
        let dense = model.config().dense_cache_bytes(self.position(), RowDtype::Bf16);
        Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached,
            generated_tokens: self.continuation.ids().len(),
            state_bytes: self.cache.used_bytes(),
            dense_bytes: usize::try_from(dense).unwrap_or(usize::MAX),
            first_token_seconds: self.first_token.unwrap_or_default().as_secs_f64(),
            seconds: self.arrived.elapsed().as_secs_f64(),
        }
    }
}
