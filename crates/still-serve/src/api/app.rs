//! The state of all handlers: the engine, the model's name, the limits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use still_model::{Constraints, SuggestedSampling, Tokenizer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::{ApiError, Result};
use super::grammar::{Grammar, Grammars};
use super::sampling::{Common, any_seed, usual_sampling};
use crate::{Engine, Refused};

/// The state of all handlers.
#[derive(Clone, Debug)]
pub struct App {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    engine: Engine,
    name: String,
    created: u64,
    sampling: SuggestedSampling,
    stopping: AtomicBool,
    /// Created for the first answer that follows a grammar.
    grammars: OnceLock<std::result::Result<Grammars, String>>,
    /// A permit for `/v1/kept`: one request at a time.
    kept_permit: Arc<Semaphore>,
    /// The bytes of tokens, where they are known; made when first asked for.
    token_bytes: OnceLock<Option<Vec<Vec<u8>>>>,
}

impl App {
    /// Serves the model under a name.
    ///
    /// # Errors
    /// A suggestion of the model's makers for sampling that is out of range.
    pub fn new(engine: Engine, name: String) -> still_model::Result<Self> {
        let sampling = usual_sampling(engine.model())?;
        let inner = Inner {
            engine,
            name,
            created: unix_seconds(),
            sampling,
            stopping: AtomicBool::new(false),
            grammars: OnceLock::new(),
            kept_permit: Arc::new(Semaphore::new(1)),
            token_bytes: OnceLock::new(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// When the server started, in seconds since 1970.
    pub fn created(&self) -> u64 {
        self.inner.created
    }

    /// Default sampling.
    pub fn sampling(&self) -> &SuggestedSampling {
        &self.inner.sampling
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.engine.model().tokenizer
    }

    /// Marks the server as shutting down.
    pub fn begin_to_stop(&self) {
        self.inner.stopping.store(true, Ordering::Relaxed);
    }

    /// Whether the server is shutting down.
    pub fn is_stopping(&self) -> bool {
        self.inner.stopping.load(Ordering::Relaxed)
    }

    /// # Errors
    /// 404 for another model than the one that is served.
    pub fn check_model(&self, asked: Option<&str>) -> Result<()> {
        match asked {
            Some(asked) if asked != self.name() => {
                let what = format!("no model is called {asked:?} here: use {:?}", self.name());
                Err(ApiError::client(StatusCode::NOT_FOUND, "model_not_found", what))
            }
            _ => Ok(()),
        }
    }

    /// The bytes of a token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let all = self.inner.token_bytes.get_or_init(|| self.tokenizer().token_bytes());
        let known = all.as_ref().and_then(|all| all.get(id as usize)).cloned();
        known.unwrap_or_else(|| self.tokenizer().token_text(id).into_bytes())
    }

    /// A token as text; where it is a part of a character, with replacement characters.
    pub fn token_string(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// The permit for `/v1/kept`, until it is dropped.
    ///
    /// # Errors
    /// 429 while another request has it.
    pub fn kept_permit(&self) -> Result<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.inner.kept_permit).try_acquire_owned();
        permit.map_err(|_| Refused::Busy { retry_after: Duration::from_secs(2) }.into())
    }

    /// A unique id for an answer.
    pub fn new_id(&self, kind: &str) -> String {
        format!("{kind}-{:016x}{:08x}", any_seed(), any_seed() as u32)
    }

    /// What limits the tokens of each answer, which may have to be `calls` of tools. Compiling may take long: it is done on a
    /// thread of its own.
    ///
    /// # Errors
    /// 400 for a format or grammar that is malformed, or for two of them.
    pub async fn constraints(&self, common: &Common, calls: Option<String>) -> Result<Constraints> {
        let Some(kind) = Kind::of(common, calls)? else { return Ok(Constraints::default()) };
        let app = self.clone();
        let made = tokio::task::spawn_blocking(move || {
            let grammars = app.inner.grammars.get_or_init(|| Grammars::new(app.engine().model()));
            let grammars = grammars.as_ref().map_err(|why| kind.refused(why))?;
            let grammar = kind.compiled(grammars).map_err(|why| kind.refused(&why))?;
            Ok(grammar.constraints())
        });
        made.await.unwrap_or_else(|_| Err(ApiError::internal()))
    }
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The constraint of an answer.
enum Kind {
    Object,
    Schema(serde_json::Value),
    Lark(String),
    /// Calls of tools.
    Calls(String),
}

impl Kind {
    fn of(common: &Common, calls: Option<String>) -> Result<Option<Self>> {
        let format = common.response_format.as_ref();
        let format = match format.map(|format| (&format["type"], format)) {
            None => None,
            Some((kind, format)) => match kind.as_str() {
                Some("text") => None,
                Some("json_object") => Some(Self::Object),
                Some("json_schema") => {
                    let schema = &format["json_schema"]["schema"];
                    if !schema.is_object() && !schema.is_boolean() {
                        let what = "response_format.json_schema.schema is not a JSON schema";
                        return Err(ApiError::invalid("response_format", what));
                    }
                    Some(Self::Schema(schema.clone()))
                }
                _ => {
                    let what =
                        "response_format.type is not \"text\", \"json_object\" or \"json_schema\"";
                    return Err(ApiError::invalid("response_format", what));
                }
            },
        };
        match (format, common.grammar.clone()) {
            (format, grammar) if calls.is_some() => match (format, grammar) {
                (None, None) => Ok(calls.map(Self::Calls)),
                _ => Err(ApiError::invalid(
                    "tool_choice",
                    "an answer that has to call a tool follows no `grammar` or `response_format`: leave it out",
                )),
            },
            (Some(_), Some(_)) => Err(ApiError::invalid(
                "grammar",
                "an answer follows either `grammar` or `response_format`: leave one out",
            )),
            (None, Some(grammar)) => Ok(Some(Self::Lark(grammar))),
            (format, None) => Ok(format),
        }
    }

    fn compiled(&self, grammars: &Grammars) -> std::result::Result<Grammar, String> {
        match self {
            Self::Object => grammars.json_object(),
            Self::Schema(schema) => grammars.json_schema(schema),
            Self::Lark(grammar) => grammars.lark(grammar),
            Self::Calls(grammar) => grammars.calls(grammar),
        }
    }

    fn refused(&self, why: &str) -> ApiError {
        match self {
            Self::Lark(_) => ApiError::invalid("grammar", format!("the grammar is refused: {why}")),
            Self::Calls(_) => {
                ApiError::invalid("tools", format!("the tools' schemas are refused: {why}"))
            }
            _ => ApiError::invalid("response_format", format!("the schema is refused: {why}")),
        }
    }
}
