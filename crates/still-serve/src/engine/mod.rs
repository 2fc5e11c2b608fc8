//! The engine: one thread that owns all caches and runs the requests of many clients together.
//!
//! | file | content |
//! |---|---|
//! | `options` | how an engine runs |
//! | `request` | requests, and the events that answer them |
//! | `worker` | the thread's loop |
//! | `admission` | gives a request a cache: a kept state's, or an empty one |
//! | `reading` | prefill, in pieces |
//! | `decoding` | decode steps of all running sequences |
//! | `ending` | keeps a sequence's state and reports its end |
//! | `forgetting` | drops a kept state that leads to NaN |
//! | `sequence` | a request that has a cache |
//! | `logprobs` | log-probabilities of tokens |
//! | `metrics` | counters and histograms |

mod admission;
mod decoding;
mod ending;
mod forgetting;
mod logprobs;
mod metrics;
mod options;
mod reading;
mod request;
mod sequence;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use still_attention::RowDtype;
use still_model::{Cancel, Model, ModelError};

pub use logprobs::TokenLogprobs;
pub use metrics::{Counters, METRICS_CONTENT_TYPE};
pub(crate) use options::CHUNK;
pub use options::EngineOptions;
pub use request::{Event, Events, Failure, Refused, Request, Usage};

use self::metrics::{Metrics, Outcome};
use self::worker::{Message, Submission, Worker};
use crate::states::{KeptStates, NamedStates, StateError, States, check_name};

/// Threads that read and write kept states.
const STORE_THREADS: usize = 2;

/// A handle of a thread that runs a model for many requests. Clones are handles of the same thread. The thread ends when all
/// handles are dropped and all requests are served.
#[derive(Clone, Debug)]
pub struct Engine(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    model: Model,
    context: usize,
    inbox: Sender<Message>,
    shared: Arc<Shared>,
    states: States,
    /// Most requests in the engine at a time.
    most_requests: usize,
    max_concurrent: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the engine's thread and its handles share.
#[derive(Debug)]
struct Shared {
    metrics: Metrics,
    /// Requests that were accepted and have not ended.
    requests: AtomicUsize,
    stopping: AtomicBool,
    /// Mean duration of the last requests, in milliseconds.
    request_ms: AtomicUsize,
}

/// Why an engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// An error of the model, or options that do not fit it.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The system refused a thread.
    #[error("no thread to serve with: {0}")]
    Thread(std::io::Error),
}

impl EngineError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Model(error) => error.hint(),
            Self::Thread(_) => Some("raise the limit on processes (ulimit -u)".into()),
        }
    }
}

impl Engine {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// A model whose caches cannot be allocated or whose files cannot be read again; options that do not fit the model; no threads.
    pub fn start(model: Model, options: EngineOptions) -> Result<Self, EngineError> {
        let rows = options.rows.unwrap_or_else(|| model.cache_rows(RowDtype::Bf16));
        // What it is that cannot be made is known before a request asks.
        let empty = model.new_cache(1, rows)?;
        let identity = model.state_identity()?;
        let context = options.context.unwrap_or(model.config().max_position_embeddings);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(STORE_THREADS)
            .thread_name("still-states")
            .enable_all()
            .build()
            .map_err(EngineError::Thread)?;
        let store = options.state_store.as_ref();
        let kept = store.map(|store| {
            let identity = identity.clone();
            let limits = (options.state_store_bytes, options.state_store_patience);
            Arc::new(KeptStates::new(identity, rows, store, limits))
        });
        let memory = options.state_memory;
        let named = Arc::new(NamedStates::new(identity.clone(), store, memory));
        let states = States { named, runtime: runtime.handle().clone() };
        let shared = Arc::new(Shared {
            metrics: Metrics::new(),
            requests: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            request_ms: AtomicUsize::new(0),
        });
        let (inbox, messages) = std::sync::mpsc::channel();
        let max_concurrent = options.max_concurrent.max(1);
        let most_requests = max_concurrent.saturating_add(options.queue);
        let worker = Worker::new(
            model.clone(),
            options,
            (rows, empty),
            context,
            &identity,
            (messages, inbox.clone()),
            Arc::clone(&shared),
            (kept, states.clone()),
        );
        let thread = std::thread::Builder::new()
            .name("still-engine".into())
            // A grammar's masks are computed by recursion (`api/grammar.rs`). Only what is used is memory.
            .stack_size(64 << 20)
            .spawn(move || worker.run(runtime))
            .map_err(EngineError::Thread)?;
        Ok(Self(Arc::new(Handle {
            model,
            context,
            inbox,
            shared,
            states,
            most_requests,
            max_concurrent,
            thread: Mutex::new(Some(thread)),
        })))
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.0.model
    }

    /// Most tokens of a prompt and its answer together.
    pub fn context(&self) -> usize {
        self.0.context
    }

    /// The states that clients have named.
    pub fn states(&self) -> States {
        self.0.states.clone()
    }

    /// Counters and histograms as text for Prometheus ([`METRICS_CONTENT_TYPE`]).
    pub fn metrics(&self) -> String {
        self.0.shared.metrics.text()
    }

    /// The counters as numbers.
    pub fn counters(&self) -> Counters {
        self.0.shared.metrics.counters()
    }

    /// Queues a request and returns its events. It never blocks.
    ///
    /// # Errors
    /// A full queue; a request that does not fit the model; an engine that is shutting down.
    pub fn submit(&self, request: Request) -> Result<Events, Refused> {
        let taken = self.take(request);
        if taken.is_err() {
            self.0.shared.metrics.ended(Outcome::Refused);
        }
        taken
    }

    fn take(&self, request: Request) -> Result<Events, Refused> {
        let Handle { shared, inbox, most_requests, .. } = &*self.0;
        self.check(&request)?;
        if shared.stopping.load(Ordering::Relaxed) {
            return Err(Refused::ShuttingDown);
        }
        if shared.requests.fetch_add(1, Ordering::Relaxed) >= *most_requests {
            shared.requests.fetch_sub(1, Ordering::Relaxed);
            return Err(Refused::Busy { retry_after: self.retry_after() });
        }
        let (events, receiver) = tokio::sync::mpsc::unbounded_channel();
        let cancel = Cancel::default();
        let submission =
            Submission { request, events, cancel: cancel.clone(), arrived: Instant::now() };
        if inbox.send(Message::Submit(Box::new(submission))).is_err() {
            shared.requests.fetch_sub(1, Ordering::Relaxed);
            return Err(Refused::ShuttingDown);
        }
        Ok(Events { receiver, cancel })
    }

    fn check(&self, request: &Request) -> Result<(), Refused> {
        let invalid = |what: String| Err(Refused::Invalid(what));
        let Request { prompt, max_new_tokens, continues, save_as, .. } = request;
        if prompt.is_empty() {
            return invalid("the prompt has no tokens".into());
        }
        let vocab = self.0.model.config().vocab_size;
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
            return invalid(format!("token id {id} is outside the vocabulary of {vocab}"));
        }
        let (tokens, context) = (prompt.len(), self.0.context);
        if tokens.saturating_add(*max_new_tokens) > context {
            return invalid(format!(
                "a prompt of {tokens} tokens and {max_new_tokens} new ones exceed the context of {context} tokens"
            ));
        }
        for name in continues.iter().chain(save_as) {
            check_name(name).map_err(|error: StateError| Refused::Invalid(error.to_string()))?;
        }
        Ok(())
    }

    /// Estimate of the time until all waiting requests are served, from the duration of the last ones.
    fn retry_after(&self) -> Duration {
        let Handle { shared, max_concurrent, most_requests, .. } = &*self.0;
        let waiting = most_requests - max_concurrent;
        let ms = shared.request_ms.load(Ordering::Relaxed) * (waiting / max_concurrent + 1);
        Duration::from_millis(ms as u64).clamp(Duration::from_secs(1), Duration::from_secs(60))
    }

    /// Refuses further requests and waits for the engine to end. Running requests may finish within `grace`; later they end with
    /// [`Finish::Interrupted`](still_model::Finish::Interrupted). On return, all states that were being written are complete.
    pub fn shutdown(&self, grace: Duration) {
        self.0.shared.stopping.store(true, Ordering::Relaxed);
        let _ = self.0.inbox.send(Message::Stop { deadline: Instant::now().checked_add(grace) });
        let thread = self.0.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && let Err(panic) = thread.join()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        let _ = self.inbox.send(Message::Stop { deadline: None });
    }
}
