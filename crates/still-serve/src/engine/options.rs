//! How an engine runs.

use std::time::Duration;

use still_attention::RowDtype;

use crate::states::StateStore;

/// Tokens of a chunk. Prompts are cut, and states kept, at multiples of it.
pub(crate) const CHUNK: usize = 64;

/// Defaults of [`EngineOptions::prefill_chunk`]: on the CPU, and on a GPU, which reads so many tokens in about the time of a step.
pub(super) const PIECE: usize = 128;
pub(super) const PIECE_ON_DEVICE: usize = 512;

/// How an engine runs.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Dtype of exact rows in caches. If absent: the student's own, or bf16.
    pub rows: Option<RowDtype>,
    /// Most tokens of a prompt and its answer together. If absent: as many as the base was trained for.
    pub context: Option<usize>,
    /// Most requests that run at a time. Each holds a cache.
    pub max_concurrent: usize,
    /// Most requests that wait for a cache. Further ones are refused ([`Refused::Busy`](super::Refused::Busy)).
    pub queue: usize,
    /// Tokens of prompts that are read between two decode steps, rounded up to a multiple of 64. A small number keeps the time
    /// between two tokens short, a large one reads prompts faster. If absent: 128 on the CPU, 512 on a GPU.
    pub prefill_chunk: Option<usize>,
    /// Most bytes of kept states in memory. On a GPU this is the GPU's memory.
    pub state_memory: usize,
    /// A folder or a bucket that keeps states too.
    pub state_store: Option<StateStore>,
    /// Most bytes of this model's states in the store, without those that have names. The oldest make room for new ones.
    pub state_store_bytes: u64,
    /// How long to wait for a state from the store. After that, the prompt is read without it. A store that fails or is too slow is
    /// not asked again for 15 seconds.
    pub state_store_patience: Duration,
    /// Give the same answer, bit for bit, with and without a kept state. Decode steps and prefill round differently, so states
    /// after answers are not continued: the next turn reads the earlier answer again.
    ///
    /// On a GPU, the answer is then also the same alone and in a batch. Prompts are cut, and states kept, only at multiples of
    /// [`prefill_chunk`](Self::prefill_chunk), and every step has the shape of [`max_concurrent`](Self::max_concurrent) sequences.
    pub deterministic: bool,
    /// Longest time that a request waits for a cache.
    pub queue_timeout: Option<Duration>,
    /// Longest time of a request, waiting included.
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
