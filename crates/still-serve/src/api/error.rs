//! Errors in OpenAI's shape, with the status that its clients expect.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use still_model::ModelError;

use super::grammar;
use crate::{Failure, Refused, StateError};

/// An error response.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
    retry_after: Option<Duration>,
}

/// `{"error": …}`
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct ErrorBody {
    error: ErrorDetail,
}

/// The error.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct ErrorDetail {
    /// The message for people.
    message: String,
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    r#type: &'static str,
    /// The field of the request that is wrong.
    param: Option<String>,
    /// The code for programs.
    code: Option<&'static str>,
}

/// Result of a handler.
pub type Result<T> = std::result::Result<T, ApiError>;

impl ApiError {
    /// An error that the client can fix.
    pub fn client(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", Some(code), message)
    }

    /// 400: a field has a value that it cannot have.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::client(StatusCode::BAD_REQUEST, "invalid_value", message);
        error.body.error.param = Some(param.into());
        error
    }

    /// 400: a field that would change the answer and is not supported.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        let mut error = Self::invalid(param, message);
        error.body.error.code = Some("unsupported_parameter");
        error
    }

    /// 400: prompt and new tokens do not fit the context.
    pub fn too_long(param: &str, message: impl Into<String>) -> Self {
        let mut error = Self::invalid(param, message);
        error.body.error.code = Some("context_length_exceeded");
        error
    }

    /// 500, without internal details.
    pub fn internal() -> Self {
        let message = "the server failed while it computed the answer: try again";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("internal"), message)
    }

    /// 503: the server is shutting down.
    pub fn shutting_down() -> Self {
        let message = "the server is shutting down: try again, or another replica";
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let mut error = Self::new(status, "server_error", Some("shutting_down"), message);
        error.retry_after = Some(Duration::from_secs(5));
        error
    }

    fn new(
        status: StatusCode,
        r#type: &'static str,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        let error = ErrorDetail { message: message.into(), r#type, param: None, code };
        Self { status, body: ErrorBody { error }, retry_after: None }
    }

    /// The body, which a stream that has begun sends instead of a status.
    pub fn body(&self) -> &ErrorBody {
        &self.body
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body)).into_response();
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Busy { retry_after } => {
                let message = "all places are taken, and the queue is full: try again later";
                let status = StatusCode::TOO_MANY_REQUESTS;
                let code = Some("rate_limit_exceeded");
                let mut error = Self::new(status, "rate_limit_error", code, message);
                error.retry_after = Some(retry_after);
                error
            }
            Refused::ShuttingDown => Self::shutting_down(),
            Refused::Invalid(what) => Self::client(StatusCode::BAD_REQUEST, "invalid_value", what),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::TimedOut(_) => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "server_error",
                Some("timeout"),
                "the request took longer than this server allows",
            ),
            Failure::State(error) => error.into(),
            Failure::Model(ModelError::Invalid(what)) if what.starts_with(grammar::FAILS) => {
                Self::client(StatusCode::BAD_REQUEST, "grammar_failed", what)
            }
            // A model's errors name files and shapes of this machine. They are in the log.
            failure => {
                tracing::error!("a request failed: {failure}");
                Self::internal()
            }
        }
    }
}

impl From<StateError> for ApiError {
    fn from(error: StateError) -> Self {
        let bad = StatusCode::BAD_REQUEST;
        match error {
            StateError::NotFound(_) => {
                Self::client(StatusCode::NOT_FOUND, "state_not_found", error.to_string())
            }
            StateError::InvalidName => Self::client(bad, "invalid_state_name", error.to_string()),
            StateError::Full { .. } => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "server_error",
                Some("state_store_full"),
                error.to_string(),
            ),
            // Another model's, or damaged: the client can save it again.
            error @ (StateError::File(_) | StateError::Forged(_) | StateError::NoNumbers(_)) => {
                tracing::warn!("a state cannot be used: {error}");
                let message =
                    "the stored state is damaged or of another model: delete it and save it again";
                Self::client(StatusCode::CONFLICT, "state_unusable", message)
            }
            StateError::KeptNoNumbers(_) => {
                let message =
                    "a kept state could not be continued, and is not used any more: try again";
                let status = StatusCode::INTERNAL_SERVER_ERROR;
                Self::new(status, "server_error", Some("state_unusable"), message)
            }
            error => {
                tracing::error!("the state store failed: {error}");
                let message = "the state store cannot be read or written: try again; the server's log says why";
                Self::new(StatusCode::BAD_GATEWAY, "server_error", Some("state_store"), message)
            }
        }
    }
}
