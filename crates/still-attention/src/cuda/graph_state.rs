//! States that CUDA graphs feed.

use candle_core::Tensor;
use still_compute::cuda::StepMemory;

use super::step_table::TableState;
use crate::{AttentionRows, AttentionState, Result};

/// The position of a sequence that sits a [`step`](GraphState::step) out: to the kernels it is negative.
pub const IDLE: u32 = u32::MAX;

/// What a step rotates queries and keys by.
#[derive(Clone, Copy, Debug)]
pub struct StepRotation<'a> {
    /// Cosines, `B · rotary / 2` f32 values: of the first `rotary` channels of a head, half rotation.
    pub cos: &'a Tensor,
    /// Sines.
    pub sin: &'a Tensor,
}

/// A state whose kernels read all lengths on the device, so that a step of one token a sequence can be captured in a CUDA graph
/// and replayed.
pub trait GraphState: AttentionState {
    /// Queues one token of each sequence without looking at [`position`](AttentionState::position): nothing is uploaded and no
    /// memory moves. `rows` as [`advance`](AttentionState::advance) takes them, of one token; `positions` `[B]` u32 on the device,
    /// [`IDLE`] for a sequence that sits the step out, whose output is not written.
    ///
    /// `rotation`: RoPE that `q` and `k` have yet to go through; only of a state that [rotates](Self::rotates). `memory`: where the
    /// output lies, and what the kernels need besides; layers that share it take turns.
    ///
    /// The caller [counts](Self::count) the step.
    ///
    /// # Errors
    /// As [`advance`](AttentionState::advance); a rotation by a state that does not rotate.
    ///
    /// # Safety
    /// The positions are those of the sequences' next tokens whenever the step runs, and room for them was
    /// [made](Self::reserve) before.
    unsafe fn step(
        &self,
        rows: AttentionRows<'_>,
        positions: &Tensor,
        rotation: Option<StepRotation<'_>>,
        memory: &StepMemory,
    ) -> Result<Tensor>;

    /// Whether a step can rotate the first `rotary` channels of queries and keys.
    fn rotates(&self, rotary: usize) -> bool {
        let _ = rotary;
        false
    }

    /// How often memory has moved to make room.
    fn moves(&self) -> usize;

    /// Another number than when a [`step`](Self::step) was captured says that the capture is stale.
    fn generation(&self) -> usize {
        self.moves()
    }

    /// Makes room for sequences of `tokens` tokens.
    ///
    /// # Errors
    /// No memory left on the device.
    fn reserve(&mut self, tokens: usize) -> Result<()>;

    /// Counts one token more of each sequence, fed by [`step`](Self::step) or by that of a table.
    fn count(&mut self);

    /// The state as a [`StepTable`](crate::StepTable) takes it.
    fn in_table(&self) -> TableState<'_>;
}
