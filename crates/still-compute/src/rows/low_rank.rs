//! Low-rank updates of a few rows, from values in the order in which they are read.

use super::TILE;
use crate::vector::{prefetch, sum, vectorize};

/// Columns of `A` that lie together.
const LANES: usize = TILE;

/// Rows of `A` that are multiplied at a time.
pub const ROWS: usize = 4;

/// Values of `A` that lie together: 16 columns of [`ROWS`] rows.
pub const BLOCK: usize = ROWS * LANES;

/// The values of `A` and `B`.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// The upper halves of f32 values.
    Bf16(&'a [u16]),
    /// All of them.
    F32(&'a [f32]),
}

/// `low = scale · x Aᵀ` of `x` `[batch, in]`: `[batch, rank]` in rows of a multiple of [`ROWS`]. `A` is `[rank / 4, in / 16, 4, 16]`, with
/// zeros in rows and columns past the last.
pub fn low_into(a: Values<'_>, scale: f32, x: &[f32], batch: usize, low: &mut [f32]) {
    match a {
        Values::Bf16(a) => low_into_of(a, scale, x, batch, low),
        Values::F32(a) => low_into_of(a, scale, x, batch, low),
    }
}

/// Adds `low Bᵀ` to `values`, `[tiles, batch, 16]`. `B` is `[tiles, rank, 16]`; `low` is that of [`low_into`].
pub fn add(b: Values<'_>, rank: usize, low: &[f32], batch: usize, values: &mut [f32]) {
    match b {
        Values::Bf16(b) => add_of(b, rank, low, batch, values),
        Values::F32(b) => add_of(b, rank, low, batch, values),
    }
}

/// A stored value.
trait Value: Copy {
    fn widen(self) -> f32;
}

impl Value for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

impl Value for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

fn low_into_of<V: Value>(a: &[V], scale: f32, x: &[f32], batch: usize, low: &mut [f32]) {
    let (width, rows) = (low.len() / batch, x.len() / batch);
    vectorize(
        #[inline(always)]
        || {
            for (x, low) in x.chunks_exact(rows).zip(low.chunks_exact_mut(width)) {
                let (x, rest) = x.as_chunks::<LANES>();
                let blocks = x.len() + usize::from(!rest.is_empty());
                for (a, low) in a.chunks_exact(blocks * BLOCK).zip(low.as_chunks_mut::<ROWS>().0) {
                    let (a, mut lanes) = (a.as_chunks::<BLOCK>().0, [[0.0; LANES]; ROWS]);
                    for (a, x) in a.iter().zip(x) {
                        prefetch(a);
                        add_block(a, x, &mut lanes);
                    }
                    if !rest.is_empty() {
                        let mut last = [0.0; LANES];
                        last[..rest.len()].copy_from_slice(rest);
                        add_block(&a[x.len()], &last, &mut lanes);
                    }
                    *low = lanes.map(
                        #[inline(always)]
                        |lanes| scale * sum(&lanes),
                    );
                }
            }
        },
    );
}

/// Adds the products of a block of `A` to the rows' lanes. Each row by itself, and widened first: all 64 sums at once are no vectors
/// to the compiler.
#[inline(always)]
fn add_block<V: Value>(
    a: &[V; BLOCK],
    x: &[f32; LANES],
    [l0, l1, l2, l3]: &mut [[f32; LANES]; ROWS],
) {
    let (a, _) = a.as_chunks::<LANES>();
    for (lanes, a) in [(l0, &a[0]), (l1, &a[1]), (l2, &a[2]), (l3, &a[3])] {
        let mut wide = [0.0; LANES];
        for lane in 0..LANES {
            wide[lane] = a[lane].widen();
        }
        for lane in 0..LANES {
            lanes[lane] = wide[lane].mul_add(x[lane], lanes[lane]);
        }
    }
}

fn add_of<V: Value>(b: &[V], rank: usize, low: &[f32], batch: usize, values: &mut [f32]) {
    let width = low.len() / batch;
    vectorize(
        #[inline(always)]
        || {
            let tiles = values.chunks_exact_mut(batch * LANES);
            for (b, values) in b.chunks_exact(rank * LANES).zip(tiles) {
                prefetch(b);
                let lines = b.as_chunks::<LANES>().0;
                for (low, value) in low.chunks_exact(width).zip(values.as_chunks_mut().0) {
                    let mut total: [f32; LANES] = *value;
                    for (&low, line) in low.iter().zip(lines) {
                        for lane in 0..LANES {
                            total[lane] = low.mul_add(line[lane].widen(), total[lane]);
                        }
                    }
                    *value = total;
                }
            }
        },
    );
}
