//! `/health`, `/metrics`, `/openapi.json` and the page.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::app::App;
#[cfg(test)]
use super::error::ErrorBody;
use super::error::{ApiError, Result};
use crate::METRICS_CONTENT_TYPE;

/// The page at `/`.
const PAGE: &str = include_str!("page.html");
/// What the page may load: nothing but what it has, and this server's answers.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Tells whether the server takes requests.
#[cfg_attr(test, utoipa::path(get, path = "/health", tag = "Watch", responses((status = 200), (status = 503, body = ErrorBody))))]
pub async fn health(State(app): State<App>) -> Result<Json<Value>> {
    match app.is_stopping() {
        false => Ok(Json(json!({ "status": "ok" }))),
        true => Err(ApiError::shutting_down()),
    }
}

/// Tells what Prometheus gathers.
#[cfg_attr(test, utoipa::path(get, path = "/metrics", tag = "Watch", responses((status = 200, body = String))))]
pub async fn metrics(State(app): State<App>) -> Response {
    ([(header::CONTENT_TYPE, METRICS_CONTENT_TYPE)], app.engine().metrics()).into_response()
}

/// The page.
pub async fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, PAGE).into_response()
}
