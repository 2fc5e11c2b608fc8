//! `/v1/kept`: which tokens of a conversation each head keeps.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use still_attention::{HybridState, PreparedWeights, RowDtype};
use still_model::{Model, ModelError, Student};

use super::app::App;
use super::body::{FromJson, JsonBody, fields};
use super::conversation::{Conversation, ids_of};
#[cfg(test)]
use super::error::ErrorBody;
use super::error::{ApiError, Result};

/// Most tokens of a request, which the server reads once more.
const MOST_TOKENS: usize = 4096;

/// The text or conversation.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct KeptRequest {
    /// A text.
    prompt: Option<String>,
    /// Token ids, instead of `prompt`.
    tokens: Option<Vec<u32>>,
    /// Messages of a conversation, instead of `prompt`.
    #[serde(skip)]
    #[cfg_attr(test, schema(value_type = Option<Vec<Object>>))]
    conversation: Option<Box<Conversation>>,
}

impl FromJson for KeptRequest {
    fn from_json(value: &Value) -> Result<Self> {
        Ok(Self { conversation: Conversation::in_a_request(value)?, ..fields(value)? })
    }
}

/// The kept tokens of a text.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct KeptTokens {
    object: &'static str,
    /// The text, token by token.
    tokens: Vec<String>,
    /// All heads keep the tokens from this position on: their window.
    window_from: usize,
    /// Layers with hybrid attention.
    layers: Vec<KeptLayer>,
}

/// The kept tokens of a layer.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct KeptLayer {
    /// Its number, from 0.
    layer: usize,
    /// For each selection head, the ascending positions of tokens before the window that it keeps. All other tokens are in its
    /// linear state.
    heads: Vec<Vec<u32>>,
}

/// Returns which tokens of a conversation each head keeps. The server reads the conversation once more, while other requests run.
#[cfg_attr(test, utoipa::path(post, path = "/v1/kept", tag = "States", request_body = KeptRequest,
    responses((status = 200, body = KeptTokens), (status = "4XX", body = ErrorBody))))]
pub async fn kept(
    State(app): State<App>,
    JsonBody(request): JsonBody<KeptRequest>,
) -> Result<Json<KeptTokens>> {
    let model = app.engine().model();
    if model.student.is_none() {
        let what = "the model is no student: its attention keeps every token";
        return Err(ApiError::unsupported("model", what));
    }
    if !model.device().is_cpu() {
        let what = "a model on a GPU does not tell what its heads keep: use `still inspect`";
        return Err(ApiError::unsupported("model", what));
    }
    let KeptRequest { prompt, tokens, conversation } = request;
    let ids = ids_of(&app, prompt, tokens, conversation).await?;
    let vocabulary = model.config().vocab_size;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
        let what = format!("token id {id} is outside the vocabulary of {vocabulary}");
        return Err(ApiError::invalid("tokens", what));
    }
    if ids.is_empty() || ids.len() > MOST_TOKENS {
        let what = format!("{} tokens: from 1 to {MOST_TOKENS} can be looked at", ids.len());
        return Err(ApiError::too_long("messages", what));
    }
    // One at a time: it takes as much time as reading a prompt does.
    let permit = app.kept_permit()?;
    let read = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        kept_of(&app, &ids)
    });
    match read.await {
        Ok(Ok(kept)) => Ok(Json(kept)),
        Ok(Err(error)) => {
            tracing::error!("what heads keep was not found: {error}");
            Err(ApiError::internal())
        }
        Err(_) => Err(ApiError::internal()),
    }
}

fn kept_of(app: &App, ids: &[u32]) -> still_model::Result<KeptTokens> {
    let model = app.engine().model();
    let Some(student) = &model.student else {
        return Err(ModelError::Invalid("the model is no student".into()));
    };
    let chunk = student.config.chunk;
    Ok(KeptTokens {
        object: "kept",
        tokens: ids.iter().map(|&id| app.token_string(id)).collect(),
        window_from: ((ids.len() - 1) / chunk).saturating_sub(1) * chunk,
        layers: kept_layers(model, student, ids)?,
    })
}

/// Reads a text with states that record the positions of salient tokens, unlike those of answers.
fn kept_layers(
    model: &Model,
    student: &Student,
    ids: &[u32],
) -> still_model::Result<Vec<KeptLayer>> {
    let decoder = &model.decoder;
    let (geometry, rows) = (decoder.config.geometry(), model.cache_rows(RowDtype::Bf16));
    let rotation = decoder.rotation(0, ids.len())?;
    let mut layers = Vec::new();
    decoder.visit_layers(decoder.embed(ids)?, &rotation, Some(student), |n, layer, inputs| {
        let Some(weights) = student.layer(n) else { return layer.softmax_attention(inputs) };
        let prepared = PreparedWeights::new(geometry, &weights.config, &weights.attention)?;
        let rows = weights.config.stored_rows(rows);
        let mut state = HybridState::new(prepared, 1, rows).keeping_positions();
        let attention =
            state.advance(&inputs.q, &inputs.k, &inputs.v, inputs.gate.as_ref(), None)?;
        let heads = geometry.selection_heads(weights.config.selection_head);
        let positions = |head| state.salient_positions(0, head).unwrap_or_default();
        layers.push(KeptLayer { layer: n, heads: (0..heads).map(positions).collect() });
        Ok(attention)
    })?;
    Ok(layers)
}
