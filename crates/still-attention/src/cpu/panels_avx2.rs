//! [`PanelKeys::attend`] of f32 panels in AVX2.

use pulp::x86::V3;
use pulp::{Simd, WithSimd};

use super::{PanelKeys, Softmax};
use crate::cpu::key_store::TILE;
use still_compute::{Real, vector};

/// Queries whose sums with a panel fill the registers.
const ROWS: usize = 6;
/// Vectors of a panel's keys.
const VECTORS: usize = 2;

/// Queries, and keys, that are worked on together, and keys that all queries meet before the next ones.
const STRIP: usize = 4 * ROWS;
const BLOCK: usize = 4 * TILE;
const SPAN: usize = 16 * BLOCK;

/// Runs the body for so many rows, as a constant.
macro_rules! rows {
    ($rows:expr, $constant:ident => $body:expr) => {
        rows!($rows, $constant => $body, 1 2 3 4 5 6)
    };
    ($rows:expr, $constant:ident => $body:expr, $($number:literal)*) => {
        match $rows {
            $($number => {
                const $constant: usize = $number;
                $body
            })*
            rows => unreachable!("{rows} rows at a time"),
        }
    };
}

/// See [`PanelKeys::attend`].
pub fn attend(
    simd: V3,
    panels: &[[f32; TILE]],
    keys: &PanelKeys<'_>,
    q: &[f32],
    softmax: Softmax<'_, f32>,
) {
    Simd::vectorize(simd, Attend { panels, v: keys.v, d: keys.head_dim, q, softmax });
}

struct Attend<'a> {
    panels: &'a [[f32; TILE]],
    v: &'a [f32],
    d: usize,
    q: &'a [f32],
    softmax: Softmax<'a, f32>,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        const { assert!(S::F32_LANES * VECTORS == TILE) };
        let Self { panels, v, d, q, softmax } = self;
        let count = v.len() / d;
        let mut logits = [[0.0_f32; BLOCK]; STRIP];
        for span in (0..count).step_by(SPAN) {
            let strips = q.chunks(STRIP * d).zip(softmax.attended.chunks_mut(STRIP * d));
            let running =
                softmax.denominator.chunks_mut(STRIP).zip(softmax.maximum.chunks_mut(STRIP));
            for ((q, attended), (denominator, maximum)) in strips.zip(running) {
                let logits = &mut logits[..denominator.len()];
                for start in (span..count.min(span + SPAN)).step_by(BLOCK) {
                    let length = BLOCK.min(count - start);
                    let of_block = &panels[start / TILE * d..][..length.div_ceil(TILE) * d];
                    for (q, logits) in q.chunks(ROWS * d).zip(logits.chunks_mut(ROWS)) {
                        for (panel, column) in of_block.chunks_exact(d).zip((0..).step_by(TILE)) {
                            rows!(logits.len(), R => dots::<S, R>(simd, q, panel, logits, column));
                        }
                    }
                    for (row, logits) in logits.iter_mut().enumerate() {
                        let attended = &mut attended[row * d..(row + 1) * d];
                        let (sum, maximum) = (&mut denominator[row], &mut maximum[row]);
                        weigh(&mut logits[..length], attended, sum, maximum);
                    }
                    let v = &v[start * d..(start + length) * d];
                    for (weights, attended) in
                        logits.chunks(ROWS).zip(attended.chunks_mut(ROWS * d))
                    {
                        rows!(weights.len(), R => add_values::<S, R>(simd, weights, v, d, attended));
                    }
                }
            }
        }
    }
}

/// Products of `R` queries with a panel's keys, into 16 columns.
#[inline(always)]
fn dots<S: Simd, const R: usize>(
    simd: S,
    q: &[f32],
    panel: &[[f32; TILE]],
    to: &mut [[f32; BLOCK]],
    column: usize,
) {
    let d = panel.len();
    let q: [&[f32]; R] = std::array::from_fn(|r| &q[r * d..(r + 1) * d]);
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; R];
    for (channel, keys) in panel.iter().enumerate() {
        let keys = S::as_simd_f32s(keys).0;
        for r in 0..R {
            let x = simd.splat_f32s(q[r][channel]);
            for i in 0..VECTORS {
                sums[r][i] = simd.mul_add_f32s(x, keys[i], sums[r][i]);
            }
        }
    }
    for (to, sums) in to.iter_mut().zip(&sums) {
        S::as_mut_simd_f32s(&mut to[column..column + TILE]).0.copy_from_slice(sums);
    }
}

/// Turns a row's logits into `e^{s − m}`; a larger maximum shrinks what was added before.
#[inline(always)]
fn weigh(logits: &mut [f32], attended: &mut [f32], sum: &mut f32, maximum: &mut f32) {
    let top = vector::max(logits);
    if top > *maximum {
        let shrink = (*maximum - top).fast_exp();
        *sum *= shrink;
        attended.iter_mut().for_each(|sum| *sum *= shrink);
        *maximum = top;
    }
    *sum += vector::exp_sub_sum(logits, *maximum);
}

/// Adds the rows of `v`, `d` values each, times the weights of `R` queries.
#[inline(always)]
fn add_values<S: Simd, const R: usize>(
    simd: S,
    weights: &[[f32; BLOCK]],
    v: &[f32],
    d: usize,
    out: &mut [f32],
) {
    let keys = v.len() / d;
    let weights: [&[f32]; R] = std::array::from_fn(|r| &weights[r][..keys]);
    let whole = d / TILE * TILE;
    for column in (0..whole).step_by(TILE) {
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; R];
        for (key, v) in v.chunks_exact(d).enumerate() {
            let values = S::as_simd_f32s(&v[column..column + TILE]).0;
            for r in 0..R {
                let weight = simd.splat_f32s(weights[r][key]);
                for i in 0..VECTORS {
                    sums[r][i] = simd.mul_add_f32s(weight, values[i], sums[r][i]);
                }
            }
        }
        for r in 0..R {
            let out = &mut out[r * d + column..r * d + column + TILE];
            for (out, sum) in S::as_mut_simd_f32s(out).0.iter_mut().zip(sums[r]) {
                *out = simd.add_f32s(*out, sum);
            }
        }
    }
    // What is left of a head dimension that is no multiple of 16.
    for r in 0..R {
        let out = &mut out[r * d + whole..(r + 1) * d];
        for (v, &weight) in v.chunks_exact(d).zip(weights[r]) {
            vector::axpy(out, weight, &v[whole..]);
        }
    }
}
