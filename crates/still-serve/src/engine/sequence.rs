//! One request that has a cache.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use still_attention::RowDtype;
use still_model::{Cache, Cancel, Continuation, Finish, Model, ModelError, Sampler, any_nan};
use tokio::sync::mpsc::UnboundedSender;

use super::metrics::Metrics;
use super::options::CHUNK;
use super::request::{Event, Failure, Request, Usage};
use super::{TokenLogprobs, worker::Submission};
use crate::states::{Chain, Kept};

/// What a sequence waits for, or what is done with it next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A kept state is looked for in the store, or read from there.
    Looking,
    /// Another sequence reads what the two have in common, up to this position.
    Waiting { other: u64, position: usize },
    /// Its prompt is read.
    Reading,
    /// It is continued.
    Decoding,
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
    /// Whether decode steps have computed a part of the state.
    pub decoded: bool,
    /// Tokens that a kept state had read.
    pub cached: usize,
    /// Positions in the prompt after which the state is kept: multiples of [`CHUNK`].
    pub keep_at: BTreeSet<usize>,
    pub sampler: Sampler,
    pub continuation: Continuation,
    pub max_new_tokens: usize,
    /// Chosen, and not fed yet.
    pub next: u32,
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
    /// By token of the prompt.
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
        rows: RowDtype,
        mut chain: Chain,
    ) -> Result<Self, Box<(UnboundedSender<Event>, ModelError)>> {
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
        let cache = match model.new_cache(1, rows) {
            Ok(cache) => cache,
            Err(error) => return Err(Box::new((events, error))),
        };
        let mut continuation = Continuation::new(model, max_new_tokens, &stop).showing(shown);
        if ignore_end_of_sequence {
            continuation = continuation.past_end_of_sequence();
        }
        chain.extend(&prompt);
        Ok(Self {
            id,
            phase: Phase::Looking,
            prompt_tokens: prompt.len(),
            tokens: prompt,
            chain,
            cache,
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
        })
    }

    /// Tokens that its cache has read.
    pub fn position(&self) -> usize {
        self.cache.position(0)
    }

    /// Tokens of the prompt that are to be read.
    pub fn unread(&self) -> usize {
        self.prompt_tokens.saturating_sub(self.position())
    }

    /// The last position in the prompt that is a multiple of [`CHUNK`] and leaves a token to be read.
    pub fn last_chunk(&self) -> usize {
        self.prompt_tokens.saturating_sub(1) / CHUNK * CHUNK
    }

    /// Whether a kept state may be continued.
    pub fn takes_states(&self) -> bool {
        self.prompt_logprobs.is_none() && self.continues.is_none()
    }

    /// Whether its client has gone.
    pub fn is_given_up(&self) -> bool {
        self.events.is_closed() || self.cancel.is_raised()
    }

    /// Goes on from a kept state, which has read the beginning of its tokens.
    pub fn restore(&mut self, kept: &Kept, decoded: bool) {
        self.cache = (*kept.cache).clone();
        (self.decoded, self.cached) = (decoded, kept.tokens.len());
    }

    /// Puts the tokens of a state with a name before the prompt.
    pub fn continue_from(&mut self, kept: &Kept) {
        self.tokens.splice(0..0, kept.tokens.iter().copied());
        self.prompt_tokens = self.tokens.len();
        self.cache = (*kept.cache).clone();
        // Nobody knows how it was computed.
        (self.decoded, self.cached) = (true, kept.tokens.len());
    }

    /// Chooses the next token by the logits after the last one, and tells the client. Why the sequence has ended, and the text
    /// that was held back, if it has.
    ///
    /// # Errors
    /// Logits that are not numbers; what the tokenizer refuses.
    pub fn choose(
        &mut self,
        logits: &[f32],
        metrics: &Metrics,
    ) -> Result<Option<(Finish, String)>, Failure> {
        if any_nan(logits) {
            return Err(Failure::Model(ModelError::Invalid(
                "the model's logits are not numbers: its weights are damaged".into(),
            )));
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
