//! How each format spells its values: in a file, and in a tile.
//!
//! A tile has the blocks of 16 rows. A code is a column's values up to an affine map that a group of columns shares:
//! `value = scale · code + offset`.

use pulp::Simd;

use crate::integer::{Integer, Order};
use crate::tile::{Part, Words, put};

/// One format's blocks.
pub trait Block: Send + Sync {
    /// Bytes of a block in a file.
    const BYTES: usize;
    /// Values of a block.
    const VALUES: usize;
    /// Words of a tile.
    const WORDS: usize;
    /// Columns that share scale and offset; as many as a block has where codes are values.
    const GROUP: usize;
    /// Columns whose codes come at a time.
    const STEP: usize;
    /// Whether codes are values.
    const PLAIN: bool = false;

    /// Enters a file's block into a tile of zeros, as row `lane`.
    fn pack(block: &[u8], tile: &mut [Words], lane: usize);

    /// Calls `each(column, code)` for the columns `0..STEP` of step `step` of group `group`.
    ///
    /// The calls are spelled out, so that what `each` keeps by column stays in registers.
    fn codes<S: Simd>(
        part: Part<'_, S>,
        group: usize,
        step: usize,
        each: impl FnMut(usize, S::f32s),
    );

    /// Scale and offset of a group.
    fn affine<S: Simd>(part: Part<'_, S>, group: usize) -> (S::f32s, S::f32s) {
        let _ = group;
        (part.simd.splat_f32s(1.0), part.simd.splat_f32s(0.0))
    }
}

fn bits16(bytes: &[u8]) -> u32 {
    u32::from(u16::from_le_bytes([bytes[0], bytes[1]]))
}

/// 32 values of 16 bytes, low nibbles first, then high ones: eight a word.
fn pack_nibbles(bytes: &[u8], tile: &mut [Words], lane: usize) {
    for i in 0..32 {
        let quant = bytes[i % 16] >> (i / 16 * 4) & 0xf;
        put(tile, i / 8, lane, i % 8 * 4, u32::from(quant));
    }
}

/// Eight codes of four bits in a word: `1 + quant / 16`.
#[inline(always)]
fn four_bits<S: Simd>(part: Part<'_, S>, word: usize, mut each: impl FnMut(usize, S::f32s)) {
    let word = part.word(word);
    let code = |at| part.one_and(part.field(word, at, 4, 19));
    each(0, code(0));
    each(1, code(4));
    each(2, code(8));
    each(3, code(12));
    each(4, code(16));
    each(5, code(20));
    each(6, code(24));
    each(7, code(28));
}

/// 16-bit floats, two a word: bf16 if `BRAIN`, else f16.
pub struct Float16<const BRAIN: bool>;

pub type Bf16 = Float16<true>;
pub type F16 = Float16<false>;

impl<const BRAIN: bool> Block for Float16<BRAIN> {
    const BYTES: usize = 64;
    const VALUES: usize = 32;
    const WORDS: usize = 16;
    const GROUP: usize = 32;
    const STEP: usize = 2;
    const PLAIN: bool = true;

    fn pack(block: &[u8], tile: &mut [Words], lane: usize) {
        for (i, value) in block.chunks_exact(2).enumerate() {
            put(tile, i / 2, lane, i % 2 * 16, bits16(value));
        }
    }

    #[inline(always)]
    fn codes<S: Simd>(
        part: Part<'_, S>,
        _group: usize,
        step: usize,
        mut each: impl FnMut(usize, S::f32s),
    ) {
        let word = part.word(step);
        let value = |at: u32| match BRAIN {
            true => part.simd.transmute_f32s_u32s(part.field(word, at, 16, 16)),
            false => part.half(word, at),
        };
        each(0, value(0));
        each(1, value(16));
    }
}

/// In a file a scale and 32 nibbles `q`: `scale (q − 8)`. The tile's last word has the scale.
pub struct Q4_0;

impl Block for Q4_0 {
    const BYTES: usize = 18;
    const VALUES: usize = 32;
    const WORDS: usize = 5;
    const GROUP: usize = 32;
    const STEP: usize = 8;

    fn pack(block: &[u8], tile: &mut [Words], lane: usize) {
        pack_nibbles(&block[2..], tile, lane);
        put(tile, 4, lane, 0, bits16(block));
    }

    #[inline(always)]
    fn codes<S: Simd>(
        part: Part<'_, S>,
        _group: usize,
        step: usize,
        each: impl FnMut(usize, S::f32s),
    ) {
        four_bits(part, step, each);
    }

    #[inline(always)]
    fn affine<S: Simd>(part: Part<'_, S>, _group: usize) -> (S::f32s, S::f32s) {
        let simd = part.simd;
        let scale = part.half(part.word(4), 0);
        (simd.mul_f32s(scale, simd.splat_f32s(16.0)), simd.mul_f32s(scale, simd.splat_f32s(-24.0)))
    }
}

impl Integer for Q4_0 {
    const ORDER: Order = Order::Nibbles;

    #[inline(always)]
    fn codes_of(tile: &[Words], _group: usize) -> &[Words] {
        &tile[..4]
    }

    #[inline(always)]
    fn scale_and_offset<S: Simd>(part: Part<'_, S>, _group: usize) -> (S::f32s, S::f32s) {
        let scale = part.half(part.word(4), 0);
        (scale, part.simd.mul_f32s(scale, part.simd.splat_f32s(-8.0)))
    }
}

/// In a file scale, minimum and 32 nibbles `q`: `scale q + minimum`. The tile's last word has scale and minimum.
pub struct Q4_1;

impl Block for Q4_1 {
    const BYTES: usize = 20;
    const VALUES: usize = 32;
    const WORDS: usize = 5;
    const GROUP: usize = 32;
    const STEP: usize = 8;

    fn pack(block: &[u8], tile: &mut [Words], lane: usize) {
        pack_nibbles(&block[4..], tile, lane);
        put(tile, 4, lane, 0, bits16(block));
        put(tile, 4, lane, 16, bits16(&block[2..]));
    }

    #[inline(always)]
    fn codes<S: Simd>(
        part: Part<'_, S>,
        _group: usize,
        step: usize,
        each: impl FnMut(usize, S::f32s),
    ) {
        four_bits(part, step, each);
    }

    #[inline(always)]
    fn affine<S: Simd>(part: Part<'_, S>, _group: usize) -> (S::f32s, S::f32s) {
        let simd = part.simd;
        let word = part.word(4);
        let scale = simd.mul_f32s(part.half(word, 0), simd.splat_f32s(16.0));
        (scale, simd.sub_f32s(part.half(word, 16), scale))
    }
}

impl Integer for Q4_1 {
    const ORDER: Order = Order::Nibbles;

    #[inline(always)]
    fn codes_of(tile: &[Words], _group: usize) -> &[Words] {
        &tile[..4]
    }

    #[inline(always)]
    fn scale_and_offset<S: Simd>(part: Part<'_, S>, _group: usize) -> (S::f32s, S::f32s) {
        let word = part.word(4);
        (part.half(word, 0), part.half(word, 16))
    }
}

/// In a file a scale and 32 signed bytes. In a tile the bytes are 128 more, and the last word has the scale.
pub struct Q8_0;

impl Block for Q8_0 {
    const BYTES: usize = 34;
    const VALUES: usize = 32;
    const WORDS: usize = 9;
    const GROUP: usize = 32;
    const STEP: usize = 4;

    fn pack(block: &[u8], tile: &mut [Words], lane: usize) {
        for i in 0..32 {
            put(tile, i / 4, lane, i % 4 * 8, u32::from(block[2 + i] ^ 0x80));
        }
        put(tile, 8, lane, 0, bits16(block));
    }

    #[inline(always)]
    fn codes<S: Simd>(
        part: Part<'_, S>,
        _group: usize,
        step: usize,
        mut each: impl FnMut(usize, S::f32s),
    ) {
        let word = part.word(step);
        let code = |at| part.one_and(part.field(word, at, 8, 15));
        each(0, code(0));
        each(1, code(8));
        each(2, code(16));
        each(3, code(24));
    }

    #[inline(always)]
    fn affine<S: Simd>(part: Part<'_, S>, _group: usize) -> (S::f32s, S::f32s) {
        let simd = part.simd;
        let scale = part.half(part.word(8), 0);
        (
            simd.mul_f32s(scale, simd.splat_f32s(256.0)),
            simd.mul_f32s(scale, simd.splat_f32s(-384.0)),
        )
    }
}

impl Integer for Q8_0 {
    const ORDER: Order = Order::Bytes;

    #[inline(always)]
    fn codes_of(tile: &[Words], _group: usize) -> &[Words] {
        &tile[..8]
    }

    #[inline(always)]
    fn scale_and_offset<S: Simd>(part: Part<'_, S>, _group: usize) -> (S::f32s, S::f32s) {
        let scale = part.half(part.word(8), 0);
        (scale, part.simd.mul_f32s(scale, part.simd.splat_f32s(-128.0)))
    }
}

/// In a file scale and minimum of all, then eight 6-bit pairs of both, then 256 nibbles. In a tile the nibbles of a group
/// are four words, then come the pairs, two a word, then scale and minimum of all.
pub struct Q4K;

impl Q4K {
    const PAIRS: usize = 32;
    const SCALES: usize = 36;

    /// Scale and minimum of a group.
    #[inline(always)]
    fn of_group<S: Simd>(part: Part<'_, S>, group: usize) -> (S::f32s, S::f32s) {
        let simd = part.simd;
        let (pairs, shift) = (part.word(Self::PAIRS + group / 2), group as u32 % 2 * 16);
        let all = part.word(Self::SCALES);
        let scale = simd.mul_f32s(part.half(all, 0), part.number(pairs, shift, 8, 0.0));
        let minimum = simd.mul_f32s(part.half(all, 16), part.number(pairs, shift + 8, 8, 0.0));
        (scale, minimum)
    }
}

impl Block for Q4K {
    const BYTES: usize = 144;
    const VALUES: usize = 256;
    const WORDS: usize = 37;
    const GROUP: usize = 32;
    const STEP: usize = 8;

    fn pack(block: &[u8], tile: &mut [Words], lane: usize) {
        let (sixes, stored) = (&block[4..16], &block[16..144]);
        for group in 0..8 {
            for i in 0..32 {
                let quant = stored[group / 2 * 32 + i] >> (group % 2 * 4) & 0xf;
                put(tile, group * 4 + i / 8, lane, i % 8 * 4, u32::from(quant));
            }
            let (scale, minimum) = scale_and_minimum(sixes, group);
            let shift = group % 2 * 16;
            put(tile, Self::PAIRS + group / 2, lane, shift, u32::from(scale));
            put(tile, Self::PAIRS + group / 2, lane, shift + 8, u32::from(minimum));
        }
        put(tile, Self::SCALES, lane, 0, bits16(block));
        put(tile, Self::SCALES, lane, 16, bits16(&block[2..]));
    }

    #[inline(always)]
    fn codes<S: Simd>(
        part: Part<'_, S>,
        group: usize,
        step: usize,
        each: impl FnMut(usize, S::f32s),
    ) {
        four_bits(part, group * 4 + step, each);
    }

    #[inline(always)]
    fn affine<S: Simd>(part: Part<'_, S>, group: usize) -> (S::f32s, S::f32s) {
        let simd = part.simd;
        let (scale, minimum) = Self::of_group(part, group);
        let scale = simd.mul_f32s(scale, simd.splat_f32s(16.0));
        (scale, simd.sub_f32s(simd.neg_f32s(scale), minimum))
    }
}

impl Integer for Q4K {
    const ORDER: Order = Order::Nibbles;

    #[inline(always)]
    fn codes_of(tile: &[Words], group: usize) -> &[Words] {
        &tile[group * 4..group * 4 + 4]
    }

    #[inline(always)]
    fn scale_and_offset<S: Simd>(part: Part<'_, S>, group: usize) -> (S::f32s, S::f32s) {
        let simd = part.simd;
        let (scale, minimum) = Self::of_group(part, group);
        (scale, simd.neg_f32s(minimum))
    }
}

/// The 6-bit scale and minimum of group `index`, of which GGUF packs eight pairs into twelve bytes.
fn scale_and_minimum(sixes: &[u8], index: usize) -> (u8, u8) {
    if index < 4 {
        (sixes[index] & 63, sixes[index + 4] & 63)
    } else {
        (
            (sixes[index + 4] & 0xf) | (sixes[index - 4] >> 6 << 4),
            (sixes[index + 4] >> 4) | (sixes[index] >> 6 << 4),
        )
    }
}

/// In a file 256 values of six bits, their low four and high two apart, a signed byte for each 16, and a scale. In a tile a
/// group of 16 has two words of low bits and one of high ones; then come the bytes, 128 more, then the scale.
pub struct Q6K;

impl Q6K {
    const BYTE_SCALES: usize = 48;
    const SCALE: usize = 52;
}

impl Block for Q6K {
    const BYTES: usize = 210;
    const VALUES: usize = 256;
    const WORDS: usize = 53;
    const GROUP: usize = 16;
    const STEP: usize = 8;

    fn pack(block: &[u8], tile: &mut [Words], lane: usize) {
        for i in 0..256 {
            let (half, part, at) = (i / 128, i / 32 % 4, i % 32);
            let low = block[64 * half + 32 * (part % 2) + at] >> (4 * (part / 2)) & 0xf;
            let high = block[128 + 32 * half + at] >> (2 * part) & 3;
            let (group, column) = (i / 16, i % 16);
            put(tile, group * 3 + column / 8, lane, column % 8 * 4, u32::from(low));
            put(tile, group * 3 + 2, lane, column * 2, u32::from(high));
        }
        for (group, &scale) in block[192..208].iter().enumerate() {
            let (word, shift) = (Self::BYTE_SCALES + group / 4, group % 4 * 8);
            put(tile, word, lane, shift, u32::from(scale ^ 0x80));
        }
        put(tile, Self::SCALE, lane, 0, bits16(&block[208..]));
    }

    #[inline(always)]
    fn codes<S: Simd>(
        part: Part<'_, S>,
        group: usize,
        step: usize,
        mut each: impl FnMut(usize, S::f32s),
    ) {
        let simd = part.simd;
        let low = part.word(group * 3 + step);
        // The step's eight columns have their two bits each in one half of the word.
        let high = part.word(group * 3 + 2);
        let high = if step == 0 { part.field(high, 0, 16, 0) } else { part.field(high, 16, 16, 0) };
        let code = |at: u32| {
            let low = part.field(low, 4 * at, 4, 17);
            part.one_and(simd.or_u32s(low, part.field(high, 2 * at, 2, 21)))
        };
        each(0, code(0));
        each(1, code(1));
        each(2, code(2));
        each(3, code(3));
        each(4, code(4));
        each(5, code(5));
        each(6, code(6));
        each(7, code(7));
    }

    #[inline(always)]
    fn affine<S: Simd>(part: Part<'_, S>, group: usize) -> (S::f32s, S::f32s) {
        let simd = part.simd;
        let bytes = part.word(Self::BYTE_SCALES + group / 4);
        let scale = part.number(bytes, group as u32 % 4 * 8, 8, 128.0);
        let scale = simd.mul_f32s(scale, part.half(part.word(Self::SCALE), 0));
        (simd.mul_f32s(scale, simd.splat_f32s(64.0)), simd.mul_f32s(scale, simd.splat_f32s(-96.0)))
    }
}
