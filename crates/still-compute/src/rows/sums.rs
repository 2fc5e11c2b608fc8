//! Sums, scales, products of a few rows with a matrix.

use std::ops::Range;

use rayon::prelude::*;

use super::{BLOCK, TILE};
use crate::real::Real;
use crate::threads::Shared;
use crate::vector::{axpy, dot, vectorize};

pub(super) fn add<T: Real>(y: &mut [T], x: &[T]) {
    T::vectorize(
        #[inline(always)]
        || axpy(y, T::one(), x),
    );
}

pub(super) fn par_add<T: Real>(y: &mut [T], x: &[T]) {
    y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| add(y, x));
}

/// `x *= scale`.
pub fn scale(x: &mut [f32], scale: f32) {
    vectorize(
        #[inline(always)]
        || x.iter_mut().for_each(|x| *x *= scale),
    );
}

/// Products of rows `w` and rows `x`, both `[…, width]`, in tiles of [`TILE`] rows of `w`: into `y`, `[tiles, rows of x, 16]`. What a
/// last tile has no rows for becomes 0.
pub fn dot_tiles(w: &[f32], x: &[f32], width: usize, y: &mut [f32]) {
    let n = x.len() / width;
    y.fill(0.0);
    vectorize(
        #[inline(always)]
        || {
            for (row, w) in w.chunks_exact(width).enumerate() {
                for (i, x) in x.chunks_exact(width).enumerate() {
                    y[(row / TILE * n + i) * TILE + row % TILE] = dot(w, x);
                }
            }
        },
    );
}

/// Enters products in tiles, `[tiles, batch, 16]`, into `to` `[batch, rows]`, with a bias `[rows]` if there is one: in place of what was
/// there or, with `onto`, in addition.
///
/// # Safety
/// Nobody else has these rows of `to` in this phase.
pub unsafe fn enter_tiles(
    tiles: Range<usize>,
    values: &[f32],
    bias: Option<&[f32]>,
    onto: bool,
    (to, rows): (&Shared<'_>, usize),
) {
    let batch = values.len() / tiles.len() / TILE;
    for (n, values) in values.chunks_exact(TILE).enumerate() {
        let (first, sequence) = ((tiles.start + n / batch) * TILE, n % batch);
        let tile = first..rows.min(first + TILE);
        // SAFETY: by this function's own contract.
        let to = unsafe { to.write(sequence * rows + tile.start..sequence * rows + tile.end) };
        match onto {
            true => to.iter_mut().zip(values).for_each(|(to, &value)| *to += value),
            false => to.copy_from_slice(&values[..tile.len()]),
        }
        if let Some(bias) = bias {
            to.iter_mut().zip(&bias[tile]).for_each(|(to, &bias)| *to += bias);
        }
    }
}

/// Adds a bias to products in tiles from tile `first` on, `[tiles, batch, 16]`.
pub fn add_bias(bias: &[f32], first: usize, batch: usize, tiles: &mut [f32]) {
    for (n, values) in tiles.chunks_exact_mut(TILE).enumerate() {
        let row = (first + n / batch) * TILE;
        // The last tile may have fewer rows.
        values.iter_mut().zip(&bias[row..]).for_each(|(value, &bias)| *value += bias);
    }
}
