//! [`PanelKeys::attend`] of f32 panels in AVX2.

use std::arch::x86_64::*;

use pulp::x86::V3;
use still_compute::matmul::Mat;
use still_compute::matmul::registers::{self, ROWS};
use still_compute::{Real, vector};

use super::{PanelKeys, Softmax};
use crate::cpu::key_store::TILE;

/// Values of a vector, and vectors of a panel's keys.
const LANES: usize = 8;
const VECTORS: usize = TILE / LANES;

/// Queries, and keys, that are worked on together.
const STRIP: usize = 4 * ROWS;
const BLOCK: usize = 4 * TILE;

/// Logits, later weights, of a query and a block of keys.
type Row = [f32; BLOCK];

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
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
pub fn attend(
    simd: V3,
    panels: &[[f32; TILE]],
    keys: &PanelKeys<'_>,
    q: &[f32],
    softmax: Softmax<'_, f32>,
) {
    let (d, count) = (keys.head_dim, keys.len());
    let mut logits = [[0.0; BLOCK]; STRIP];
    let strips = q.chunks(STRIP * d).zip(softmax.attended.chunks_mut(STRIP * d));
    let running = softmax.denominator.chunks_mut(STRIP).zip(softmax.maximum.chunks_mut(STRIP));
    for ((q, attended), (denominator, maximum)) in strips.zip(running) {
        let logits = &mut logits[..denominator.len()];
        let mut sums = [_mm256_setzero_ps(); STRIP];
        for (sum, &denominator) in sums.iter_mut().zip(&*denominator) {
            *sum = _mm256_zextps128_ps256(_mm_set_ss(denominator));
        }
        for start in (0..count).step_by(BLOCK) {
            let length = BLOCK.min(count - start);
            let panels = &panels[start / TILE * d..][..length.div_ceil(TILE) * d];
            for (q, logits) in q.chunks(ROWS * d).zip(logits.chunks_mut(ROWS)) {
                for (panel, column) in panels.chunks_exact(d).zip((0..).step_by(TILE)) {
                    rows!(logits.len(), R => dots::<R>(simd, q, panel, logits, column));
                }
            }
            for (row, logits) in logits.iter_mut().enumerate() {
                logits[length..].fill(f32::NEG_INFINITY);
                let attended = &mut attended[row * d..(row + 1) * d];
                weigh(logits, attended, &mut sums[row], &mut maximum[row]);
            }
            let v = &keys.v[start * d..(start + length) * d];
            for (weights, attended) in logits.chunks(ROWS).zip(attended.chunks_mut(ROWS * d)) {
                rows!(weights.len(), R => add_values::<R>(simd, weights, v, d, attended));
            }
        }
        for (denominator, sum) in denominator.iter_mut().zip(sums) {
            *denominator = lanes(sum).into_iter().sum();
        }
    }
}

/// The lanes of a vector.
#[inline]
#[target_feature(enable = "avx2")]
fn lanes(vector: __m256) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    // SAFETY: 8 values are written.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), vector) };
    lanes
}

/// Products of `R` queries with a panel's keys, into 16 columns.
#[inline]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
fn dots<const R: usize>(simd: V3, q: &[f32], panel: &[[f32; TILE]], to: &mut [Row], column: usize) {
    let d = panel.len();
    let (q, panel) = (Mat::rows(q, d), Mat::rows(panel.as_flattened(), TILE));
    let sums = registers::sums::<V3, R, VECTORS>(simd, d, q, panel);
    for (to, sums) in to.iter_mut().zip(&sums) {
        let to: &mut [[f32; LANES]] = to[column..column + TILE].as_chunks_mut().0;
        to.iter_mut().zip(sums).for_each(|(to, &sum)| *to = pulp::cast(sum));
    }
}

/// Turns a row's logits into `e^{s − m}`; a larger maximum shrinks what was added before. `sum` is the denominator, lane by lane.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn weigh(logits: &mut Row, attended: &mut [f32], sum: &mut __m256, maximum: &mut f32) {
    let mut x = [_mm256_setzero_ps(); BLOCK / LANES];
    for (x, logits) in x.iter_mut().zip(logits.as_chunks::<LANES>().0) {
        // SAFETY: there are 8 values.
        *x = unsafe { _mm256_loadu_ps(logits.as_ptr()) };
    }
    // A NaN may get lost here, but not in the exponential below.
    let top = x.into_iter().fold(_mm256_set1_ps(*maximum), |top, x| _mm256_max_ps(x, top));
    let larger = _mm256_cmp_ps::<_CMP_GT_OQ>(top, _mm256_set1_ps(*maximum));
    if _mm256_movemask_ps(larger) != 0 {
        let top = lanes(top).into_iter().fold(*maximum, |a, b| if b > a { b } else { a });
        let shrink = (*maximum - top).fast_exp();
        *sum = _mm256_mul_ps(*sum, _mm256_set1_ps(shrink));
        attended.iter_mut().for_each(|sum| *sum *= shrink);
        *maximum = top;
    }
    let shift = _mm256_set1_ps(*maximum);
    for (x, logits) in x.into_iter().zip(logits.as_chunks_mut::<LANES>().0) {
        let weight = exp(_mm256_sub_ps(x, shift));
        *sum = _mm256_add_ps(*sum, weight);
        // SAFETY: there are 8 values.
        unsafe { _mm256_storeu_ps(logits.as_mut_ptr(), weight) };
    }
}

/// `e^x` of `x ≤ 0`, within 2 ulp; of less than −80 what it is of −80, which is next to nothing; NaN of NaN.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp(x: __m256) -> __m256 {
    // As `Real::fast_exp`, with n + 127 in the lowest bits, where the exponent of 2^n has them.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    // Of a NaN and a number this instruction gives the second.
    let x = _mm256_max_ps(_mm256_set1_ps(-80.0), x);
    let log2_e = _mm256_set1_ps(std::f32::consts::LOG2_E);
    let shifted = _mm256_fmadd_ps(x, log2_e, _mm256_set1_ps(ROUND));
    let n = _mm256_sub_ps(shifted, _mm256_set1_ps(ROUND));
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-0.693_359_4), x);
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(2.121_944_4e-4), r);
    let mut p = _mm256_set1_ps(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    }
    let scale = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
    _mm256_mul_ps(p, _mm256_castsi256_ps(scale))
}

/// Adds the rows of `v`, `d` values each, times the weights of `R` queries.
#[inline]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
fn add_values<const R: usize>(simd: V3, weights: &[Row], v: &[f32], d: usize, out: &mut [f32]) {
    let (keys, whole) = (v.len() / d, d / TILE * TILE);
    let all = Mat::rows(weights.as_flattened(), BLOCK);
    for column in (0..whole).step_by(TILE) {
        let v = Mat::rows(&v[column..], d);
        let sums = registers::sums::<V3, R, VECTORS>(simd, keys, all, v);
        for (out, sums) in out.chunks_exact_mut(d).zip(sums) {
            let out: &mut [[f32; LANES]] = out[column..column + TILE].as_chunks_mut().0;
            for (out, sum) in out.iter_mut().zip(sums) {
                let sum: [f32; LANES] = pulp::cast(sum);
                out.iter_mut().zip(sum).for_each(|(out, sum)| *out += sum);
            }
        }
    }
    // What is left of a head dimension that is no multiple of 16.
    for (weights, out) in weights.iter().zip(out.chunks_exact_mut(d)) {
        for (v, &weight) in v.chunks_exact(d).zip(weights) {
            vector::axpy(&mut out[whole..], weight, &v[whole..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        if V3::try_new().is_none() {
            println!("this CPU has no AVX2: nothing to compare");
            return;
        }
        // SAFETY: the CPU has the features.
        let exp = |x: f32| unsafe { lanes(exp(_mm256_set1_ps(x))) };
        for x in (0..=800_000).map(|i| -1e-4 * i as f32) {
            let exact = f64::from(x).exp();
            for got in exp(x) {
                let error = (f64::from(got) - exact).abs() / exact;
                assert!(error < 2.0 * f64::from(f32::EPSILON), "{got} of {x}: {error:e}");
            }
        }
        for least in [-80.5, -1e6, f32::NEG_INFINITY] {
            assert_eq!(exp(least), exp(-80.0));
        }
        assert!(exp(f32::NAN).into_iter().all(f32::is_nan));
    }
}
