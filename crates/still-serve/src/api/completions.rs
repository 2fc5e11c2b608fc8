//! `/v1/completions`: continuations of texts.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use still_model::Finish;

use super::answer::{self, Answer, Pieces, Timings, UsageBody, finish_reason};
use super::app::{App, unix_seconds};
use super::body::{FromJson, JsonBody, fields};
#[cfg(test)]
use super::error::ErrorBody;
use super::error::{ApiError, Result};
use super::log_probs::clamped;
use super::sampling::{Common, MOST_CHOICES, any_seed, refuse_unsupported};
use crate::{Request, TokenLogprobs};

/// Default of `max_tokens`, as in OpenAI's interface.
const USUAL_MAX_TOKENS: usize = 16;
/// Most likeliest tokens that a request may ask for at each position.
const MOST_LOGPROBS: usize = 20;

/// A text to continue.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct CompletionRequest {
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    own: CompletionFields,
}

/// Fields of completions only.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
struct CompletionFields {
    /// A text, a list of texts, token ids, or a list of lists of token ids.
    prompt: Option<Prompt>,
    /// Most tokens to generate. Default: 16. With 0 the server only reads the prompt.
    max_tokens: Option<usize>,
    /// Whether the answer begins with the prompt.
    echo: Option<bool>,
    /// Return the log-probability of each token, and of this many of the likeliest tokens at each position, up to 20.
    logprobs: Option<usize>,
    /// Name of a kept state that the prompt continues.
    state: Option<String>,
}

/// The text to continue.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    ManyIds(Vec<Vec<u32>>),
}

impl FromJson for CompletionRequest {
    fn from_json(value: &Value) -> Result<Self> {
        refuse_unsupported(value)?;
        Ok(Self { common: fields(value)?, own: fields(value)? })
    }
}

/// Texts with their continuations.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Completion {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<CompletionChoice>,
    usage: UsageBody,
    /// Of a single answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Timings>,
}

/// One continuation.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct CompletionChoice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`.
    finish_reason: &'static str,
}

/// Log-probabilities of a text's tokens: lists with an entry for each token.
#[derive(Clone, Debug, Default, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    #[cfg_attr(test, schema(value_type = Vec<Option<Object>>))]
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each token begins, in characters of the text.
    text_offset: Vec<usize>,
}

/// Continues texts.
#[cfg_attr(test, utoipa::path(post, path = "/v1/completions", tag = "OpenAI", request_body = CompletionRequest, responses(
    (status = 200, description = "The continuations, or a stream of their chunks", body = Completion),
    (status = "4XX", description = "The request is invalid or refused", body = ErrorBody),
    (status = "5XX", description = "The server failed or is shutting down", body = ErrorBody),
)))]
pub async fn completions(
    State(app): State<App>,
    JsonBody(request): JsonBody<CompletionRequest>,
) -> Result<Response> {
    let CompletionRequest { common, own } = request;
    app.check_model(common.model.as_deref())?;
    let prompts = own.prompts(&app)?;
    let n = common.choices(prompts.len())?;
    let echo = own.echo.unwrap_or(false);
    if let Some(logprobs) = own.logprobs.filter(|&most| most > MOST_LOGPROBS) {
        let what = format!("logprobs {logprobs} is more than {MOST_LOGPROBS}");
        return Err(ApiError::invalid("logprobs", what));
    }
    let max_new_tokens = own.max_tokens.unwrap_or(USUAL_MAX_TOKENS);
    let context = app.engine().context();
    if let Some(long) =
        prompts.iter().find(|ids| ids.len().saturating_add(max_new_tokens) > context)
    {
        let what = format!(
            "the context holds {context} tokens, but the prompt has {} and max_tokens is {max_new_tokens}",
            long.len()
        );
        return Err(ApiError::too_long("prompt", what));
    }
    let mut options = common.options(app.engine().model(), app.sampling())?;
    options.max_new_tokens = max_new_tokens;
    let first_seed = options.seed;
    options.constraints = app.constraints(&common, None).await?;
    // Who scores a text asks for one token more than it has, and takes that one away again.
    let scores = echo && own.logprobs.is_some() && max_new_tokens == 1;
    let mut requests = Vec::new();
    for ids in &prompts {
        for choice in 0..n {
            options.seed = match common.seed {
                Some(_) => first_seed.wrapping_add(choice as u64),
                None => any_seed(),
            };
            let mut request = Request::new(ids.clone(), &options);
            request.ignore_end_of_sequence = common.ignore_eos.unwrap_or(false) || scores;
            request.logprobs = own.logprobs;
            request.prompt_logprobs = own.logprobs.filter(|_| echo);
            request.continues.clone_from(&own.state);
            request.save_as.clone_from(&common.save_state);
            requests.push(request);
        }
    }
    let events = answer::submit(&app, requests)?;
    let echoes: Vec<Option<Echo>> = prompts
        .iter()
        .flat_map(|ids| std::iter::repeat_n(ids, n))
        .map(|ids| echo.then(|| Echo::of(&app, ids)).transpose())
        .collect::<Result<_>>()?;
    let head = Head { id: app.new_id("cmpl"), created: unix_seconds(), app };
    if common.streams() {
        let with_logprobs = own.logprobs.is_some();
        let offsets = vec![0; echoes.len()];
        let usage = common.tells_usage();
        let pieces = Streamed { head, echoes, with_logprobs, offsets, tells_usage: usage };
        return Ok(answer::stream(events, n, usage, pieces));
    }
    let answers = answer::gather(events).await?;
    let usages: Vec<_> = answers.iter().map(|answer| &answer.usage).collect();
    let (usage, timings) = (UsageBody::of(&usages, n), Timings::of(&usages));
    let choices = answers.into_iter().zip(&echoes).enumerate();
    let choices = choices.map(|(index, (answer, echo))| {
        head.choice(index, answer, echo.as_ref(), own.logprobs.is_some())
    });
    let choices = choices.collect();
    let Head { id, created, app } = head;
    let model = app.name().to_owned();
    let object = "text_completion";
    Ok(Json(Completion { id, object, created, model, choices, usage, timings }).into_response())
}

impl CompletionFields {
    /// The prompts in tokens.
    fn prompts(&self, app: &App) -> Result<Vec<Vec<u32>>> {
        let missing = || ApiError::invalid("prompt", "prompt: a text or token ids are missing");
        let encode = |text: &String| {
            // What a state goes on with is no document of its own.
            let begins = self.state.is_none();
            app.tokenizer()
                .encode(text, begins)
                .map_err(|error| ApiError::invalid("prompt", format!("prompt: {error}")))
        };
        let prompts = match self.prompt.as_ref().ok_or_else(missing)? {
            Prompt::Text(text) => vec![encode(text)?],
            Prompt::Texts(texts) => {
                check_count(texts.len())?;
                texts.iter().map(encode).collect::<Result<_>>()?
            }
            Prompt::Ids(ids) => vec![ids.clone()],
            Prompt::ManyIds(all) => {
                check_count(all.len())?;
                all.clone()
            }
        };
        if prompts.is_empty() || (self.state.is_none() && prompts.iter().any(Vec::is_empty)) {
            return Err(ApiError::invalid("prompt", "prompt: there are no tokens to continue"));
        }
        Ok(prompts)
    }
}

fn check_count(prompts: usize) -> Result<()> {
    match prompts {
        0..=MOST_CHOICES => Ok(()),
        _ => {
            let what = format!("prompt: {prompts} prompts; the most is {MOST_CHOICES}");
            Err(ApiError::invalid("prompt", what))
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

/// The prompt, where the answer begins with it.
#[derive(Debug)]
struct Echo {
    ids: Vec<u32>,
    text: String,
}

impl Echo {
    fn of(app: &App, ids: &[u32]) -> Result<Self> {
        let text = app.tokenizer().decode(ids, false);
        let text = text.map_err(|error| ApiError::invalid("prompt", format!("prompt: {error}")))?;
        Ok(Self { ids: ids.to_vec(), text })
    }
}

impl Head {
    fn choice(
        &self,
        index: usize,
        answer: Answer,
        echo: Option<&Echo>,
        with_logprobs: bool,
    ) -> CompletionChoice {
        let logprobs = with_logprobs.then(|| {
            let mut logprobs = CompletionLogprobs::default();
            let mut offset = 0;
            if let Some(echo) = echo {
                logprobs.add_prompt(&self.app, &echo.ids, &answer.prompt, &mut offset);
            }
            for token in &answer.tokens {
                logprobs.add(&self.app, token.id, Some(token), &mut offset);
            }
            logprobs
        });
        let text = match echo {
            Some(echo) => echo.text.clone() + &answer.text,
            None => answer.text,
        };
        CompletionChoice { index, text, logprobs, finish_reason: finish_reason(answer.finish) }
    }
}

impl CompletionLogprobs {
    fn add_prompt(
        &mut self,
        app: &App,
        ids: &[u32],
        of: &[Option<TokenLogprobs>],
        offset: &mut usize,
    ) {
        for (at, &id) in ids.iter().enumerate() {
            self.add(app, id, of.get(at).and_then(Option::as_ref), offset);
        }
    }

    /// Adds a token; the first of a text has no probability.
    fn add(&mut self, app: &App, id: u32, of: Option<&TokenLogprobs>, offset: &mut usize) {
        let text = app.token_string(id);
        let characters = text.chars().count();
        self.text_offset.push(*offset);
        *offset += characters;
        self.token_logprobs.push(of.map(|of| clamped(of.logprob)));
        self.top_logprobs.push(of.map(|of| {
            let mut top = Map::new();
            // The chosen token is among them, as OpenAI has it; of tokens with one text the likeliest counts.
            let chosen = std::iter::once((of.id, of.logprob));
            for (id, log_prob) in of.top.iter().copied().chain(chosen) {
                top.entry(app.token_string(id)).or_insert(json!(clamped(log_prob)));
            }
            top
        }));
        self.tokens.push(text);
    }
}

/// The same, piece by piece.
#[derive(Debug)]
struct Streamed {
    head: Head,
    echoes: Vec<Option<Echo>>,
    with_logprobs: bool,
    /// Characters of each answer so far.
    offsets: Vec<usize>,
    tells_usage: bool,
}

impl Streamed {
    fn piece(
        &self,
        index: usize,
        text: &str,
        logprobs: Option<CompletionLogprobs>,
        finish: Option<Finish>,
    ) -> Value {
        let finish_reason = finish.map(finish_reason);
        self.head.piece(
            json!([{ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason }]),
            self.tells_usage.then_some(Value::Null),
        )
    }
}

impl Head {
    fn piece(&self, choices: Value, usage: Option<Value>) -> Value {
        let mut piece = json!({
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.app.name(),
            "choices": choices,
        });
        if let Some(usage) = usage {
            piece["usage"] = usage;
        }
        piece
    }
}

impl Pieces for Streamed {
    fn started(&mut self, index: usize) -> Option<Value> {
        // With probabilities, the prompt is told when they are known.
        let echo = self.echoes[index].as_ref().filter(|_| !self.with_logprobs)?;
        Some(self.piece(index, &echo.text, None, None))
    }

    fn prompt(&mut self, index: usize, tokens: Vec<Option<TokenLogprobs>>) -> Option<Value> {
        let echo = self.echoes[index].as_ref()?;
        let mut logprobs = CompletionLogprobs::default();
        logprobs.add_prompt(&self.head.app, &echo.ids, &tokens, &mut self.offsets[index]);
        Some(self.piece(index, &echo.text, Some(logprobs), None))
    }

    fn token(&mut self, index: usize, text: String, token: Option<TokenLogprobs>) -> Vec<Value> {
        if text.is_empty() && token.is_none() {
            return Vec::new();
        }
        let logprobs = token.map(|token| {
            let mut logprobs = CompletionLogprobs::default();
            let offset = &mut self.offsets[index];
            logprobs.add(&self.head.app, token.id, Some(&token), offset);
            logprobs
        });
        vec![self.piece(index, &text, logprobs, None)]
    }

    fn done(&mut self, index: usize, text: String, finish: Finish) -> Vec<Value> {
        vec![self.piece(index, &text, None, Some(finish))]
    }

    fn usage(&self, usage: UsageBody, timings: Option<Timings>) -> Value {
        let mut piece = self.head.piece(json!([]), Some(json!(usage)));
        if let Some(timings) = timings {
            piece["timings"] = json!(timings);
        }
        piece
    }
}
