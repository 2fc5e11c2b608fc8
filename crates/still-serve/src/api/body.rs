//! Bodies of requests: read within limits of bytes and time, and parsed so that an error names its field.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::Value;

use super::error::{ApiError, Result};

/// Limits of a request's body, found among the request's extensions.
#[derive(Clone, Copy, Debug)]
pub struct BodyLimits {
    /// More are a 413.
    pub bytes: usize,
    /// A body that takes longer is a 408.
    pub time: Duration,
}

/// How much more than its limit is read of a body and dropped: a client that still sends does not read the answer.
const DROPPED: usize = 32 << 20;

/// A body that is JSON.
#[derive(Debug)]
pub struct JsonBody<T>(pub T);

/// What a body holds.
pub trait FromJson: Sized {
    /// Reads it; fields that are not known are ignored.
    ///
    /// # Errors
    /// The first field of another type.
    fn from_json(value: &Value) -> Result<Self>;
}

impl<S: Sync, T: FromJson> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self> {
        let limits = request.extensions().get().copied().unwrap_or(DEFAULT);
        check_content_type(request.headers())?;
        let bytes = tokio::time::timeout(limits.time, read(request.into_body(), limits.bytes));
        let bytes = bytes.await.map_err(|_| {
            let what = format!("the body did not arrive within {} s", limits.time.as_secs());
            ApiError::client(StatusCode::REQUEST_TIMEOUT, "timeout", what)
        })??;
        Ok(Self(T::from_json(&parse(&bytes)?)?))
    }
}

const DEFAULT: BodyLimits = BodyLimits { bytes: 8 << 20, time: Duration::from_secs(30) };

impl Default for BodyLimits {
    fn default() -> Self {
        DEFAULT
    }
}

/// JSON, of an object.
///
/// # Errors
/// 400 for anything else.
pub fn parse(bytes: &[u8]) -> Result<Value> {
    let malformed =
        |what: String| ApiError::client(StatusCode::BAD_REQUEST, "malformed_json", what);
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| malformed(format!("the body is not valid JSON: {error}")))?;
    match value.is_object() {
        true => Ok(value),
        false => Err(malformed("the body is not a JSON object".into())),
    }
}

/// The fields that `T` has, out of an object that may have others.
///
/// # Errors
/// 400 for a field of another type, which it names.
pub fn fields<'a, T: Deserialize<'a>>(value: &'a Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let message = error.into_inner().to_string();
        match path.as_str() {
            // The object itself: a field is missing.
            "." => ApiError::client(StatusCode::BAD_REQUEST, "invalid_value", message),
            _ => ApiError::invalid(path.clone(), format!("{path}: {message}")),
        }
    })
}

fn check_content_type(headers: &HeaderMap) -> Result<()> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = given.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    // Anything else may be sent by a page of another site without being asked.
    match kind.eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => Err(ApiError::client(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "send JSON, with the header `Content-Type: application/json`",
        )),
    }
}

async fn read(body: Body, limit: usize) -> Result<Vec<u8>> {
    let (mut bytes, mut dropped) = (Vec::new(), 0);
    let mut stream = body.into_data_stream();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|_| {
            ApiError::client(StatusCode::BAD_REQUEST, "incomplete_body", "the body broke off")
        })?;
        if dropped == 0 && bytes.len() + piece.len() <= limit {
            bytes.extend_from_slice(&piece);
            continue;
        }
        dropped += piece.len();
        bytes = Vec::new();
        if dropped > DROPPED {
            break;
        }
    }
    match dropped {
        0 => Ok(bytes),
        _ => {
            let what = format!("the body has more than {limit} bytes");
            Err(ApiError::client(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Asked {
        #[allow(dead_code)]
        max_tokens: Option<u32>,
    }

    #[test]
    fn errors_name_the_field() {
        let value = serde_json::json!({ "max_tokens": "many", "other": 1 });
        let error = serde_json::to_value(fields::<Asked>(&value).unwrap_err().body()).unwrap();
        assert_eq!(error["error"]["param"], "max_tokens");
        assert!(fields::<Asked>(&serde_json::json!({ "other": 1 })).is_ok());
    }

    #[test]
    fn only_an_object_is_a_body() {
        for bytes in [&b"[]"[..], b"", b"{", b"1", b"{\"a\": \"\xff\"}", b"{} x"] {
            assert!(parse(bytes).is_err(), "{bytes:?}");
        }
        // Deep enough to end a parser that calls itself.
        assert!(parse(&b"[".repeat(1 << 20)).is_err());
        assert!(parse(b" {\"a\": 1} ").is_ok());
    }
}
