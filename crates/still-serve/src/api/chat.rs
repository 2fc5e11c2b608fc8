//! `/v1/chat/completions`: conversations in the model's own template.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use still_model::Finish;

use super::answer::{self, Pieces, Timings, UsageBody, finish_reason};
use super::app::{App, unix_seconds};
use super::body::{FromJson, JsonBody, fields};
use super::conversation::Conversation;
#[cfg(test)]
use super::error::ErrorBody;
use super::error::{ApiError, Result};
use super::log_probs::{ChatLogprobs, ChatToken};
use super::sampling::{Common, any_seed, refuse_unsupported};
use super::tool_calls::{CallReader, Part, ToolCall};
use crate::{Request, TokenLogprobs};

/// Most likeliest tokens that a request may ask for at each position.
const MOST_LOGPROBS: usize = 20;

/// A conversation to continue.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct ChatRequest {
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    conversation: Conversation,
    #[serde(flatten)]
    own: ChatFields,
}

/// Fields of chats only.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
struct ChatFields {
    /// Most tokens of the answer. Default: the rest of the context.
    max_completion_tokens: Option<usize>,
    /// Older name of `max_completion_tokens`.
    max_tokens: Option<usize>,
    /// Return the log-probability of each token of the answer.
    logprobs: Option<bool>,
    /// Return this many of the likeliest tokens at each position, up to 20.
    top_logprobs: Option<usize>,
}

impl FromJson for ChatRequest {
    fn from_json(value: &Value) -> Result<Self> {
        refuse_unsupported(value)?;
        Ok(Self { common: fields(value)?, conversation: fields(value)?, own: fields(value)? })
    }
}

/// A conversation's answers.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct ChatCompletion {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<ChatChoice>,
    usage: UsageBody,
    /// Of a single answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Timings>,
}

/// One answer.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct ChatChoice {
    index: usize,
    message: Answered,
    logprobs: Option<ChatLogprobs>,
    /// `stop`, `tool_calls` or `length`.
    finish_reason: &'static str,
}

/// The message of the model.
#[derive(Clone, Debug, Default, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Answered {
    role: &'static str,
    /// The text without tool calls; null if there is none.
    content: Option<String>,
    /// Tool calls, if the model's template has a known form of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// Answers a conversation.
#[cfg_attr(test, utoipa::path(post, path = "/v1/chat/completions", tag = "OpenAI", request_body = ChatRequest, responses(
    (status = 200, description = "The answers, or a stream of their chunks", body = ChatCompletion),
    (status = "4XX", description = "The request is invalid or refused", body = ErrorBody),
    (status = "5XX", description = "The server failed or is shutting down", body = ErrorBody),
)))]
pub async fn chat_completions(
    State(app): State<App>,
    JsonBody(request): JsonBody<ChatRequest>,
) -> Result<Response> {
    let ChatRequest { common, conversation, own } = request;
    app.check_model(common.model.as_deref())?;
    let n = common.choices(1)?;
    let logprobs = own.logprobs()?;
    let mut options = common.options(app.engine().model(), app.sampling())?;
    let reader = conversation.call_reader(&app)?;
    let calls = conversation.forced_calls(&app)?;
    let ids = conversation.render(&app).await?;
    options.max_new_tokens = own.max_new_tokens(ids.len(), app.engine().context())?;
    options.constraints = app.constraints(&common, calls).await?;
    let shown = reader.as_ref().map_or_else(Vec::new, |reader| reader.marker_ids(app.tokenizer()));
    let first_seed = options.seed;
    let mut requests = Vec::new();
    for choice in 0..n {
        options.seed = match common.seed {
            Some(_) => first_seed.wrapping_add(choice as u64),
            None => any_seed(),
        };
        let mut request = Request::new(ids.clone(), &options);
        request.shown = shown.clone();
        request.ignore_end_of_sequence = common.ignore_eos.unwrap_or(false);
        request.logprobs = logprobs;
        request.save_as.clone_from(&common.save_state);
        requests.push(request);
    }
    let events = answer::submit(&app, requests)?;
    let head = Head { id: app.new_id("chatcmpl"), created: unix_seconds(), app };
    if common.streams() {
        let tells_usage = common.tells_usage();
        let pieces = Streamed { head, tells_usage, readers: vec![reader; n], calls: vec![0; n] };
        return Ok(answer::stream(events, n, tells_usage, pieces));
    }
    let answers = answer::gather(events).await?;
    let usages: Vec<_> = answers.iter().map(|answer| &answer.usage).collect();
    let (usage, timings) = (UsageBody::of(&usages, n), Timings::of(&usages));
    let choices = answers.into_iter().enumerate().map(|(index, answer)| {
        let content = |tokens: &[TokenLogprobs]| {
            tokens.iter().map(|token| ChatToken::of(&head.app, token)).collect()
        };
        let logprobs = logprobs.map(|_| ChatLogprobs { content: content(&answer.tokens) });
        let message = Answered::new(answer.text, reader.clone());
        let finish_reason = ended(answer.finish, !message.tool_calls.is_empty());
        ChatChoice { index, logprobs, message, finish_reason }
    });
    let choices = choices.collect();
    let Head { id, created, app } = head;
    let (object, model) = ("chat.completion", app.name().to_owned());
    Ok(Json(ChatCompletion { id, object, created, model, choices, usage, timings }).into_response())
}

impl Answered {
    fn new(text: String, reader: Option<CallReader>) -> Self {
        let role = "assistant";
        let Some(reader) = reader else {
            return Self { role, content: Some(text), ..Self::default() };
        };
        let (mut content, mut tool_calls) = (String::new(), Vec::new());
        for part in reader.whole(&text) {
            match part {
                Part::Text(text) => content.push_str(&text),
                Part::Call(call) => tool_calls.push(call),
            }
        }
        let says = tool_calls.is_empty() || !content.is_empty();
        Self { role, content: says.then_some(content), tool_calls }
    }
}

/// Why an answer ended.
fn ended(finish: Finish, has_calls: bool) -> &'static str {
    match finish_reason(finish) {
        "stop" if has_calls => "tool_calls",
        reason => reason,
    }
}

impl ChatFields {
    fn logprobs(&self) -> Result<Option<usize>> {
        let wanted = self.logprobs.unwrap_or(false);
        match self.top_logprobs.unwrap_or(0) {
            most if most > MOST_LOGPROBS => {
                let what = format!("top_logprobs {most} is more than {MOST_LOGPROBS}");
                Err(ApiError::invalid("top_logprobs", what))
            }
            most if most > 0 && !wanted => {
                let what = "top_logprobs needs \"logprobs\": true";
                Err(ApiError::invalid("top_logprobs", what))
            }
            most => Ok(wanted.then_some(most)),
        }
    }

    fn max_new_tokens(&self, prompt: usize, context: usize) -> Result<usize> {
        let asked = self.max_completion_tokens.or(self.max_tokens);
        let room = context.saturating_sub(prompt);
        match asked {
            Some(asked) if asked <= room => Ok(asked),
            None if room > 0 => Ok(room),
            _ => {
                let asked = asked.unwrap_or(1);
                let what = format!(
                    "the context holds {context} tokens, but the messages have {prompt} and {asked} are to be generated"
                );
                Err(ApiError::too_long("messages", what))
            }
        }
    }
}

/// Common fields of all chunks.
#[derive(Debug)]
struct Head {
    id: String,
    created: u64,
    app: App,
}

/// An answer, piece by piece.
#[derive(Debug)]
struct Streamed {
    head: Head,
    tells_usage: bool,
    /// Finds the tool calls in each answer.
    readers: Vec<Option<CallReader>>,
    /// Calls of each answer so far.
    calls: Vec<usize>,
}

impl Streamed {
    fn piece(&self, choices: Value) -> Value {
        let Head { id, created, app } = &self.head;
        let mut piece = json!({
            "id": id, "object": "chat.completion.chunk", "created": created, "model": app.name(), "choices": choices,
        });
        if self.tells_usage {
            piece["usage"] = Value::Null;
        }
        piece
    }

    fn delta(
        &self,
        index: usize,
        delta: Value,
        logprobs: Option<ChatLogprobs>,
        finish_reason: Option<&str>,
    ) -> Value {
        self.piece(json!([{
            "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason,
        }]))
    }
}

impl Streamed {
    fn part(&mut self, index: usize, part: Part, logprobs: Option<ChatLogprobs>) -> Value {
        let delta = match part {
            Part::Text(text) => json!({ "content": text }),
            Part::Call(call) => {
                let mut call = json!(call);
                call["index"] = json!(self.calls[index]);
                self.calls[index] += 1;
                json!({ "tool_calls": [call] })
            }
        };
        self.delta(index, delta, logprobs, None)
    }
}

impl Pieces for Streamed {
    fn started(&mut self, index: usize) -> Option<Value> {
        Some(self.delta(index, json!({ "role": "assistant", "content": "" }), None, None))
    }

    fn prompt(&mut self, _: usize, _: Vec<Option<TokenLogprobs>>) -> Option<Value> {
        None
    }

    fn token(&mut self, index: usize, text: String, token: Option<TokenLogprobs>) -> Vec<Value> {
        let parts = match &mut self.readers[index] {
            Some(reader) => reader.push(&text),
            None if text.is_empty() => Vec::new(),
            None => vec![Part::Text(text)],
        };
        let mut logprobs = token
            .map(|token| ChatLogprobs { content: vec![ChatToken::of(&self.head.app, &token)] });
        let mut told: Vec<Value> =
            parts.into_iter().map(|part| self.part(index, part, logprobs.take())).collect();
        // A token whose text is held back has its probability all the same.
        if logprobs.is_some() {
            told.push(self.delta(index, json!({ "content": "" }), logprobs, None));
        }
        told
    }

    fn done(&mut self, index: usize, text: String, finish: Finish) -> Vec<Value> {
        let mut parts = Vec::new();
        match &mut self.readers[index] {
            Some(reader) => {
                parts.extend(reader.push(&text));
                parts.extend(reader.finish());
            }
            None if text.is_empty() => {}
            None => parts.push(Part::Text(text)),
        }
        let mut told: Vec<Value> =
            parts.into_iter().map(|part| self.part(index, part, None)).collect();
        let reason = ended(finish, self.calls[index] > 0);
        told.push(self.delta(index, json!({}), None, Some(reason)));
        told
    }

    fn usage(&self, usage: UsageBody, timings: Option<Timings>) -> Value {
        let mut piece = self.piece(json!([]));
        piece["usage"] = json!(usage);
        if let Some(timings) = timings {
            piece["timings"] = json!(timings);
        }
        piece
    }
}
