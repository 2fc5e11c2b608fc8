//! The gated activation of the MLP.

use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use still_attention::Real;

use super::{slice, values};

/// Values that one thread takes at a time.
const BLOCK: usize = 16_384;

/// `silu(gate) ⊙ up`, same shapes; differentiable in both.
///
/// # Errors
/// Shapes that differ, a dtype other than f32 and f64.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    match gate.dtype() {
        DType::F32 => gate.apply_op2(&up, SwiGlu::<f32>(PhantomData)),
        DType::F64 => gate.apply_op2(&up, SwiGlu::<f64>(PhantomData)),
        other => candle_core::bail!("swiglu: no kernel for {other:?}, expected f32 or f64"),
    }
}

struct SwiGlu<T>(PhantomData<fn() -> T>);

fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).fast_exp())
}

impl<T: Real> CustomOp2 for SwiGlu<T> {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if gate_layout.dims() != up_layout.dims() {
            candle_core::bail!("swiglu: {:?} and {:?}", gate_layout.dims(), up_layout.dims())
        }
        let (gate, up) = (slice::<T>(gate, gate_layout)?, slice::<T>(up, up_layout)?);
        let mut y = vec![T::zero(); gate.len()];
        y.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK)).for_each(
            |((y, gate), up)| {
                for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
                    *y = gate * sigmoid(gate) * up;
                }
            },
        );
        Ok((T::to_cpu_storage_owned(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (gates, ups, dys) = (values::<T>(gate)?, values::<T>(up)?, values::<T>(dy)?);
        let mut d_gate = vec![T::zero(); gates.len()];
        let mut d_up = vec![T::zero(); gates.len()];
        d_gate
            .par_chunks_mut(BLOCK)
            .zip(d_up.par_chunks_mut(BLOCK))
            .zip(gates.par_chunks(BLOCK))
            .zip(ups.par_chunks(BLOCK))
            .zip(dys.par_chunks(BLOCK))
            .for_each(|((((d_gate, d_up), gate), up), dy)| {
                for i in 0..gate.len() {
                    let s = sigmoid(gate[i]);
                    d_up[i] = dy[i] * gate[i] * s;
                    d_gate[i] = dy[i] * up[i] * s * (T::one() + gate[i] * (T::one() - s));
                }
            });
        let tensor = |values| Tensor::from_vec(values, gate.shape(), gate.device());
        Ok((Some(tensor(d_gate)?), Some(tensor(d_up)?)))
    }
}
