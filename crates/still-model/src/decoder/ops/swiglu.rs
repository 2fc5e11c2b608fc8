//! The gated activation of the MLP.

use rayon::prelude::*;
use still_compute::Real;
use still_compute::vector::vectorize;

/// Values that one thread takes at a time.
const BLOCK: usize = 16_384;

#[inline(always)]
pub(crate) fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).fast_exp())
}

#[inline(always)]
pub(crate) fn silu<T: Real>(x: T) -> T {
    x * sigmoid(x)
}

/// `silu(gate) ⊙ up` of every value.
pub(super) fn forward<T: Real>(gate: &[T], up: &[T]) -> Vec<T> {
    forward_in_place(gate.to_vec(), up)
}

/// [`forward`], in the memory of `gate`.
pub(super) fn forward_in_place<T: Real>(mut gate: Vec<T>, up: &[T]) -> Vec<T> {
    gate.par_chunks_mut(BLOCK).zip(up.par_chunks(BLOCK)).for_each(|(gate, up)| {
        vectorize(
            #[inline(always)]
            || {
                for (gate, &up) in gate.iter_mut().zip(up) {
                    *gate = silu(*gate) * up;
                }
            },
        );
    });
    gate
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
