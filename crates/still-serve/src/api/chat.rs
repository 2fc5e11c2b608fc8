//! `/v1/chat/completions`: conversations in the model's own template.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use still_model::{Finish, Sampler};
use utoipa::ToSchema;

use super::answer::{self, Pieces, Timings, UsageBody, finish_reason};
use super::app::{App, unix_seconds};
use super::body::{FromJson, JsonBody, fields};
use super::conversation::Conversation;
use super::error::{ApiError, ErrorBody, Result};
use super::log_probs::{ChatLogprobs, ChatToken};
use super::sampling::{Common, any_seed, refuse_unsupported};
use crate::{Request, TokenLogprobs};

/// The likeliest tokens that may be asked for in each place.
const MOST_LOGPROBS: usize = 20;

/// A conversation to be continued.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ChatRequest {
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    conversation: Conversation,
    #[serde(flatten)]
    own: Own,
}

/// Fields that plain texts do not have.
#[derive(Clone, Debug, Deserialize, ToSchema)]
struct Own {
    /// Most tokens of the answer; what the context has left if it is left out.
    max_completion_tokens: Option<usize>,
    /// The same, by its older name.
    max_tokens: Option<usize>,
    /// Whether the answer's log-probabilities are told.
    logprobs: Option<bool>,
    /// How many of the likeliest tokens in each place are told, up to 20.
    top_logprobs: Option<usize>,
}

impl FromJson for ChatRequest {
    fn from_json(value: &Value) -> Result<Self> {
        refuse_unsupported(value)?;
        Ok(Self { common: fields(value)?, conversation: fields(value)?, own: fields(value)? })
    }
}

/// A conversation's answers.
#[derive(Clone, Debug, Serialize, ToSchema)]
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
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    index: usize,
    message: Answered,
    logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    finish_reason: &'static str,
}

/// What the model says. Calls of tools are in its text, as its template has it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Answered {
    role: &'static str,
    content: String,
}

/// Answers a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "OpenAI", request_body = ChatRequest, responses(
    (status = 200, description = "The answers, or a stream of their pieces", body = ChatCompletion),
    (status = "4XX", description = "The request is at fault", body = ErrorBody),
    (status = "5XX", description = "The server is at fault, or ends", body = ErrorBody),
))]
pub async fn chat_completions(
    State(app): State<App>,
    JsonBody(request): JsonBody<ChatRequest>,
) -> Result<Response> {
    let ChatRequest { common, conversation, own } = request;
    app.check_model(common.model.as_deref())?;
    let n = common.choices(1)?;
    if common.save_state.is_some() && n > 1 {
        return Err(ApiError::invalid("save_state", "only a single answer can be saved"));
    }
    let logprobs = own.logprobs()?;
    let mut options = common.options(app.engine().model(), app.sampling())?;
    let ids = conversation.render(&app).await?;
    options.max_new_tokens = own.max_new_tokens(ids.len(), app.engine().context())?;
    let first_seed = options.seed;
    let mut requests = Vec::new();
    for (choice, constraint) in app.constraints(&common, n).await?.into_iter().enumerate() {
        options.seed = match common.seed {
            Some(_) => first_seed.wrapping_add(choice as u64),
            None => any_seed(),
        };
        let mut request = Request::new(ids.clone(), &options);
        request.sampler = Sampler::new(&options).with_constraint(constraint);
        request.ignore_end_of_sequence = common.ignore_eos.unwrap_or(false);
        request.logprobs = logprobs;
        request.save_as.clone_from(&common.save_state);
        requests.push(request);
    }
    let events = answer::submit(&app, requests)?;
    let head = Head { id: app.new_id("chatcmpl"), created: unix_seconds(), app };
    if common.streams() {
        let tells_usage = common.tells_usage();
        let pieces = Streamed { head, tells_usage };
        return Ok(answer::stream(events, n, tells_usage, pieces));
    }
    let answers = answer::gather(events).await?;
    let usages: Vec<_> = answers.iter().map(|answer| &answer.usage).collect();
    let (usage, timings) = (UsageBody::of(&usages, n), Timings::of(&usages));
    let choices = answers.into_iter().enumerate().map(|(index, answer)| {
        let content = |tokens: &[TokenLogprobs]| {
            tokens.iter().map(|token| ChatToken::of(&head.app, token)).collect()
        };
        ChatChoice {
            index,
            logprobs: logprobs.map(|_| ChatLogprobs { content: content(&answer.tokens) }),
            message: Answered { role: "assistant", content: answer.text },
            finish_reason: finish_reason(answer.finish),
        }
    });
    let choices = choices.collect();
    let Head { id, created, app } = head;
    let (object, model) = ("chat.completion", app.name().to_owned());
    Ok(Json(ChatCompletion { id, object, created, model, choices, usage, timings }).into_response())
}

impl Own {
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

/// What all pieces begin with.
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
        finish: Option<Finish>,
    ) -> Value {
        let finish_reason = finish.map(finish_reason);
        self.piece(json!([{
            "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason,
        }]))
    }
}

impl Pieces for Streamed {
    fn started(&mut self, index: usize) -> Option<Value> {
        Some(self.delta(index, json!({ "role": "assistant", "content": "" }), None, None))
    }

    fn prompt(&mut self, _: usize, _: Vec<Option<TokenLogprobs>>) -> Option<Value> {
        None
    }

    fn token(&mut self, index: usize, text: String, token: Option<TokenLogprobs>) -> Option<Value> {
        if text.is_empty() && token.is_none() {
            return None;
        }
        let logprobs = token
            .map(|token| ChatLogprobs { content: vec![ChatToken::of(&self.head.app, &token)] });
        Some(self.delta(index, json!({ "content": text }), logprobs, None))
    }

    fn done(&mut self, index: usize, text: String, finish: Finish) -> Vec<Value> {
        let rest =
            (!text.is_empty()).then(|| self.delta(index, json!({ "content": text }), None, None));
        let end = self.delta(index, json!({}), None, Some(finish));
        rest.into_iter().chain([end]).collect()
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
