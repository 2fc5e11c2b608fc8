//! `/v1/states`: states under names.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use still_model::GenerateOptions;

use super::Name;
use super::answer;
use super::app::App;
use super::body::{FromJson, JsonBody, fields};
use super::conversation::{Conversation, ids_of};
#[cfg(test)]
use super::error::ErrorBody;
use super::error::Result;
use crate::{Request, StateInfo, StateList};

/// An action on a state.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(tag = "action", rename_all = "lowercase")]
pub enum StateRequest {
    /// Read a text, or a conversation up to its last message, and keep the state.
    Save {
        /// A text.
        prompt: Option<String>,
        /// Token ids, instead of `prompt`.
        tokens: Option<Vec<u32>>,
        /// Messages of a conversation, instead of `prompt`.
        #[serde(skip)]
        #[cfg_attr(test, schema(value_type = Option<Vec<Object>>))]
        conversation: Option<Box<Conversation>>,
    },
    /// Bring a state from the store into memory.
    Restore,
    /// Copy another state.
    Fork {
        /// Its name.
        from: String,
    },
}

impl FromJson for StateRequest {
    fn from_json(value: &Value) -> Result<Self> {
        let mut request: Self = fields(value)?;
        if let Self::Save { conversation, .. } = &mut request {
            *conversation = Conversation::in_a_request(value)?;
        }
        Ok(request)
    }
}

/// A kept state.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct KeptState {
    name: String,
    object: &'static str,
    /// Tokens of its sequence.
    tokens: usize,
    bytes: u64,
    /// Time of saving, in seconds since 1970.
    modified: i64,
}

/// All kept states under names.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct KeptStates {
    object: &'static str,
    data: Vec<KeptState>,
    /// Names of damaged files in the store: delete them, or save them again.
    damaged: Vec<String>,
}

impl From<StateInfo> for KeptState {
    fn from(info: StateInfo) -> Self {
        Self {
            name: info.name,
            object: "state",
            tokens: info.tokens,
            bytes: info.bytes,
            modified: info.modified_unix_seconds,
        }
    }
}

/// Lists the states under names.
#[cfg_attr(test, utoipa::path(get, path = "/v1/states", tag = "States", responses((status = 200, body = KeptStates))))]
pub async fn list(State(app): State<App>) -> Result<Json<KeptStates>> {
    let StateList { states, damaged } = app.engine().states().list().await?;
    let data = states.into_iter().map(Into::into).collect();
    Ok(Json(KeptStates { object: "list", data, damaged }))
}

/// Describes a state.
#[cfg_attr(test, utoipa::path(get, path = "/v1/states/{name}", tag = "States",
    params(("name" = String, Path, description = "1 to 128 letters, digits, `.`, `_` and `-`")),
    responses((status = 200, body = KeptState), (status = "4XX", body = ErrorBody))))]
pub async fn get(State(app): State<App>, Name(name): Name) -> Result<Json<KeptState>> {
    Ok(Json(app.engine().states().get(&name).await?.into()))
}

/// Saves, restores or forks a state.
#[cfg_attr(test, utoipa::path(post, path = "/v1/states/{name}", tag = "States", request_body = StateRequest,
    params(("name" = String, Path, description = "1 to 128 letters, digits, `.`, `_` and `-`")),
    responses((status = 200, body = KeptState), (status = "4XX", body = ErrorBody))))]
pub async fn post(
    State(app): State<App>,
    Name(name): Name,
    JsonBody(request): JsonBody<StateRequest>,
) -> Result<Json<KeptState>> {
    let states = app.engine().states();
    match request {
        StateRequest::Restore => states.restore(&name).await?,
        StateRequest::Fork { from } => states.fork(&from, &name).await?,
        StateRequest::Save { prompt, tokens, conversation } => {
            let ids = ids_of(&app, prompt, tokens, conversation).await?;
            let options = GenerateOptions { max_new_tokens: 0, ..GenerateOptions::default() };
            let mut request = Request::new(ids, &options);
            request.save_as = Some(name.clone());
            answer::gather(answer::submit(&app, vec![request])?).await?;
            states.get(&name).await?
        }
    };
    Ok(Json(states.get(&name).await?.into()))
}

/// Deletes a state.
#[cfg_attr(test, utoipa::path(delete, path = "/v1/states/{name}", tag = "States",
    params(("name" = String, Path, description = "1 to 128 letters, digits, `.`, `_` and `-`")),
    responses((status = 204), (status = "4XX", body = ErrorBody))))]
pub async fn delete(State(app): State<App>, Name(name): Name) -> Result<StatusCode> {
    app.engine().states().delete(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
