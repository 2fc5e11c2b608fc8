//! The gated activation of the MLP.
//!
//! Every activation here is `x · σ(z(x))`: SiLU has `z = x`, GELU's tanh form `z = 2 √(2/π) (x + 0.044715 x³)`. What differs is
//! known when the loops are compiled, so that none pays for the others.

use rayon::prelude::*;
use still_compute::Real;
use still_compute::vector::vectorize;

use crate::config::Activation;

/// Values that one thread takes at a time.
const BLOCK: usize = 16_384;

/// `2 √(2/π)` and the weight of the cube in GELU's tanh form.
pub(super) const GELU_SLOPE: f64 = 1.595_769_121_605_730_7;
pub(super) const GELU_CUBE: f64 = 0.044_715;

/// An activation `x σ(z(x))`, known when a loop is compiled.
trait Form {
    /// `z(x)`
    fn inner<T: Real>(x: T) -> T;
    /// `z'(x)`
    fn slope<T: Real>(x: T) -> T;
}

struct Silu;

impl Form for Silu {
    #[inline(always)]
    fn inner<T: Real>(x: T) -> T {
        x
    }

    #[inline(always)]
    fn slope<T: Real>(_: T) -> T {
        T::one()
    }
}

struct GeluTanh;

impl Form for GeluTanh {
    #[inline(always)]
    fn inner<T: Real>(x: T) -> T {
        T::of(GELU_SLOPE) * (x + T::of(GELU_CUBE) * x * x * x)
    }

    #[inline(always)]
    fn slope<T: Real>(x: T) -> T {
        T::of(GELU_SLOPE) * (T::one() + T::of(3.0 * GELU_CUBE) * x * x)
    }
}

#[inline(always)]
pub(crate) fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).fast_exp())
}

impl Activation {
    /// `gate ← activation(gate) ⊙ up`, on this thread.
    pub(crate) fn apply<T: Real>(self, gate: &mut [T], up: &[T]) {
        match self {
            Self::Silu => apply::<T, Silu>(gate, up),
            Self::GeluTanh => apply::<T, GeluTanh>(gate, up),
        }
    }

    /// Gradients of [`Activation::apply`] on this thread: `d_gate` is written, `dy` becomes that of `up`.
    fn pull_back<T: Real>(self, gate: &[T], up: &[T], d_gate: &mut [T], dy: &mut [T]) {
        match self {
            Self::Silu => pull_back::<T, Silu>(gate, up, d_gate, dy),
            Self::GeluTanh => pull_back::<T, GeluTanh>(gate, up, d_gate, dy),
        }
    }
}

fn apply<T: Real, F: Form>(gate: &mut [T], up: &[T]) {
    vectorize(
        #[inline(always)]
        || {
            for (gate, &up) in gate.iter_mut().zip(up) {
                *gate = *gate * sigmoid(F::inner(*gate)) * up;
            }
        },
    );
}

fn pull_back<T: Real, F: Form>(gate: &[T], up: &[T], d_gate: &mut [T], dy: &mut [T]) {
    vectorize(
        #[inline(always)]
        || {
            for i in 0..gate.len() {
                let s = sigmoid(F::inner(gate[i]));
                let bent = gate[i] * (T::one() - s) * F::slope(gate[i]);
                d_gate[i] = dy[i] * up[i] * s * (T::one() + bent);
                dy[i] *= gate[i] * s;
            }
        },
    );
}

/// `activation(gate) ⊙ up` of every value.
pub(super) fn forward<T: Real>(activation: Activation, gate: &[T], up: &[T]) -> Vec<T> {
    forward_in_place(activation, gate.to_vec(), up)
}

/// [`forward`], in the memory of `gate`.
pub(super) fn forward_in_place<T: Real>(
    activation: Activation,
    mut gate: Vec<T>,
    up: &[T],
) -> Vec<T> {
    gate.par_chunks_mut(BLOCK)
        .zip(up.par_chunks(BLOCK))
        .for_each(|(gate, up)| activation.apply(gate, up));
    gate
}

/// Gradients of [`forward`]; `dy` becomes that of `up`, that of `gate` is returned.
pub(super) fn backward<T: Real>(
    activation: Activation,
    gate: &[T],
    up: &[T],
    dy: &mut [T],
) -> Vec<T> {
    let mut d_gate = vec![T::zero(); gate.len()];
    d_gate
        .par_chunks_mut(BLOCK)
        .zip(dy.par_chunks_mut(BLOCK))
        .zip(gate.par_chunks(BLOCK))
        .zip(up.par_chunks(BLOCK))
        .for_each(|(((d_gate, dy), gate), up)| activation.pull_back(gate, up, d_gate, dy));
    d_gate
}
