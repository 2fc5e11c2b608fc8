//! How an engine runs.

use std::time::Duration;

use still_attention::RowDtype;

use crate::states::StateStore;

/// Tokens of a chunk: prompts are cut, and states kept, at multiples of it.
pub(crate) const CHUNK: usize = 64;

/// [`EngineOptions::prefill_chunk`] where nobody says: on the CPU, and on a GPU, which reads so many about as fast as it takes a step.
pub(super) const PIECE: usize = 128;
pub(super) const PIECE_ON_DEVICE: usize = 512;

/// How an engine runs.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// How caches store exact rows; as the model says, or bf16, if absent.
    pub rows: Option<RowDtype>,
    /// The most tokens of a prompt and its continuation; as many as the base was trained for if absent.
    pub context: Option<usize>,
    /// Requests that are read and continued at a time: each holds a cache.
    pub max_concurrent: usize,
    /// Requests that wait for one of these to end; more are refused.
    pub queue: usize,
    /// Tokens of a prompt that are read between two decode steps, rounded up to a multiple of 64. Less keeps the time between two
    /// tokens short, more reads prompts faster. Absent: 128 on the CPU, 512 on a GPU.
    pub prefill_chunk: Option<usize>,
    /// Bytes of states that are kept in memory: the device's, on a GPU.
    pub state_memory: usize,
    /// Where states are kept besides.
    pub state_store: Option<StateStore>,
    /// Bytes of states that the store may hold of this model, without those that have names; the oldest make room for new ones.
    pub state_store_bytes: u64,
    /// How long the store may take to give a state, before the prompt is read as if there were none. A store that fails or is too
    /// slow is left alone for 15 seconds.
    pub state_store_patience: Duration,
    /// Whether an answer is the same, bit for bit, from a kept state and without. Decode steps and prefill round differently. So
    /// states after answers are not continued then: an earlier answer is read again with the turn that follows it.
    ///
    /// On a GPU it is then also the same alone and among others: prompts are cut at multiples of [`prefill_chunk`](Self::prefill_chunk)
    /// and states kept there alone, and every step has the shape of one of [`max_concurrent`](Self::max_concurrent) sequences.
    pub deterministic: bool,
    /// How long a request may wait for its turn.
    pub queue_timeout: Option<Duration>,
    /// How long a request may take in all.
    pub request_timeout: Option<Duration>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            rows: None,
            context: None,
            max_concurrent: 32,
            queue: 256,
            prefill_chunk: None,
            state_memory: 4 << 30,
            state_store: None,
            state_store_bytes: 64 << 30,
            state_store_patience: Duration::from_secs(10),
            deterministic: false,
            queue_timeout: None,
            request_timeout: None,
        }
    }
}
