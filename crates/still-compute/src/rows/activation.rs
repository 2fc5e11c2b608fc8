//! The gated activation of the MLP.
//!
//! Every activation here is `x · σ(z(x))`: SiLU has `z = x`, GELU's tanh form `z = 2 √(2/π) (x + 0.044715 x³)`. What differs is
//! known when the loops are compiled, so that none pays for the others.

use rayon::prelude::*;

use super::BLOCK;
use crate::real::Real;
use crate::vector::vectorize;

/// The activation of an MLP's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x σ(x)`.
    Silu,
    /// `x Φ(x)`, with `Φ` approximated by tanh.
    GeluTanh,
}

/// `2 √(2/π)` of GELU's tanh form.
pub const GELU_SLOPE: f64 = 1.595_769_121_605_730_7;
/// The weight of the cube in GELU's tanh form.
pub const GELU_CUBE: f64 = 0.044_715;

/// An activation `x σ(z(x))`, known when a loop is compiled.
trait Form {
    /// `z(x)`
    fn inner(x: f32) -> f32;
    /// `z'(x)`
    fn slope(x: f32) -> f32;
}

struct Silu;

impl Form for Silu {
    #[inline(always)]
    fn inner(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn slope(_: f32) -> f32 {
        1.0
    }
}

struct GeluTanh;

impl Form for GeluTanh {
    #[inline(always)]
    fn inner(x: f32) -> f32 {
        GELU_SLOPE as f32 * (x + GELU_CUBE as f32 * x * x * x)
    }

    #[inline(always)]
    fn slope(x: f32) -> f32 {
        GELU_SLOPE as f32 * (1.0 + (3.0 * GELU_CUBE) as f32 * x * x)
    }
}

#[inline(always)]
fn of_one(x: f32) -> f32 {
    1.0 / (1.0 + (-x).fast_exp())
}

/// `y = 1 / (1 + e^{−x})`.
pub fn sigmoid(x: &[f32], y: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || y.iter_mut().zip(x).for_each(|(y, &x)| *y = of_one(x)),
    );
}

/// `gate ← activation(gate) ⊙ up`.
pub fn activate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => apply::<Silu>(gate, up),
        Activation::GeluTanh => apply::<GeluTanh>(gate, up),
    }
}

/// [`activate`].
pub fn par_activate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    gate.par_chunks_mut(BLOCK)
        .zip(up.par_chunks(BLOCK))
        .for_each(|(gate, up)| activate(activation, gate, up));
}

/// Gradients of [`activate`]: `dy` becomes that of `up`, that of `gate` is returned.
pub fn par_activate_backward(
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    dy: &mut [f32],
) -> Vec<f32> {
    let mut d_gate = vec![0.0; gate.len()];
    d_gate
        .par_chunks_mut(BLOCK)
        .zip(dy.par_chunks_mut(BLOCK))
        .zip(gate.par_chunks(BLOCK))
        .zip(up.par_chunks(BLOCK))
        .for_each(|(((d_gate, dy), gate), up)| match activation {
            Activation::Silu => backward::<Silu>(gate, up, d_gate, dy),
            Activation::GeluTanh => backward::<GeluTanh>(gate, up, d_gate, dy),
        });
    d_gate
}

fn apply<F: Form>(gate: &mut [f32], up: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (gate, &up) in gate.iter_mut().zip(up) {
                *gate = *gate * of_one(F::inner(*gate)) * up;
            }
        },
    );
}

fn backward<F: Form>(gate: &[f32], up: &[f32], d_gate: &mut [f32], dy: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for i in 0..gate.len() {
                let s = of_one(F::inner(gate[i]));
                let bent = gate[i] * (1.0 - s) * F::slope(gate[i]);
                d_gate[i] = dy[i] * up[i] * s * (1.0 + bent);
                dy[i] *= gate[i] * s;
            }
        },
    );
}
