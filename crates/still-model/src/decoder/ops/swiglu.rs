//! The gated activation of the MLP.

use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use still_attention::Real;
use still_attention::vector::vectorize;

use super::{slice, values, with_values};

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

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).fast_exp())
}

/// `silu(gate) ⊙ up` of every value.
pub(super) fn forward<T: Real>(gate: &[T], up: &[T]) -> Vec<T> {
    forward_in_place(gate.to_vec(), up)
}

/// [`forward`], in the memory of `gate`.
pub(super) fn forward_in_place<T: Real>(mut gate: Vec<T>, up: &[T]) -> Vec<T> {
    in_place(&mut gate, up);
    gate
}

/// [`forward`], over `gate`.
pub(crate) fn in_place<T: Real>(gate: &mut [T], up: &[T]) {
    gate.par_chunks_mut(BLOCK).zip(up.par_chunks(BLOCK)).for_each(|(gate, up)| {
        vectorize(
            #[inline(always)]
            || {
                for (gate, &up) in gate.iter_mut().zip(up) {
                    *gate = *gate * sigmoid(*gate) * up;
                }
            },
        );
    });
}

/// Gradients of [`forward`]; `dy` becomes that of `up`, that of `gate` is returned.
pub(super) fn backward<T: Real>(gate: &[T], up: &[T], dy: &mut [T]) -> Vec<T> {
    let mut d_gate = vec![T::zero(); gate.len()];
    d_gate
        .par_chunks_mut(BLOCK)
        .zip(dy.par_chunks_mut(BLOCK))
        .zip(gate.par_chunks(BLOCK))
        .zip(up.par_chunks(BLOCK))
        .for_each(|(((d_gate, dy), gate), up)| {
            vectorize(
                #[inline(always)]
                || {
                    for i in 0..gate.len() {
                        let s = sigmoid(gate[i]);
                        d_gate[i] = dy[i] * up[i] * s * (T::one() + gate[i] * (T::one() - s));
                        dy[i] *= gate[i] * s;
                    }
                },
            );
        });
    d_gate
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
        let y = forward(slice::<T>(gate, gate_layout)?, slice::<T>(up, up_layout)?);
        Ok((T::to_cpu_storage_owned(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut d_up = values::<T>(dy)?;
        let d_gate =
            with_values(gate, |gate| with_values(up, |up| backward(gate, up, &mut d_up)))??;
        let tensor = |values| Tensor::from_vec(values, gate.shape(), gate.device());
        Ok((Some(tensor(d_gate)?), Some(tensor(d_up)?)))
    }
}
