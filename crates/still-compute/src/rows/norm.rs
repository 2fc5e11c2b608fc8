//! Root-mean-square normalisation with a weight that never trains.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::ROWS_PER_TASK;
use crate::real::Real;
use crate::uninit::{as_uninit, new_vec};
use crate::vector::dot;

#[inline(always)]
fn inverse_rms<T: Real>(x: &[T], eps: f64) -> T {
    let mean = dot(x, x) / T::of(x.len() as f64);
    T::one() / (mean + T::of(eps)).sqrt()
}

pub(super) fn rms_norm<T: Real>(x: &[T], weight: &[T], eps: f64, y: &mut [T]) {
    // SAFETY: numbers are written.
    write(x, weight, eps, unsafe { as_uninit(y) });
}

/// Writes the rows of `y` that `x` has too.
fn write<T: Real>(x: &[T], weight: &[T], eps: f64, y: &mut [MaybeUninit<T>]) {
    let width = weight.len();
    T::vectorize(
        #[inline(always)]
        || {
            for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let scale = inverse_rms(x, eps);
                for i in 0..width {
                    y[i].write(x[i] * scale * weight[i]);
                }
            }
        },
    );
}

pub(super) fn par_rms_norm<T: Real>(x: &[T], weight: &[T], eps: f64) -> Vec<T> {
    assert!(x.len().is_multiple_of(weight.len()), "x is not [n, {}]", weight.len());
    let block = weight.len() * ROWS_PER_TASK;
    let rows = |y: &mut [MaybeUninit<T>]| {
        let blocks = y.par_chunks_mut(block).zip(x.par_chunks(block));
        blocks.for_each(|(y, x)| write(x, weight, eps, y));
    };
    // SAFETY: there are whole rows, and every block's are written.
    unsafe { new_vec(x.len(), rows) }
}

pub(super) fn par_backward<T: Real>(x: &[T], weight: &[T], eps: f64, dy: &[T], dx: &mut [T]) {
    let block = weight.len() * ROWS_PER_TASK;
    dx.par_chunks_mut(block)
        .zip(x.par_chunks(block))
        .zip(dy.par_chunks(block))
        .for_each(|((dx, x), dy)| backward(x, weight, eps, dy, dx));
}

fn backward<T: Real>(x: &[T], weight: &[T], eps: f64, dy: &[T], dx: &mut [T]) {
    let width = weight.len();
    T::vectorize(
        #[inline(always)]
        || {
            let mut weighted = vec![T::zero(); width];
            let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
            for ((dx, x), dy) in rows.zip(dy.chunks_exact(width)) {
                let scale = inverse_rms(x, eps);
                for i in 0..width {
                    weighted[i] = dy[i] * weight[i];
                }
                let along = dot(&weighted, x) * scale * scale / T::of(width as f64);
                for i in 0..width {
                    dx[i] += scale * (weighted[i] - x[i] * along);
                }
            }
        },
    );
}
