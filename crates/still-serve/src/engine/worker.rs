//! The loop of the engine's thread.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use still_attention::RowDtype;
use still_model::{Cache, Cancel, Model, ModelError, SavedSequence, Workspace};
use tokio::runtime::Runtime;
use tokio::sync::mpsc::UnboundedSender;

use super::admission::Seen;
use super::decoding::panic_text;
use super::metrics::Outcome;
use super::options::{CHUNK, PIECE, PIECE_ON_DEVICE};
use super::request::{Event, Failure, Request};
use super::sequence::{Cuts, Phase, Sequence};
use super::{EngineOptions, Shared};
use crate::states::{Chain, KeptStates, Memory, Prefix, StateError, States};

/// Interval at which an idle thread checks for disconnected clients and timeouts.
const LOOK: Duration = Duration::from_millis(50);

/// Time for writes in progress when the engine ends.
const LAST_WRITES: Duration = Duration::from_secs(30);

/// A request that the thread has not begun.
#[derive(Debug)]
pub struct Submission {
    pub request: Request,
    pub events: UnboundedSender<Event>,
    pub cancel: Cancel,
    pub arrived: Instant,
}

/// A message to the thread.
#[derive(Debug)]
pub enum Message {
    Submit(Box<Submission>),
    /// The result of a search in the store.
    Looked {
        id: u64,
        found: Option<(Prefix, SavedSequence)>,
    },
    /// A named state that was read.
    Loaded {
        id: u64,
        state: Result<SavedSequence, StateError>,
    },
    /// Shut down: no more requests come, and all end at the deadline.
    Stop {
        deadline: Option<Instant>,
    },
}

pub struct Worker {
    pub(super) model: Model,
    pub(super) options: EngineOptions,
    pub(super) rows: RowDtype,
    /// An empty cache. Its copies share the tensors that the model has prepared for its caches.
    empty: Cache,
    /// A spare copy, made while no request waits.
    pub(super) spare: Option<Cache>,
    pub(super) context: usize,
    /// [`EngineOptions::prefill_chunk`], in whole chunks.
    pub(super) prefill_chunk: usize,
    /// Of no tokens.
    pub(super) root: Chain,
    messages: Receiver<Message>,
    /// Sender of its own inbox, for other threads.
    pub(super) inbox: Sender<Message>,
    pub(super) shared: Arc<Shared>,
    /// The store, if there is one.
    pub(super) kept: Option<Arc<KeptStates>>,
    pub(super) states: States,
    queue: VecDeque<Submission>,
    pub(super) sequences: Vec<Sequence>,
    pub(super) memory: Memory,
    pub(super) seen: Seen,
    pub(super) workspace: Workspace,
    next_id: u64,
    /// Whether the oldest prompt is next, rather than the one with the fewest tokens left.
    pub(super) oldest_next: bool,
    /// Writes of states in progress.
    pub(super) writes: Arc<()>,
    stopping: bool,
    deadline: Option<Instant>,
}

impl Worker {
    pub fn new(
        model: Model,
        options: EngineOptions,
        (rows, empty): (RowDtype, Cache),
        context: usize,
        identity: &str,
        (messages, inbox): (Receiver<Message>, Sender<Message>),
        shared: Arc<Shared>,
        (kept, states): (Option<Arc<KeptStates>>, States),
    ) -> Self {
        let usual = if model.device().is_cpu() { PIECE } else { PIECE_ON_DEVICE };
        let prefill_chunk = options.prefill_chunk.unwrap_or(usual).max(1).next_multiple_of(CHUNK);
        Self {
            memory: Memory::new(options.state_memory),
            root: Chain::new(identity, rows),
            prefill_chunk,
            workspace: match options.deterministic {
                true => Workspace::of_rows(options.max_concurrent),
                false => Workspace::default(),
            },
            model,
            options,
            rows,
            empty,
            spare: None,
            context,
            messages,
            inbox,
            shared,
            kept,
            states,
            queue: VecDeque::new(),
            sequences: Vec::new(),
            seen: Seen::default(),
            next_id: 0,
            oldest_next: true,
            writes: Arc::new(()),
            stopping: false,
            deadline: None,
        }
    }

    /// Serves until shutdown.
    pub fn run(mut self, runtime: Runtime) {
        loop {
            if !self.take_messages() {
                break;
            }
            self.drop_given_up();
            self.drop_late();
            self.admit();
            self.read_pieces();
            self.decode_a_step();
            self.tell();
            if self.spare.is_none() {
                self.spare = copy(&self.empty).ok();
            }
        }
        self.tell();
        // What is being written gets complete.
        let until = Instant::now() + LAST_WRITES;
        while Arc::strong_count(&self.writes) > 1 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        runtime.shutdown_background();
    }

    /// Handles messages, and waits if there is no work. Returns whether to continue.
    fn take_messages(&mut self) -> bool {
        while let Ok(message) = self.messages.try_recv() {
            self.take_message(message);
        }
        loop {
            if self.stopping && self.is_over() {
                return false;
            }
            let busy =
                |sequence: &Sequence| matches!(sequence.phase, Phase::Reading | Phase::Decoding);
            let room = self.sequences.len() < self.options.max_concurrent.max(1);
            if self.sequences.iter().any(busy) || (room && !self.queue.is_empty()) {
                return true;
            }
            let idle = self.sequences.is_empty() && self.queue.is_empty();
            let wait = if idle { Duration::from_secs(3600) } else { LOOK };
            match self.messages.recv_timeout(wait) {
                Ok(message) => self.take_message(message),
                Err(RecvTimeoutError::Timeout) if idle => {}
                // There are sequences to look after.
                Err(RecvTimeoutError::Timeout) => return true,
                // It holds a sender itself.
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }

    /// Whether the shutdown is complete. After the deadline it interrupts the remaining requests.
    fn is_over(&mut self) -> bool {
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.interrupt_all();
        }
        self.sequences.is_empty() && self.queue.is_empty()
    }

    fn take_message(&mut self, message: Message) {
        match message {
            Message::Submit(submission) => self.queue.push_back(*submission),
            Message::Looked { id, found } => self.looked(id, found),
            Message::Loaded { id, state } => self.loaded(id, state),
            Message::Stop { deadline } => {
                self.stopping = true;
                self.deadline = self.deadline.or(deadline);
            }
        }
    }

    /// Removes requests whose clients have disconnected.
    fn drop_given_up(&mut self) {
        let given_up = |events: &UnboundedSender<Event>, cancel: &Cancel| {
            events.is_closed() || cancel.is_raised()
        };
        let before = self.queue.len() + self.sequences.len();
        self.queue.retain(|submission| !given_up(&submission.events, &submission.cancel));
        self.sequences.retain(|sequence| !sequence.is_given_up());
        for _ in self.queue.len() + self.sequences.len()..before {
            self.ended(Outcome::GivenUp, None);
        }
        self.wake_orphans();
    }

    /// Fails requests that timed out.
    fn drop_late(&mut self) {
        let now = Instant::now();
        let late = |arrived: Instant, limit: Option<Duration>| {
            limit.filter(|limit| now.duration_since(arrived) > *limit)
        };
        let EngineOptions { queue_timeout, request_timeout, .. } = self.options;
        let in_queue = [queue_timeout, request_timeout].into_iter().flatten().min();
        while let Some(at) =
            self.queue.iter().position(|waiting| late(waiting.arrived, in_queue).is_some())
        {
            let Some(waiting) = self.queue.remove(at) else { break };
            let limit = in_queue.unwrap_or_default();
            let _ = waiting.events.send(Event::Failed(Failure::TimedOut(limit)));
            self.ended(Outcome::Failed, None);
        }
        while let Some(at) =
            self.sequences.iter().position(|s| late(s.arrived, request_timeout).is_some())
        {
            let limit = request_timeout.unwrap_or_default();
            self.fail(at, Failure::TimedOut(limit));
        }
    }

    /// Gives waiting requests a cache, as long as there is room.
    fn admit(&mut self) {
        while self.sequences.len() < self.options.max_concurrent.max(1) {
            let Some(submission) = self.queue.pop_front() else { return };
            self.next_id += 1;
            let root = self.root.clone();
            match self.empty_cache() {
                Ok(cache) => {
                    let cuts = Cuts {
                        unit: if self.cuts_alike() { self.prefill_chunk } else { CHUNK },
                        last: self.cuts_alike() || self.model.device().is_cpu(),
                    };
                    let model = &self.model;
                    let sequence =
                        Sequence::new(self.next_id, submission, model, (cache, cuts), root);
                    self.begin(sequence);
                }
                Err(error) => {
                    let _ = submission.events.send(Event::Failed(error.into()));
                    self.ended(Outcome::Failed, None);
                }
            }
        }
    }

    /// A cache of no tokens.
    ///
    /// # Errors
    /// No memory left on the device.
    pub(super) fn empty_cache(&mut self) -> Result<Cache, ModelError> {
        self.spare.take().map_or_else(|| copy(&self.empty), Ok)
    }

    /// Whether prompts are cut in the same places whatever else runs, because products of other shapes round differently.
    pub(super) fn cuts_alike(&self) -> bool {
        self.options.deterministic && !self.model.device().is_cpu()
    }

    /// Restores a saved state on the model's device.
    ///
    /// # Errors
    /// A state of another model, whatever its file says; no memory left on the device.
    pub(super) fn restored(&self, saved: SavedSequence) -> Result<Cache, ModelError> {
        let cache = copy(&self.empty)?;
        catch_unwind(AssertUnwindSafe(|| saved.restore(cache))).unwrap_or_else(|panic| {
            let why = panic_text(&*panic);
            Err(ModelError::Invalid(format!("a saved state cannot be restored: {why}")))
        })
    }

    /// Interrupts all requests.
    fn interrupt_all(&mut self) {
        while !self.sequences.is_empty() {
            self.interrupt(0);
        }
        for waiting in std::mem::take(&mut self.queue) {
            let usage = super::Usage {
                prompt_tokens: waiting.request.prompt.len(),
                seconds: waiting.arrived.elapsed().as_secs_f64(),
                ..Default::default()
            };
            let finish = still_model::Finish::Interrupted;
            let _ = waiting.events.send(Event::Done { finish, text: String::new(), usage });
            self.ended(Outcome::Done, None);
        }
    }

    /// Records the duration of a request.
    pub(super) fn ended(&self, outcome: Outcome, took: Option<Duration>) {
        self.shared.requests.fetch_sub(1, Ordering::Relaxed);
        self.shared.metrics.ended(outcome);
        if let Some(took) = took {
            let before = self.shared.request_ms.load(Ordering::Relaxed);
            let now = usize::try_from(took.as_millis()).unwrap_or(usize::MAX / 8);
            self.shared.request_ms.store((before * 7 + now) / 8, Ordering::Relaxed);
        }
    }

    /// Updates the gauges.
    pub(super) fn tell(&self) {
        let metrics = &self.shared.metrics;
        metrics.running.set(self.sequences.len() as i64);
        metrics.waiting.set(self.queue.len() as i64);
        metrics.states.set(self.memory.len() as i64);
        metrics.state_bytes.set(self.memory.bytes() as i64);
    }
}

/// A deep copy.
///
/// # Errors
/// No memory left on the device.
pub(super) fn copy(cache: &Cache) -> Result<Cache, ModelError> {
    catch_unwind(AssertUnwindSafe(|| cache.clone())).map_err(|panic| {
        let why = panic_text(&*panic);
        ModelError::Invalid(format!("no memory for the cache of one more sequence: {why}"))
    })
}
