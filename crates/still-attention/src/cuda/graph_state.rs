//! States that CUDA graphs feed.

use candle_core::Tensor;
use still_compute::cuda::StepMemory;

use super::step_table::TableState;
use crate::{AttentionRows, AttentionState, Result};

/// The position of a sequence that sits a [`step`](GraphStep::step) out: to the kernels it is negative.
pub const IDLE: u32 = u32::MAX;

/// What a step rotates queries and keys by.
#[derive(Clone, Copy, Debug)]
pub struct StepRotation<'a> {
    /// Cosines, `B · rotary / 2` f32 values: of the first `rotary` channels of a head, half rotation.
    pub cos: &'a Tensor,
    /// Sines.
    pub sin: &'a Tensor,
}

/// The steps of one layer, of one token a sequence, as a CUDA graph captures and replays them: those of a [`GraphState`], or of a
/// [`StepTable`](crate::StepTable) of states.
pub trait GraphStep {
    /// Queues one token of each sequence without looking at [`position`](AttentionState::position): nothing is uploaded and no
    /// memory moves. `rows` as [`advance`](AttentionState::advance) takes them, of one token; `positions` `[B]` u32 on the device,
    /// [`IDLE`] for a sequence that sits the step out, whose output is not written.
    ///
    /// `rotation`: RoPE that `q` and `k` have yet to go through; only where the step [rotates](Self::rotates). `memory`: where the
    /// output lies, and what the kernels need besides; layers that share it take turns.
    ///
    /// The caller [counts](GraphState::count) the step.
    ///
    /// # Errors
    /// As [`advance`](AttentionState::advance); a rotation where the step does not rotate.
    ///
    /// # Safety
    /// The positions are those of the sequences' next tokens whenever the step runs, and room for them was
    /// [made](GraphState::reserve) before. The states of all rows of a table that are not idle are in it by then.
    unsafe fn step(
        &self,
        rows: AttentionRows<'_>,
        positions: &Tensor,
        rotation: Option<StepRotation<'_>>,
        memory: &StepMemory,
    ) -> Result<Tensor>;

    /// Whether a step can rotate the first `rotary` channels of queries and keys.
    fn rotates(&self, rotary: usize) -> bool;

    /// Another number than when a [`step`](Self::step) was captured says that the capture is stale. It only grows.
    fn generation(&self) -> usize;
}

/// A state whose kernels read all lengths on the device, so that a step of one token a sequence can be captured in a CUDA graph
/// and replayed.
pub trait GraphState: AttentionState + GraphStep {
    /// How often memory has moved to make room.
    fn moves(&self) -> usize;

    /// Makes room for sequences of `tokens` tokens.
    ///
    /// # Errors
    /// No memory left on the device.
    fn reserve(&mut self, tokens: usize) -> Result<()>;

    /// Counts one token more of each sequence, fed by [`step`](GraphStep::step) of the state or of a table.
    fn count(&mut self);

    /// The state as a [`StepTable`](crate::StepTable) takes it.
    fn in_table(&self) -> TableState<'_>;
}
