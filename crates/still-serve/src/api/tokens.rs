//! `/tokenize`, `/detokenize` and `/tokenizer_info`.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::app::App;
use super::body::{FromJson, JsonBody, fields};
use super::conversation::Conversation;
#[cfg(test)]
use super::error::ErrorBody;
use super::error::{ApiError, Result};

/// A text, or a conversation.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct TokenizeRequest {
    /// A text. vLLM's clients call it `prompt`.
    content: Option<String>,
    /// Another name of `content`.
    prompt: Option<String>,
    /// Whether to add the tokens that the tokenizer puts around a document, as `/v1/completions` does. Default: true. vLLM's
    /// clients call it `add_special_tokens`.
    add_special: Option<bool>,
    /// Another name of `add_special`.
    add_special_tokens: Option<bool>,
    /// Whether to return each token's text.
    with_pieces: Option<bool>,
    /// Messages of a conversation, instead of a text.
    #[serde(skip)]
    #[cfg_attr(test, schema(value_type = Option<Vec<Object>>))]
    conversation: Option<Conversation>,
}

impl FromJson for TokenizeRequest {
    fn from_json(value: &Value) -> Result<Self> {
        let conversation = match value.get("messages") {
            None | Some(Value::Null) => None,
            Some(_) => Some(fields(value)?),
        };
        Ok(Self { conversation, ..fields(value)? })
    }
}

/// A text's tokens.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Tokenized {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pieces: Option<Vec<String>>,
}

/// Tokens.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct DetokenizeRequest {
    tokens: Vec<u32>,
}

impl FromJson for DetokenizeRequest {
    fn from_json(value: &Value) -> Result<Self> {
        fields(value)
    }
}

/// The text of tokens, under the names that llama.cpp's and vLLM's clients use.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Detokenized {
    content: String,
    prompt: String,
}

/// Returns the tokens of a text or a conversation.
#[cfg_attr(test, utoipa::path(post, path = "/tokenize", tag = "Tokens", request_body = TokenizeRequest,
    responses((status = 200, body = Tokenized), (status = "4XX", body = ErrorBody))))]
pub async fn tokenize(
    State(app): State<App>,
    JsonBody(request): JsonBody<TokenizeRequest>,
) -> Result<Json<Tokenized>> {
    let tokens = match (request.conversation, request.content.or(request.prompt)) {
        (Some(conversation), None) => conversation.render(&app).await?,
        (None, Some(text)) => {
            let special = request.add_special.or(request.add_special_tokens).unwrap_or(true);
            let encoded = app.tokenizer().encode(&text, special);
            encoded.map_err(|error| ApiError::invalid("content", format!("content: {error}")))?
        }
        _ => {
            let what = "give either a text (`content` or `prompt`) or `messages`";
            return Err(ApiError::invalid("content", what));
        }
    };
    let piece = |&id: &u32| app.token_string(id);
    let pieces = request.with_pieces.unwrap_or(false).then(|| tokens.iter().map(piece).collect());
    let max_model_len = app.engine().context();
    Ok(Json(Tokenized { count: tokens.len(), max_model_len, tokens, pieces }))
}

/// Returns the text of tokens, special ones included.
#[cfg_attr(test, utoipa::path(post, path = "/detokenize", tag = "Tokens", request_body = DetokenizeRequest,
    responses((status = 200, body = Detokenized), (status = "4XX", body = ErrorBody))))]
pub async fn detokenize(
    State(app): State<App>,
    JsonBody(request): JsonBody<DetokenizeRequest>,
) -> Result<Json<Detokenized>> {
    let vocabulary = app.engine().model().config().vocab_size;
    if let Some(id) = request.tokens.iter().find(|&&id| id as usize >= vocabulary) {
        let what = format!("tokens: {id} is not below {vocabulary}, the size of the vocabulary");
        return Err(ApiError::invalid("tokens", what));
    }
    let decoded = app.tokenizer().decode(&request.tokens, false);
    let content =
        decoded.map_err(|error| ApiError::invalid("tokens", format!("tokens: {error}")))?;
    Ok(Json(Detokenized { prompt: content.clone(), content }))
}

/// What a client needs to render prompts by itself, under vLLM's names.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct TokenizerInfo {
    /// The token that begins a document.
    bos_token: Option<String>,
    /// The token that ends one.
    eos_token: Option<String>,
    /// The template for conversations without tools.
    chat_template: Option<String>,
}

/// Describes the tokenizer.
#[cfg_attr(test, utoipa::path(get, path = "/tokenizer_info", tag = "Tokens", responses((status = 200, body = TokenizerInfo))))]
pub async fn info(State(app): State<App>) -> Json<TokenizerInfo> {
    let config = app.engine().model().config();
    Json(TokenizerInfo {
        bos_token: config.bos_token_id.map(|id| app.token_string(id)),
        eos_token: config.eos_token_ids.first().map(|&id| app.token_string(id)),
        chat_template: app.tokenizer().chat_template().map(|template| template.source().to_owned()),
    })
}
