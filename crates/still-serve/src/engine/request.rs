//! What a client asks for, and what it is told.

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
    /// Token ids; not empty, unless a state is continued.
    pub prompt: Vec<u32>,
    /// Chooses tokens.
    pub sampler: Sampler,
    /// The most tokens to generate. With 0 the prompt is read and nothing else.
    pub max_new_tokens: usize,
    /// Texts that end the generation; they are not part of the output.
    pub stop: Vec<String>,
    /// Special tokens whose text is part of the output's; that of others is left out.
    pub shown: Vec<u32>,
    /// Whether to go on after an end-of-sequence id.
    pub ignore_end_of_sequence: bool,
    /// How many of the likeliest tokens to tell of besides each chosen one; none, and no probabilities, if absent.
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens. The whole prompt is read then.
    pub prompt_logprobs: Option<usize>,
    /// The name of a state that the prompt continues: its tokens come first.
    pub continues: Option<String>,
    /// The name under which the state after the last token is kept.
    pub save_as: Option<String>,
}

impl Request {
    /// A prompt, continued as `options` say.
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

/// What a client is told, in this order.
#[derive(Debug)]
pub enum Event {
    /// The request has a cache.
    Started {
        /// Tokens of the prompt that a kept state has read already.
        cached_tokens: usize,
    },
    /// Of every token of the prompt but the first, if asked for.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// A token was chosen.
    Token {
        /// It.
        id: u32,
        /// The text that became certain: perhaps none yet, because a character is not complete, or may begin a stop text.
        text: String,
        /// If asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The last event of a request that was served.
    Done {
        /// Why it ended.
        finish: Finish,
        /// Text that was held back.
        text: String,
        /// What it took.
        usage: Usage,
    },
    /// The last event of one that was not.
    Failed(Failure),
}

/// What a request took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt, with those of a state that it continues.
    pub prompt_tokens: usize,
    /// Those of them that a kept state had read.
    pub cached_tokens: usize,
    /// Tokens that were generated, without an end-of-sequence id.
    pub generated_tokens: usize,
    /// Bytes of the state at the end.
    pub state_bytes: usize,
    /// Bytes of a dense cache of as many tokens in bf16.
    pub dense_bytes: usize,
    /// From the request's arrival to its first token.
    pub first_token_seconds: f64,
    /// From its arrival to its end.
    pub seconds: f64,
}

/// The events of a request. It ends after [`Event::Done`] or [`Event::Failed`]. Dropping it gives the request up.
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

    /// The next event, for callers outside of async code.
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

/// Why a request was not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many others wait.
    #[error("too many requests wait for their turn")]
    Busy {
        /// When it may be worth to try again.
        retry_after: Duration,
    },
    /// The engine ends.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The request contradicts the model.
    #[error("{0}")]
    Invalid(String),
}

/// Why a request that was taken was not served.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The computation panicked: an error of this program.
    #[error("the computation failed: {0}")]
    Panicked(String),
    /// It waited, or took, too long.
    #[error("the request took longer than {} seconds", .0.as_secs_f64())]
    TimedOut(Duration),
    /// A state that it names.
    #[error(transparent)]
    State(#[from] StateError),
    /// The prompt and the state that it continues are longer than the context.
    #[error("{0}")]
    TooLong(String),
}

impl Failure {
    /// What can be done about it.
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
