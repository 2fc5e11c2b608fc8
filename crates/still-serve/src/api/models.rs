//! `/v1/models`: the served model.

use axum::Json;
use axum::extract::State;
use serde::Serialize;

use super::Name;
use super::app::App;
#[cfg(test)]
use super::error::ErrorBody;
use super::error::Result;

/// The served models.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Models {
    object: &'static str,
    data: Vec<ServedModel>,
}

/// A served model.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct ServedModel {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// Most tokens of a prompt and its answer together.
    max_model_len: usize,
}

impl ServedModel {
    fn of(app: &App) -> Self {
        Self {
            id: app.name().to_owned(),
            object: "model",
            created: app.created(),
            owned_by: "still",
            max_model_len: app.engine().context(),
        }
    }
}

/// Lists the models.
#[cfg_attr(test, utoipa::path(get, path = "/v1/models", tag = "OpenAI", responses((status = 200, body = Models))))]
pub async fn list(State(app): State<App>) -> Json<Models> {
    Json(Models { object: "list", data: vec![ServedModel::of(&app)] })
}

/// Describes a model.
#[cfg_attr(test, utoipa::path(get, path = "/v1/models/{model}", tag = "OpenAI",
    params(("model" = String, Path, description = "Its name")),
    responses((status = 200, body = ServedModel), (status = 404, body = ErrorBody))))]
pub async fn get(State(app): State<App>, Name(name): Name) -> Result<Json<ServedModel>> {
    app.check_model(Some(&name))?;
    Ok(Json(ServedModel::of(&app)))
}
