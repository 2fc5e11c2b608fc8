//! States that CUDA graphs feed.

use candle_core::Tensor;

use super::{CudaHybridState, CudaKvCache};
use crate::{AttentionState, Result};

/// The position of a sequence that sits a [`step`](GraphState::step) out: to the kernels it is negative.
pub const IDLE: u32 = u32::MAX;

/// A state whose kernels read all lengths on the device, so that a step of one token a sequence can be captured in a CUDA graph
/// and replayed.
pub trait GraphState: AttentionState {
    /// Queues one token of each sequence without looking at [`position`](AttentionState::position): nothing is uploaded and no
    /// memory moves. `q` `[B, H, 1, D]`, `k`, `v` `[B, K, 1, D]`: of the rows' dtype, on the state's device; `positions` `[B]` u32 on
    /// the device, [`IDLE`] for a sequence that sits the step out, whose output is not written.
    ///
    /// The caller [counts](Self::count) the step.
    ///
    /// # Errors
    /// As [`advance`](AttentionState::advance).
    ///
    /// # Safety
    /// The positions are those of the sequences' next tokens whenever the step runs, and room for them was
    /// [made](Self::reserve) before.
    unsafe fn step(&self, q: &Tensor, k: &Tensor, v: &Tensor, positions: &Tensor)
    -> Result<Tensor>;

    /// How often memory has moved to make room: a [`step`](Self::step) that was captured before is stale.
    fn moves(&self) -> usize;

    /// Makes room for sequences of `tokens` tokens.
    ///
    /// # Errors
    /// No memory left on the device.
    fn reserve(&mut self, tokens: usize) -> Result<()>;

    /// Counts one token more of each sequence, fed by [`step`](Self::step).
    fn count(&mut self);
}

/// [`GraphState`] by a state's own methods of the same names.
macro_rules! graph_state {
    ($state:ty) => {
        impl GraphState for $state {
            unsafe fn step(
                &self,
                q: &Tensor,
                k: &Tensor,
                v: &Tensor,
                positions: &Tensor,
            ) -> Result<Tensor> {
                // SAFETY: the caller's.
                unsafe { <$state>::step(self, q, k, v, positions) }
            }

            fn moves(&self) -> usize {
                <$state>::moves(self)
            }

            fn reserve(&mut self, tokens: usize) -> Result<()> {
                <$state>::reserve(self, tokens)
            }

            fn count(&mut self) {
                <$state>::count(self);
            }
        }
    };
}

graph_state!(CudaHybridState);
graph_state!(CudaKvCache);
