//! Feature-map rows and their gradients.

use num_traits::Float;

use super::weighted_sum::{SMALL_BATCH, matmul_small_batch};
use crate::config::FeatureMap;
use still_compute::Real;
use still_compute::matmul::{Mat, matmul};
use still_compute::vector;

/// `‖f‖` is clamped from below by this.
const MIN_NORM: f64 = 1e-12;

/// `φ` of `rows` rows of `x` `[·, D]` under `w` `[D, F]`: `[rows, 2F]`.
pub(crate) fn map_rows<T: Real>(
    map: FeatureMap,
    x: Mat<'_, T>,
    rows: usize,
    w: &[T],
    feature_dim: usize,
) -> Vec<T> {
    let mut phi = vec![T::nan(); rows * 2 * feature_dim];
    map_into(map, x, w, feature_dim, &mut phi);
    phi
}

/// `φ` of rows of `x` `[·, D]` under `w` `[D, F]` into `phi`, `[rows, 2F]`.
pub(crate) fn map_into<T: Real>(
    map: FeatureMap,
    x: Mat<'_, T>,
    w: &[T],
    feature_dim: usize,
    phi: &mut [T],
) {
    let head_dim = w.len() / feature_dim;
    let width = 2 * feature_dim;
    let rows = phi.len() / width;
    // f(x) lands in the left halves; the right halves follow from it.
    if rows <= SMALL_BATCH && x.col_stride == 1 {
        matmul_small_batch((feature_dim, head_dim), phi, width, false, (x.data, x.row_stride), w);
    } else {
        matmul((rows, feature_dim, head_dim), phi, width, false, x, Mat::rows(w, feature_dim));
    }
    T::vectorize(
        #[inline(always)]
        || {
            for (i, phi) in phi.chunks_exact_mut(width).enumerate() {
                let (left, right) = phi.split_at_mut(feature_dim);
                match map {
                    FeatureMap::NpMap { .. } => {
                        let x = &x.data[i * x.row_stride..i * x.row_stride + head_dim];
                        let scale = vector::dot(x, x).sqrt() / norm(left);
                        left.iter_mut().for_each(|u| *u *= scale);
                    }
                    FeatureMap::Softmax => {}
                }
                for (right, &left) in right.iter_mut().zip(left.iter()) {
                    *right = -left;
                }
                vector::softmax(left);
                vector::softmax(right);
            }
        },
    );
}

#[inline(always)]
fn norm<T: Real>(f: &[T]) -> T {
    Float::max(vector::dot(f, f).sqrt(), T::of(MIN_NORM))
}

/// Gradients of [`map_into`]: adds to `dx` (rows of `D`), if it is wanted, and to `dw` `[D, F]`.
pub(crate) fn map_rows_backward<T: Real>(
    map: FeatureMap,
    x: Mat<'_, T>,
    w: &[T],
    feature_dim: usize,
    phi: &[T],
    dphi: &[T],
    mut dx: Option<&mut [T]>,
    dw: &mut [T],
) {
    let head_dim = w.len() / feature_dim;
    let width = 2 * feature_dim;
    let rows = phi.len() / width;
    let w = Mat::rows(w, feature_dim);
    // Through the two softmaxes: du = p₊(d₊ − p₊·d₊) − p₋(d₋ − p₋·d₋).
    let mut df = vec![T::nan(); rows * feature_dim];
    T::vectorize(
        #[inline(always)]
        || {
            for i in 0..rows {
                let (p, n) = phi[i * width..(i + 1) * width].split_at(feature_dim);
                let (dp, dn) = dphi[i * width..(i + 1) * width].split_at(feature_dim);
                let (mean_p, mean_n) = (vector::dot(p, dp), vector::dot(n, dn));
                let du = &mut df[i * feature_dim..(i + 1) * feature_dim];
                for j in 0..feature_dim {
                    du[j] = p[j] * (dp[j] - mean_p) - n[j] * (dn[j] - mean_n);
                }
            }
        },
    );
    match map {
        FeatureMap::Softmax => {}
        FeatureMap::NpMap { .. } => {
            // u = ‖x‖ g, g = f/‖f‖: du/d‖x‖ = g; df = (‖x‖/‖f‖)(du − g (g·du)), the last term only above the clamp.
            let mut f = vec![T::nan(); rows * feature_dim];
            matmul((rows, feature_dim, head_dim), &mut f, feature_dim, false, x, w);
            T::vectorize(
                #[inline(always)]
                || {
                    for i in 0..rows {
                        let f = &mut f[i * feature_dim..(i + 1) * feature_dim];
                        let du = &mut df[i * feature_dim..(i + 1) * feature_dim];
                        let x = &x.data[i * x.row_stride..i * x.row_stride + head_dim];
                        let (x_norm, f_norm) = (vector::dot(x, x).sqrt(), norm(f));
                        let clamped = f_norm <= T::of(MIN_NORM);
                        f.iter_mut().for_each(|f| *f /= f_norm);
                        let along = vector::dot(f, du);
                        let radial = if clamped { T::zero() } else { along };
                        for (du, &g) in du.iter_mut().zip(f.iter()) {
                            *du = x_norm / f_norm * (*du - g * radial);
                        }
                        if let (Some(dx), true) = (&mut dx, x_norm > T::zero()) {
                            vector::axpy(
                                &mut dx[i * head_dim..(i + 1) * head_dim],
                                along / x_norm,
                                x,
                            );
                        }
                    }
                },
            );
        }
    }
    let df = Mat::rows(&df, feature_dim);
    if let Some(dx) = dx {
        matmul((rows, head_dim, feature_dim), dx, head_dim, true, df, w.t());
    }
    matmul((head_dim, feature_dim, rows), dw, feature_dim, true, x.t(), df);
}
