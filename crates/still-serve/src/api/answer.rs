//! Answers of the engine, as one body or as a stream.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use futures_util::stream::select_all;
use serde::Serialize;
use serde_json::{Value, json};
use still_model::Finish;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::app::App;
use super::error::{ApiError, Result};
use crate::{Event, Events, Request, TokenLogprobs, Usage};

/// Chunks of a stream that may wait for the client before the answer waits.
const PIECES: usize = 64;
/// A silent stream gets a comment after this time, because proxies close silent connections.
const SILENCE: Duration = Duration::from_secs(10);

/// One answer, whole.
#[derive(Debug)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens, if their probabilities were asked for.
    pub tokens: Vec<TokenLogprobs>,
    /// Those of the prompt, if asked for.
    pub prompt: Vec<Option<TokenLogprobs>>,
    /// Why it ended.
    pub finish: Finish,
    /// What the request took.
    pub usage: Usage,
}

/// Starts all requests, or none.
///
/// # Errors
/// What the engine refuses.
pub fn submit(app: &App, requests: Vec<Request>) -> Result<Vec<Events>> {
    let start = |request| app.engine().submit(request).map_err(ApiError::from);
    // An error gives up those that were started before.
    requests.into_iter().map(start).collect()
}

/// Waits for all answers.
///
/// # Errors
/// The first error; the other answers are cancelled.
pub async fn gather(all: Vec<Events>) -> Result<Vec<Answer>> {
    try_join_all(all.into_iter().map(whole)).await
}

async fn whole(mut events: Events) -> Result<Answer> {
    let (mut text, mut tokens, mut prompt) = (String::new(), Vec::new(), Vec::new());
    while let Some(event) = events.recv().await {
        match event {
            Event::Started { .. } => {}
            Event::Prompt(of_prompt) => prompt = of_prompt,
            Event::Token { text: piece, logprobs, .. } => {
                text.push_str(&piece);
                tokens.extend(logprobs);
            }
            Event::Done { finish: Finish::Interrupted, .. } => {
                return Err(ApiError::shutting_down());
            }
            Event::Done { finish, text: rest, usage } => {
                text.push_str(&rest);
                return Ok(Answer { text, tokens, prompt, finish, usage });
            }
            Event::Failed(failure) => return Err(failure.into()),
        }
    }
    Err(ApiError::internal())
}

/// How a kind of completion formats its chunks.
pub trait Pieces: Send + 'static {
    /// When an answer begins.
    fn started(&mut self, index: usize) -> Option<Value>;
    /// The prompt's tokens, where they were asked for.
    fn prompt(&mut self, index: usize, tokens: Vec<Option<TokenLogprobs>>) -> Option<Value>;
    /// A token of an answer.
    fn token(&mut self, index: usize, text: String, token: Option<TokenLogprobs>) -> Vec<Value>;
    /// The end of an answer.
    fn done(&mut self, index: usize, text: String, finish: Finish) -> Vec<Value>;
    /// The usage, in the last piece.
    fn usage(&self, usage: UsageBody, timings: Option<Timings>) -> Value;
}

/// Sends all answers as server-sent events. Each `per_prompt` consecutive answers are to one prompt. They end when the client
/// disconnects.
pub fn stream(
    all: Vec<Events>,
    per_prompt: usize,
    tells_usage: bool,
    mut pieces: impl Pieces,
) -> Response {
    let (sender, receiver) = mpsc::channel::<std::result::Result<Bytes, Infallible>>(PIECES);
    tokio::spawn(async move {
        let send = async |value: &Value| sender.send(Ok(event(value))).await.is_ok();
        let numbered = all.into_iter().enumerate();
        let mut events =
            select_all(numbered.map(|(index, events)| events.map(move |e| (index, e))));
        let mut usages: Vec<(usize, Usage)> = Vec::new();
        let mut failed = None;
        loop {
            let next = tokio::select! {
                next = events.next() => next,
                () = sender.closed() => return,
                () = tokio::time::sleep(SILENCE) => {
                    if sender.send(Ok(Bytes::from_static(b": waiting\n\n"))).await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            let Some((index, event)) = next else { break };
            let told = match event {
                Event::Started { .. } => pieces.started(index).into_iter().collect(),
                Event::Prompt(tokens) => pieces.prompt(index, tokens).into_iter().collect(),
                Event::Token { text, logprobs, .. } => pieces.token(index, text, logprobs),
                Event::Done { finish: Finish::Interrupted, .. } => {
                    failed = Some(ApiError::shutting_down());
                    break;
                }
                Event::Done { finish, text, usage } => {
                    usages.push((index, usage));
                    pieces.done(index, text, finish)
                }
                Event::Failed(failure) => {
                    failed = Some(failure.into());
                    break;
                }
            };
            for value in &told {
                if !send(value).await {
                    return;
                }
            }
        }
        // The status was sent long ago: an error is an event.
        if let Some(error) = failed {
            send(&json!(error.body())).await;
        } else if tells_usage {
            usages.sort_by_key(|(index, _)| *index);
            let usages: Vec<&Usage> = usages.iter().map(|(_, usage)| usage).collect();
            send(&pieces.usage(UsageBody::of(&usages, per_prompt), Timings::of(&usages))).await;
        }
        let _ = sender.send(Ok(Bytes::from_static(b"data: [DONE]\n\n"))).await;
    });
    let mut response = Response::new(Body::from_stream(ReceiverStream::new(receiver)));
    for (name, value) in [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    // nginx gathers what it forwards otherwise.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}

/// Why an answer ended, in OpenAI's words.
pub fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::EndOfSequence | Finish::StopString => "stop",
        Finish::Length => "length",
        Finish::Interrupted => "error",
    }
}

/// Tokens that a request took.
#[derive(Clone, Debug, Default, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct UsageBody {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptTokensDetails,
}

/// Tokens of the prompt by how they were read.
#[derive(Clone, Debug, Default, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct PromptTokensDetails {
    /// Tokens that a kept state had read.
    cached_tokens: usize,
}

impl UsageBody {
    /// Of all answers; a prompt counts once.
    pub fn of(usages: &[&Usage], per_prompt: usize) -> Self {
        let firsts = || usages.iter().step_by(per_prompt.max(1));
        let prompt_tokens = firsts().map(|usage| usage.prompt_tokens).sum();
        let cached_tokens = firsts().map(|usage| usage.cached_tokens).sum();
        let completion_tokens = usages.iter().map(|usage| usage.generated_tokens).sum();
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

/// Fields that OpenAI's interface does not have.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Timings {
    /// From the request's arrival to its first token.
    first_token_seconds: f64,
    /// From its arrival to its end.
    seconds: f64,
    /// Bytes of the attention state at the end.
    state_bytes: usize,
    /// Bytes of a dense cache of as many tokens, in bf16.
    dense_bytes: usize,
}

impl Timings {
    /// Of a single answer.
    pub fn of(usages: &[&Usage]) -> Option<Self> {
        let [usage] = usages else { return None };
        Some(Self {
            first_token_seconds: usage.first_token_seconds,
            seconds: usage.seconds,
            state_bytes: usage.state_bytes,
            dense_bytes: usage.dense_bytes,
        })
    }
}
