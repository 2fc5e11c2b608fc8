//! What a layer's attention remembers of a batch of sequences, whatever kind of attention it is and wherever it lives.
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

/// Which attention a state belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKind {
    /// Softmax attention to every earlier token.
    Dense,
    /// Softmax attention to a window of the last tokens.
    Sliding {
        /// Tokens of the window, each token's own among them.
        window: usize,
    },
    /// Salient tokens and a window exactly, the rest through a linear state.
    Hybrid,
}

/// One layer's memory of a batch of sequences.
pub trait AttentionState: Debug + Send + Sync {
    /// Feeds `T` tokens more to each sequence and returns their attention output, `[B, H, T, D]`. Any split of a sequence into
    /// calls gives the same output and state.
    ///
    /// `lengths`: valid tokens of each sequence (right padding is ignored; its output rows are 0); all `T` if absent.
    ///
    /// # Errors
    /// Shapes that contradict the state; a dtype or device that it has no kernel for.
    fn advance(&mut self, rows: AttentionRows<'_>, lengths: Option<&[usize]>) -> Result<Tensor>;

    /// [`advance`](Self::advance), of one layer of several that take turns in `scratch`.
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

    /// Which attention it belongs to.
    fn kind(&self) -> AttentionKind;

    /// Where it lives.
    fn location(&self) -> DeviceLocation;

    /// Tokens fed to a sequence so far.
    fn position(&self, sequence: usize) -> usize;

    /// Bytes held for all sequences, with the room to grow into.
    fn size_bytes(&self) -> usize;

    /// The bytes of [`size_bytes`](Self::size_bytes) by what they hold, of a state on the host.
    fn bytes_by_part(&self) -> Option<StateBytes> {
        None
    }

    /// Bytes of what is remembered, without the room to grow into where the state knows how much that is.
    fn used_bytes(&self) -> usize {
        self.size_bytes()
    }

    /// Whether [`truncate`](Self::truncate) can forget all tokens of a sequence but the first `tokens`.
    ///
    /// Dense attention can go back to any number. Hybrid attention can go back within the chunk of the last token, because earlier
    /// chunks have retired from it, and to nothing at all.
    ///
    /// # Errors
    /// More tokens than there are; fewer than the state can go back to.
    fn check_truncate(&self, sequence: usize, tokens: usize) -> Result<()>;

    /// Forgets all tokens of a sequence but the first `tokens`.
    ///
    /// # Errors
    /// Those of [`check_truncate`](Self::check_truncate); nothing is forgotten then.
    fn truncate(&mut self, sequence: usize, tokens: usize) -> Result<()>;

    /// All that the state remembers, as tensors on the host: the same wherever the state lives.
    ///
    /// # Errors
    /// An error of the tensor library or the device.
    fn save(&self) -> Result<SavedState>;

    /// Remembers what a state of the same shape and row format has saved, here or on another device, in place of what it did.
    ///
    /// # Errors
    /// Tensors of another state or format; this state is then to be thrown away.
    fn restore(&mut self, saved: SavedState) -> Result<()>;

    /// A copy with memory of its own.
    fn boxed_clone(&self) -> Box<dyn AttentionState>;

    /// The state as the host has it, if it lies in the host's memory.
    fn on_host(&self) -> Option<&dyn HostState> {
        None
    }

    /// The state as a CUDA graph feeds it single tokens, if it can.
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

/// A state in the host's memory. Its parts know nothing of each other, so that threads can share a decode step: there is one for
/// every sequence and selection head (dense attention: KV head), in that order.
pub trait HostState: Sync {
    /// How many parts there are.
    fn parts(&self) -> usize;

    /// Pieces that a part's next token can attend to beforehand, each on a thread of its own: none where they are not worth it.
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

    /// Feeds one token to a part, which no other thread has meanwhile: `out` is `[query heads, D]`.
    ///
    /// # Panics
    /// If there is no such part, or slices are too short for their layout.
    fn decode(&self, part: usize, rows: HeadRows<'_>, scratch: &mut HeadScratch, out: &mut [f32]);
}

/// What one head remembers, for the thread that feeds it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error that says how far a state can go back.
pub(crate) fn cannot_truncate(tokens: usize, why: &str) -> AttentionError {
    AttentionError::Config(format!("a state cannot go back to {tokens} tokens: {why}"))
}

/// An error if there is a gate, which only hybrid attention on the host computes.
pub(crate) fn without_gate(rows: &AttentionRows<'_>) -> Result<()> {
    match rows.gate {
        None => Ok(()),
        Some(_) => Err(AttentionError::Config("this attention has no output gate".into())),
    }
}

/// An error unless hybrid attention that has read `position` tokens can go back to the first `tokens`.
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
