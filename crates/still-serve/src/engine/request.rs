//! Requests of clients, and the events that answer them.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use still_model::{Cancel, Finish, GenerateOptions, ModelError, Sampler};
use tokio::sync::mpsc::UnboundedReceiver;

use super::logprobs::TokenLogprobs;
use crate::states::StateError;

/// A prompt, and how to continue it.
#[derive(Debug)]
pub struct Request {
    /// Token ids. They may be empty only if `continues` names a state.
    pub prompt: Vec<u32>,
    /// Chooses tokens.
    pub sampler: Sampler,
    /// The most tokens to generate. With 0 the prompt is read and nothing else.
    pub max_new_tokens: usize,
    /// Texts that end the generation. They are not part of the output.
    pub stop: Vec<String>,
    /// Special tokens whose text is part of the output. The text of other special tokens is left out.
    pub shown: Vec<u32>,
    /// Whether to go on after an end-of-sequence id.
    pub ignore_end_of_sequence: bool,
    /// Report the log-probability of each chosen token, and of this many of the likeliest tokens in its place.
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens. The engine then reads the whole prompt, kept states or not.
    pub prompt_logprobs: Option<usize>,
    /// Name of a kept state that the prompt continues: the tokens of the state come first.
    pub continues: Option<String>,
    /// Name under which to keep the state after the last token.
    pub save_as: Option<String>,
}

impl Request {
    /// A request for `prompt`, sampled and ended as `options` say.
    pub fn new(prompt: Vec<u32>, options: &GenerateOptions) -> Self {
        Self {
            prompt,
            sampler: Sampler::new(options),
            max_new_tokens: options.max_new_tokens,
            stop: options.stop.clone(),
            shown: Vec::new(),
            ignore_end_of_sequence: false,
            logprobs: None,
            prompt_logprobs: None,
            continues: None,
            save_as: None,
        }
    }
}

/// An event of a request, in the order of their arrival.
#[derive(Debug)]
pub enum Event {
    /// The request has got a cache.
    Started {
        /// Tokens of the prompt that a kept state has already read.
        cached_tokens: usize,
    },
    /// Log-probabilities of all prompt tokens but the first, if [`Request::prompt_logprobs`] asked for them.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// A token was chosen.
    Token {
        /// Its id.
        id: u32,
        /// Text that is now certain. It is empty while a character is incomplete, or while the text may be the start of a stop
        /// text.
        text: String,
        /// Its log-probability, if [`Request::logprobs`] asked for it.
        logprobs: Option<TokenLogprobs>,
    },
    /// The request was served. This is its last event.
    Done {
        /// Why the generation ended.
        finish: Finish,
        /// The rest of the text, which was held back.
        text: String,
        /// What the request took.
        usage: Usage,
    },
    /// The request failed. This is its last event.
    Failed(Failure),
}

/// What a request took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt, and of the named state that it continues.
    pub prompt_tokens: usize,
    /// How many of them a kept state had read.
    pub cached_tokens: usize,
    /// Generated tokens, without an end-of-sequence id.
    pub generated_tokens: usize,
    /// Bytes of the attention state at the end.
    pub state_bytes: usize,
    /// Bytes of a dense cache in bf16 with as many tokens.
    pub dense_bytes: usize,
    /// From the request's arrival to its first token.
    pub first_token_seconds: f64,
    /// From its arrival to its end.
    pub seconds: f64,
}

/// The events of a request, up to [`Event::Done`] or [`Event::Failed`]. Drop it to cancel the request.
#[derive(Debug)]
pub struct Events {
    pub(super) receiver: UnboundedReceiver<Event>,
    pub(super) cancel: Cancel,
}

impl Events {
    /// The next event.
    pub async fn recv(&mut self) -> Option<Event> {
        self.receiver.recv().await
    }

    /// The next event, for callers outside async code.
    ///
    /// # Panics
    /// In async code.
    pub fn blocking_recv(&mut self) -> Option<Event> {
        self.receiver.blocking_recv()
    }
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.receiver.poll_recv(context)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.cancel.raise();
    }
}

/// Why the engine refused a request.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many requests wait.
    #[error("too many requests wait for their turn")]
    Busy {
        /// Time after which to try again.
        retry_after: Duration,
    },
    /// The engine is shutting down.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The request contradicts the model.
    #[error("{0}")]
    Invalid(String),
}

/// Why a request failed after the engine had accepted it.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The computation panicked: a bug.
    #[error("the computation failed: {0}")]
    Panicked(String),
    /// It waited or ran too long.
    #[error("the request took longer than {} seconds", .0.as_secs_f64())]
    TimedOut(Duration),
    /// The state that it names cannot be read or kept.
    #[error(transparent)]
    State(#[from] StateError),
    /// The prompt and the state that it continues are longer than the context.
    #[error("{0}")]
    TooLong(String),
}

impl Failure {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Model(error) => error.hint(),
            Self::State(error) => error.hint(),
            Self::TimedOut(_) => {
                Some("ask for fewer tokens, or try again when fewer others do".into())
            }
            Self::Panicked(_) | Self::TooLong(_) => None,
        }
    }
}
