//! The server: OpenAI's interface over the engine.
//!
//! | file | content |
//! |---|---|
//! | `server` | connections and shutdown |
//! | `openapi` | the interface's description |
//! | `access` | keys; allowed hosts of a server without keys |
//! | `body` | request bodies, read within limits and parsed |
//! | `error` | errors in OpenAI's shape |
//! | `app` | the state of all handlers |
//! | `sampling` | fields of both kinds of completion |
//! | `grammar` | answers that follow a schema or a grammar |
//! | `completions`, `chat` | the two kinds of completion |
//! | `conversation` | messages and tools in the model's template |
//! | `tool_calls`, `tool_choice` | tool calls in answers; answers that must be tool calls |
//! | `answer` | answers as one body, or as a stream |
//! | `log_probs` | log-probabilities of chats |
//! | `kept` | which tokens each head keeps |
//! | `models`, `tokens`, `states`, `watch` | the other paths, and the page |

mod access;
mod answer;
mod app;
mod body;
mod chat;
mod completions;
mod conversation;
mod error;
mod grammar;
mod kept;
mod log_probs;
mod models;
mod openapi;
mod sampling;
mod server;
mod states;
mod tokens;
mod tool_calls;
mod tool_choice;
mod watch;

use std::any::Any;

use axum::extract::FromRequestParts;
use axum::http::{Method, StatusCode, Uri, request::Parts};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Extension, Router, middleware};
use tower_http::catch_panic::CatchPanicLayer;

pub use self::access::Keys;
use self::app::App;
pub use self::body::BodyLimits;
use self::error::ApiError;
pub use self::grammar::{Grammar, Grammars};
pub use self::server::{ServeError, Server, ServerOptions, Stopper};

/// Paths without a key.
fn open_routes() -> Vec<(&'static str, MethodRouter<App>)> {
    vec![
        ("/", get(watch::page)),
        ("/health", get(watch::health)),
        ("/openapi.json", get(openapi::describe)),
    ]
}

/// Paths that need a key, where there are keys.
fn guarded_routes() -> Vec<(&'static str, MethodRouter<App>)> {
    vec![
        ("/v1/models", get(models::list)),
        ("/v1/models/{model}", get(models::get)),
        ("/v1/completions", post(completions::completions)),
        ("/v1/chat/completions", post(chat::chat_completions)),
        ("/v1/kept", post(kept::kept)),
        ("/v1/states", get(states::list)),
        ("/v1/states/{name}", get(states::get).post(states::post).delete(states::delete)),
        ("/tokenize", post(tokens::tokenize)),
        ("/detokenize", post(tokens::detokenize)),
        ("/tokenizer_info", get(tokens::info)),
        ("/metrics", get(watch::metrics)),
    ]
}

/// All paths.
fn router(app: App, keys: Keys, limits: BodyLimits) -> Router {
    let of = |routes: Vec<(&'static str, MethodRouter<App>)>| {
        routes
            .into_iter()
            .fold(Router::new(), |router, (path, handlers)| router.route(path, handlers))
    };
    let guarded =
        of(guarded_routes()).route_layer(middleware::from_fn_with_state(keys, access::guard));
    of(open_routes())
        .merge(guarded)
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(Extension(limits))
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(app)
}

async fn not_found(uri: Uri) -> ApiError {
    let what = format!("there is nothing at {}: /openapi.json lists what there is", uri.path());
    ApiError::client(StatusCode::NOT_FOUND, "not_found", what)
}

async fn not_allowed(method: Method, uri: Uri) -> ApiError {
    let what = format!("{} does not take {method}: /openapi.json lists what it takes", uri.path());
    ApiError::client(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", what)
}

fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    ApiError::internal().into_response()
}

/// The last part of a path.
#[derive(Debug)]
struct Name(String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> error::Result<Self> {
        match axum::extract::Path::<String>::from_request_parts(parts, state).await {
            Ok(name) => Ok(Self(name.0)),
            Err(_) => {
                let what = "the path is not valid UTF-8";
                Err(ApiError::client(StatusCode::BAD_REQUEST, "invalid_path", what))
            }
        }
    }
}
