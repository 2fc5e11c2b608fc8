//! One token of every sequence: of those of a state, or of sequences that have a state each.

use std::ptr::null;

use candle_core::{DType, Tensor};
use still_compute::cuda::{Launch, StepMemory, on_cuda};
use still_kernels::{Decode, Shape, check, still_decode, still_decode_floats};

use super::super::graph_state::StepRotation;
use super::super::layout::{flags, rows_aligned, shape};
use super::super::{repeated, support};
use super::{CudaWeights, OP};
use crate::arguments::expect_shape;
use crate::{AttentionError, AttentionRows, Result};

/// Where the sequences of a step remember.
pub(in crate::cuda) trait StepState {
    /// As the kernels take it; rows, weights and scratch are left out.
    fn args<'a>(&'a self, launch: &mut Launch<'a>) -> Decode;

    /// Sequences.
    fn batch(&self) -> usize;

    /// Blocks that share a head's store.
    fn splits(&self) -> i32;
}

/// [`StepState::splits`] where so many heads, of all sequences, have stores: a few blocks for every multiprocessor; those that find
/// nothing to do end at once. Codes take longer to arrive in a tile than rows do, so that more blocks are to wait for theirs.
pub(in crate::cuda) fn splits(heads: usize, coded: bool) -> i32 {
    let splits = if coded { (1536 / heads).clamp(4, 48) } else { (1024 / heads).clamp(4, 32) };
    splits as i32
}

/// What a call gives, checked: rows as the kernels need them, K and V for every selection head.
pub(super) struct Fed {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub gate: Option<Tensor>,
}

impl Fed {
    /// One token's rows.
    pub fn token(&self, t: usize) -> candle_core::Result<Self> {
        let row = |x: &Tensor| x.narrow(2, t, 1);
        Ok(Self {
            q: row(&self.q)?,
            k: row(&self.k)?,
            v: row(&self.v)?,
            gate: self.gate.as_ref().map(row).transpose()?,
        })
    }
}

impl CudaWeights {
    /// Checks what a call gives `batch` sequences.
    pub(super) fn fed(
        &self,
        AttentionRows { q, k, v, gate }: AttentionRows<'_>,
        batch: usize,
    ) -> Result<Fed> {
        if self.config.gate != gate.is_some() {
            return Err(AttentionError::Config(format!(
                "the output gate is {}, its value was {}",
                if self.config.gate { "on" } else { "off" },
                if gate.is_some() { "given" } else { "not given" },
            )));
        }
        if let Some(gate) = gate {
            expect_shape(OP, "gate", gate, q.dims())?;
            support::check_gate(q, Some(gate))?;
        }
        let device = self.map_q.device();
        support::check_fed(OP, [q, k, v], self.geometry, batch, self.dtype, device)?;
        let shared = self.heads() / self.geometry.num_key_value_heads;
        let (k, v) = (repeated(k, shared)?, repeated(v, shared)?);
        Ok(Fed {
            q: rows_aligned(q)?,
            k: rows_aligned(&k)?,
            v: rows_aligned(&v)?,
            gate: gate.map(rows_aligned).transpose()?,
        })
    }

    /// [`GraphStep::step`](crate::GraphStep::step) of the sequences of `state`.
    ///
    /// # Safety
    /// As there.
    pub(in crate::cuda) unsafe fn step(
        &self,
        state: &dyn StepState,
        rows: AttentionRows<'_>,
        positions: &Tensor,
        rotation: Option<StepRotation<'_>>,
        memory: &StepMemory,
    ) -> Result<Tensor> {
        let sequences = state.batch();
        let fed = self.fed(rows, sequences)?;
        let (batch, heads, _, d) = fed.q.dims4()?;
        expect_shape(OP, "q", &fed.q, &[batch, heads, 1, d])?;
        expect_shape(OP, "positions", positions, &[sequences])?;
        support::require(positions.dtype() == DType::U32, "positions", "u32", || {
            positions.dtype().as_str().into()
        })?;
        if let Some(rotation) = rotation {
            support::check_rotation(rotation, batch, d)?;
        }
        let out = memory.tensor(("attention", 0), fed.q.shape(), fed.q.dtype(), fed.q.device())?;
        self.queue(state, &fed, &out, positions, rotation, memory)?;
        Ok(out)
    }

    /// Queues one token of each sequence, at `positions` `[B]` u32, into `out`; `rotation`: what `q` and `k` go through first;
    /// `memory`: where blocks leave their results.
    pub(super) fn queue(
        &self,
        state: &dyn StepState,
        fed: &Fed,
        out: &Tensor,
        positions: &Tensor,
        rotation: Option<StepRotation<'_>>,
        memory: &StepMemory,
    ) -> candle_core::Result<()> {
        let Fed { q, k, v, gate } = fed;
        let shape: Shape = shape(q, self.heads(), flags(&self.config))?;
        // SAFETY: only reads the shape.
        let floats = unsafe { still_decode_floats(&shape, state.splits()) };
        let floats = usize::try_from(floats).map_err(candle_core::Error::wrap)?;
        let partial = memory.tensor(("partial results", 0), floats, DType::F32, q.device())?;
        let held_partial = partial.storage_and_layout();
        let stream = self.device.cuda_stream();
        let held = [q, k, v, out].map(Tensor::storage_and_layout);
        let held_gate = gate.as_ref().map(Tensor::storage_and_layout);
        let held_weights = [&self.map_q, &self.map_k, positions].map(Tensor::storage_and_layout);
        let held_scale = self.log_scale.as_ref().map(Tensor::storage_and_layout);
        let angles = match rotation {
            Some(StepRotation { cos, sin }) => Some([cos.contiguous()?, sin.contiguous()?]),
            None => None,
        };
        let rotary =
            angles.as_ref().map_or(0, |[cos, _]| 2 * cos.elem_count() / shape.batch as usize);
        let held_angles =
            angles.as_ref().map(|both| both.each_ref().map(Tensor::storage_and_layout));
        let mut launch = Launch::new(&stream)?;
        let [q, k, v, out] = &held;
        let [map_q, map_k, positions] = &held_weights;
        let [cos, sin] = match &held_angles {
            Some([cos, sin]) => [
                launch.values::<f32>(on_cuda(&cos.0)?, cos.1)?.cast_const(),
                launch.values::<f32>(on_cuda(&sin.0)?, sin.1)?.cast_const(),
            ],
            None => [null(), null()],
        };
        let args = Decode {
            q: launch.rows(on_cuda(&q.0)?, q.1)?,
            k: launch.rows(on_cuda(&k.0)?, k.1)?,
            v: launch.rows(on_cuda(&v.0)?, v.1)?,
            out: launch.rows(on_cuda(&out.0)?, out.1)?,
            w_q: launch.values(on_cuda(&map_q.0)?, map_q.1)?,
            w_k: launch.values(on_cuda(&map_k.0)?, map_k.1)?,
            log_scale: launch.optional_values(&held_scale)?,
            positions: launch.values(on_cuda(&positions.0)?, positions.1)?,
            partial: launch.values(on_cuda(&held_partial.0)?, held_partial.1)?,
            gate: launch.optional_rows(&held_gate)?,
            cos,
            sin,
            rotary: rotary as i32,
            ..state.args(&mut launch)
        };
        // SAFETY: the buffers are as large as still.h says for `shape`, the store has room for `positions`, and all live
        // until the launch is dropped.
        let code = unsafe { still_decode(&shape, &args, launch.stream()) };
        check("still_decode", code).map_err(candle_core::Error::wrap)
    }
}
