//! Sixteen rows side by side: the layout that matrices have in memory.
//!
//! A file stores a row's blocks one after the other. Here a word of each of 16 rows makes one vector: every lane is a
//! row of its own, an activation is the same for all of them, and no product needs a sum across lanes.

use std::ops::Range;

use pulp::Simd;
use pulp::bytemuck::{Pod, Zeroable};

/// Rows of a tile.
pub const LANES: usize = 16;

/// One 32-bit word of each row.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(64))]
pub struct Words(pub [u32; LANES]);

// SAFETY: an array of numbers, and nothing besides.
unsafe impl Zeroable for Words {}
// SAFETY: as above: its alignment is its size.
unsafe impl Pod for Words {}

/// `n` rows in turns of at most `most`, whose sums are in registers, and about equally many each.
#[inline(always)]
pub fn turns(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let times = n.div_ceil(most);
    let mut start = 0;
    (1..=times).map(move |time| {
        let end = n * time / times;
        std::mem::replace(&mut start, end)..end
    })
}

/// Puts a field into one row's word.
pub fn put(tile: &mut [Words], word: usize, lane: usize, shift: usize, value: u32) {
    tile[word].0[lane] |= value << shift;
}

/// A vector's worth of a tile's rows.
#[derive(Clone, Copy)]
pub struct Part<'a, S> {
    pub simd: S,
    pub tile: &'a [Words],
    /// Which vector of every word.
    pub part: usize,
}

impl<S: Simd> Part<'_, S> {
    #[inline(always)]
    pub fn word(self, index: usize) -> S::u32s {
        let (vectors, _) = S::as_simd_u32s(&self.tile[index].0);
        vectors[self.part]
    }

    /// The field of `bits` bits at `from`, moved to `to`.
    #[inline(always)]
    pub fn field(self, word: S::u32s, from: u32, bits: u32, to: u32) -> S::u32s {
        let simd = self.simd;
        let moved = if to >= from {
            simd.wrapping_dyn_shl_u32s(word, simd.splat_u32s(to - from))
        } else {
            simd.wrapping_dyn_shr_u32s(word, simd.splat_u32s(from - to))
        };
        simd.and_u32s(moved, simd.splat_u32s(((1 << bits) - 1) << to))
    }

    /// `1 + field / 2^bits`: the field becomes the upper bits of a mantissa, which is cheaper than a conversion.
    #[inline(always)]
    pub fn one_and(self, field: S::u32s) -> S::f32s {
        let simd = self.simd;
        simd.transmute_f32s_u32s(simd.or_u32s(field, simd.splat_u32s(1.0_f32.to_bits())))
    }

    /// The field of `bits` bits at `from` as a number, less `bias`.
    #[inline(always)]
    pub fn number(self, word: S::u32s, from: u32, bits: u32, bias: f32) -> S::f32s {
        // 2²³ has its whole numbers in the lowest bits.
        const BASE: f32 = 8_388_608.0;
        let simd = self.simd;
        let field = simd.or_u32s(self.field(word, from, bits, 0), simd.splat_u32s(BASE.to_bits()));
        simd.sub_f32s(simd.transmute_f32s_u32s(field), simd.splat_f32s(BASE + bias))
    }

    /// The IEEE half at bit `from` (0 or 16). Infinities and NaN are no scales; everything else is exact.
    #[inline(always)]
    pub fn half(self, word: S::u32s, from: u32) -> S::f32s {
        let simd = self.simd;
        let magnitude = self.field(word, from, 15, 13);
        let sign = self.field(word, from + 15, 1, 31);
        let bits = simd.transmute_f32s_u32s(simd.or_u32s(magnitude, sign));
        // The exponents' biases differ by 112; the product also gives subnormals their value.
        simd.mul_f32s(bits, simd.splat_f32s(f32::from_bits((112 + 127) << 23)))
    }
}
