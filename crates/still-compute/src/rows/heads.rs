//! From rows of tokens to heads, rotated on the way, and back.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::ROWS_PER_TASK;
use crate::real::Real;
use crate::uninit::{as_uninit, copy, new_vec};

/// Sizes of heads of several sequences.
#[derive(Clone, Copy, Debug)]
pub struct HeadSizes {
    /// Tokens of each sequence.
    pub tokens: usize,
    /// Heads of a token.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

/// Cosines and sines of a run of positions: one run for all sequences, or one for each.
#[derive(Clone, Copy, Debug)]
pub struct Angles<'a> {
    /// `[runs, tokens, half]`
    pub cos: &'a [f32],
    /// `[runs, tokens, half]`
    pub sin: &'a [f32],
    /// How many runs there are.
    pub runs: usize,
    /// Tokens of a run.
    pub tokens: usize,
    /// Half the channels that are rotated.
    pub half: usize,
}

impl<'a> Angles<'a> {
    /// Those of a sequence's token: its cosines and sines.
    #[inline(always)]
    pub fn of(self, sequence: usize, token: usize) -> [&'a [f32]; 2] {
        let run = if self.runs == 1 { 0 } else { sequence };
        let start = (run * self.tokens + token) * self.half;
        [&self.cos[start..start + self.half], &self.sin[start..start + self.half]]
    }
}

/// One head, rotated or, if `back`, rotated back.
#[inline(always)]
fn rotate_one<T: Real>(x: &[T], [cos, sin]: [&[f32]; 2], back: bool, y: &mut [MaybeUninit<T>]) {
    let half = cos.len();
    let (x, x_rest) = x.split_at(2 * half);
    let (y, y_rest) = y.split_at_mut(2 * half);
    copy(x_rest, y_rest);
    let (x_low, x_high) = x.split_at(half);
    let (y_low, y_high) = y.split_at_mut(half);
    for i in 0..half {
        let cos = T::of(f64::from(cos[i]));
        let sin = T::of(f64::from(if back { -sin[i] } else { sin[i] }));
        y_low[i].write(x_low[i] * cos - x_high[i] * sin);
        y_high[i].write(x_high[i] * cos + x_low[i] * sin);
    }
}

/// One head on its way, rotated if there are angles.
#[inline(always)]
fn one<T: Real>(x: &[T], angles: Option<[&[f32]; 2]>, back: bool, y: &mut [MaybeUninit<T>]) {
    match angles {
        Some(angles) => rotate_one(x, angles, back, y),
        None => copy(x, y),
    }
}

pub(super) fn rotate<T: Real>(x: &[T], d: usize, angles: [&[f32]; 2], y: &mut [T]) {
    // SAFETY: numbers are written.
    let y = unsafe { as_uninit(y) };
    T::vectorize(
        #[inline(always)]
        || {
            for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
                rotate_one(x, angles, false, y);
            }
        },
    );
}

pub(super) fn par_split<T: Real>(
    x: &[T],
    HeadSizes { tokens, heads, head_dim: d }: HeadSizes,
    angles: Option<Angles<'_>>,
) -> Vec<T> {
    if x.is_empty() {
        return Vec::new();
    }
    assert!(x.len().is_multiple_of(heads * tokens * d), "x is not [B, {tokens}, {heads} x {d}]");
    let split = |y: &mut [MaybeUninit<T>]| {
        y.par_chunks_exact_mut(tokens * d).enumerate().for_each(|(task, y)| {
            let (sequence, head) = (task / heads, task % heads);
            T::vectorize(
                #[inline(always)]
                || {
                    for (token, y) in y.chunks_exact_mut(d).enumerate() {
                        let from = ((sequence * tokens + token) * heads + head) * d;
                        let angles = angles.map(|angles| angles.of(sequence, token));
                        one(&x[from..from + d], angles, false, y);
                    }
                },
            );
        });
    };
    // SAFETY: there are whole heads, and every channel of each token is written.
    unsafe { new_vec(x.len(), split) }
}

pub(super) fn par_merge<T: Real>(
    x: &[T],
    HeadSizes { tokens, heads, head_dim: d }: HeadSizes,
    angles: Option<Angles<'_>>,
) -> Vec<T> {
    if x.is_empty() {
        return Vec::new();
    }
    let width = heads * d;
    assert!(x.len().is_multiple_of(width * tokens), "x is not [B, {heads}, {tokens}, {d}]");
    let merge = |y: &mut [MaybeUninit<T>]| {
        y.par_chunks_mut(ROWS_PER_TASK * width).enumerate().for_each(|(task, y)| {
            T::vectorize(
                #[inline(always)]
                || {
                    for (row, y) in y.chunks_exact_mut(width).enumerate() {
                        let row = task * ROWS_PER_TASK + row;
                        let (sequence, token) = (row / tokens, row % tokens);
                        let angles = angles.map(|angles| angles.of(sequence, token));
                        for (head, y) in y.chunks_exact_mut(d).enumerate() {
                            let from = ((sequence * heads + head) * tokens + token) * d;
                            one(&x[from..from + d], angles, true, y);
                        }
                    }
                },
            );
        });
    };
    // SAFETY: there are whole rows, and every channel of each head is written.
    unsafe { new_vec(x.len(), merge) }
}
