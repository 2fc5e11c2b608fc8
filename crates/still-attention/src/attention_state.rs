//! The attention state of a layer, for every kind of attention and every device.
//!
//! | state | attention | memory |
//! |---|---|---|
//! | [`crate::KvCache`] | dense | host |
//! | [`crate::SlidingKvCache`] | dense, to a window of the last tokens | host |
//! | [`crate::HybridState`] | hybrid | host |
//! | `CudaKvCache` | dense | CUDA |
//! | `CudaHybridState` | hybrid | CUDA |
//! | `CudaLinearState` | linear alone | CUDA |

use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DeviceLocation, Tensor};
#[cfg(feature = "cuda")]
use still_compute::cuda::PassScratch;

#[cfg(feature = "cuda")]
use crate::GraphState;
use crate::{
    AttentionError, HeadRows, HeadScratch, HybridConfig, Mode, Result, Router, SavedState,
    StateBytes,
};

/// New rows of every sequence, after RoPE.
#[derive(Clone, Copy, Debug)]
pub struct AttentionRows<'a> {
    /// `[B, H, T, D]`
    pub q: &'a Tensor,
    /// `[B, K, T, D]`
    pub k: &'a Tensor,
    /// `[B, K, T, D]`
    pub v: &'a Tensor,
    /// The output gate, `[B, H, T, D]`, of hybrid attention that has one.
    pub gate: Option<&'a Tensor>,
}

/// The kind of attention of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKind {
    /// Softmax attention to every earlier token.
    Dense,
    /// Softmax attention to a window of the last tokens.
    Sliding {
        /// Tokens of the window, each token's own among them.
        window: usize,
    },
    /// Exact attention to salient tokens and a window, and a linear state for all others.
    Hybrid,
}

/// The attention state of one layer, for a batch of sequences: a dense cache, a sliding window, or a hybrid state.
pub trait AttentionState: Debug + Send + Sync {
    /// Feeds `T` tokens more to each sequence and returns their attention output, `[B, H, T, D]`. Any split of a sequence into
    /// calls gives the same output and state.
    ///
    /// `lengths`: valid tokens of each sequence (right padding is ignored; its output rows are 0); all `T` if absent.
    ///
    /// # Errors
    /// Shapes that do not fit the state; a dtype or device without a kernel.
    fn advance(&mut self, rows: AttentionRows<'_>, lengths: Option<&[usize]>) -> Result<Tensor>;

    /// [`advance`](Self::advance) with scratch memory that a model's layers share.
    ///
    /// # Errors
    /// As there.
    #[cfg(feature = "cuda")]
    fn advance_in(
        &mut self,
        rows: AttentionRows<'_>,
        lengths: Option<&[usize]>,
        scratch: &PassScratch,
    ) -> Result<Tensor> {
        let _ = scratch;
        self.advance(rows, lengths)
    }

    /// The kind of attention.
    fn kind(&self) -> AttentionKind;

    /// The device that holds it.
    fn location(&self) -> DeviceLocation;

    /// Tokens fed to a sequence so far.
    fn position(&self, sequence: usize) -> usize;

    /// Allocated bytes of all sequences.
    fn size_bytes(&self) -> usize;

    /// The bytes of [`size_bytes`](Self::size_bytes) by content, for a state on the host.
    fn bytes_by_part(&self) -> Option<StateBytes> {
        None
    }

    /// Bytes in use: allocated bytes less the room to grow into, if the state knows it.
    fn used_bytes(&self) -> usize {
        self.size_bytes()
    }

    /// Checks that [`truncate`](Self::truncate) can cut a sequence back to its first `tokens` tokens.
    ///
    /// Dense attention can go back to any number. Hybrid attention can go back within the chunk of the last token, because that
    /// chunk's arrival retired an earlier one, and to 0.
    ///
    /// # Errors
    /// More tokens than there are; fewer than the state can go back to.
    fn check_truncate(&self, sequence: usize, tokens: usize) -> Result<()>;

    /// Cuts a sequence back to its first `tokens` tokens.
    ///
    /// # Errors
    /// Those of [`check_truncate`](Self::check_truncate). The state is unchanged then.
    fn truncate(&mut self, sequence: usize, tokens: usize) -> Result<()>;

    /// The whole state as tensors on the host, the same for every device.
    ///
    /// # Errors
    /// An error of the tensor library or the device.
    fn save(&self) -> Result<SavedState>;

    /// Replaces the state by one that a state of the same shape and row format saved, on this or another device.
    ///
    /// # Errors
    /// Tensors of another state or format. Drop this state then.
    fn restore(&mut self, saved: SavedState) -> Result<()>;

    /// A copy with memory of its own.
    fn boxed_clone(&self) -> Box<dyn AttentionState>;

    /// The interface for threads that share a decode step, if the state is in the host's memory.
    fn on_host(&self) -> Option<&dyn HostState> {
        None
    }

    /// The interface for a captured decode step, if the state has one.
    #[cfg(feature = "cuda")]
    fn in_graph(&mut self) -> Option<&mut dyn GraphState> {
        None
    }
}

impl Clone for Box<dyn AttentionState> {
    fn clone(&self) -> Self {
        self.boxed_clone()
    }
}

/// A state in the host's memory whose parts threads can feed side by side. There is one part for every sequence and selection
/// head (with dense attention: KV head), in that order.
pub trait HostState: Sync {
    /// Number of parts.
    fn parts(&self) -> usize;

    /// Number of pieces of a part's keys that threads can attend to before the part is fed; 0 if the part has too few keys.
    fn pieces(&self, part: usize) -> usize {
        let _ = part;
        0
    }

    /// Attends to one of a part's [`pieces`](Self::pieces) with the next token's queries `q`, `[query heads, D]`. `to`,
    /// `[query heads, D + 2]`, is for [`HeadRows::beforehand`].
    ///
    /// # Panics
    /// If there is no such piece, or slices are too short for their layout.
    fn attend_piece(
        &self,
        part: usize,
        piece: usize,
        q: &[f32],
        scratch: &mut HeadScratch,
        to: &mut [f32],
    ) {
        let _ = (q, scratch, to);
        panic!("part {part} has no piece {piece}");
    }

    /// Feeds one token to a part. `out` is `[query heads, D]`. No other thread may use the part meanwhile.
    ///
    /// # Panics
    /// If there is no such part, or slices are too short for their layout.
    fn decode(&self, part: usize, rows: HeadRows<'_>, scratch: &mut HeadScratch, out: &mut [f32]);
}

/// Locks one head's state for the thread that feeds it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The error of a state that cannot go back so far.
pub(crate) fn cannot_truncate(tokens: usize, why: &str) -> AttentionError {
    AttentionError::Config(format!("a state cannot go back to {tokens} tokens: {why}"))
}

/// Refuses a gate: only hybrid attention on the host has one.
pub(crate) fn without_gate(rows: &AttentionRows<'_>) -> Result<()> {
    match rows.gate {
        None => Ok(()),
        Some(_) => Err(AttentionError::Config("this attention has no output gate".into())),
    }
}

/// Checks that hybrid attention that has read `position` tokens can go back to the first `tokens`.
pub(crate) fn check_truncate(config: &HybridConfig, position: usize, tokens: usize) -> Result<()> {
    if tokens > position {
        return Err(cannot_truncate(tokens, &format!("it has {position}")));
    }
    if tokens == 0 || tokens == position {
        return Ok(());
    }
    if config.mode == Mode::LinearOnly || config.router == Router::ReceivedAttention {
        let why = "its last tokens have changed what it remembers of earlier ones";
        return Err(cannot_truncate(tokens, why));
    }
    match (position - 1) / config.chunk * config.chunk + 1 {
        least if tokens < least => {
            Err(cannot_truncate(tokens, &format!("it can go back to {least}, or to 0")))
        }
        _ => Ok(()),
    }
}
