//! Rows of `x` in digits, and products of a few rows: four codes meet four digits an instruction and lane.

use std::arch::x86_64::*;

use pulp::f32x16;
use pulp::x86::V4;
use still_compute::vector::prefetch;

use super::digits::LEAST;
use super::{Digits, GROUP, Group, Integer, Order, Rows};
use crate::tile::{LANES, Part, Words, turns};

/// Rows whose sums are in registers.
const MOST: usize = 6;

/// See [`super::Unit::digits_into`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
pub fn digits_into(x: &[f32], columns: usize, order: Order, rows: &mut Rows) {
    rows.fill(x, columns, |x, digits| digits_of(x, order, digits));
}

/// The digits of a group, and what else is to know of it.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
fn digits_of(x: &[f32; GROUP], order: Order, digits: &mut [Digits; 3]) -> Group {
    // SAFETY: 16 values are read at each of two places of 32.
    let x = unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[16..].as_ptr())] };
    // Without their signs numbers are ordered as their bits are, and what is no number comes last.
    let size = x.map(|x| _mm512_castps_si512(_mm512_abs_ps(x)));
    let most = f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(size[0], size[1])));
    if most < LEAST {
        *digits = Default::default();
        return Group::default();
    }
    // So that three digits hold the largest.
    let most = most * 1.004;
    if !most.is_finite() {
        *digits = Default::default();
        return Group { unit: f32::NAN, sum: f32::NAN };
    }
    let power = most.to_bits() >> 23;
    let unit = f32::from_bits((power - 22) << 23);
    let inverse = _mm512_set1_ps(f32::from_bits((2 * 127 + 22 - power) << 23));
    let whole = x.map(|x| _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
    let sum = _mm512_reduce_add_epi32(_mm512_add_epi32(whole[0], whole[1]));
    // Digits of 0 … 255 but for the first: 128 more each.
    let more = whole.map(|whole| _mm512_add_epi32(whole, _mm512_set1_epi32(0x8080)));
    let bytes = |of: [__m512i; 2]| {
        let [low, high] = of.map(|of| _mm512_cvtepi32_epi8(of));
        _mm256_set_m128i(high, low)
    };
    let less = |bytes: __m256i| _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    let all = [
        bytes(more.map(|more| _mm512_srli_epi32::<16>(more))),
        less(bytes(more.map(|more| _mm512_srli_epi32::<8>(more)))),
        less(bytes(more)),
    ];
    for (digits, bytes) in digits.iter_mut().zip(all) {
        let bytes = match order {
            Order::Bytes => bytes,
            Order::Nibbles => {
                let eight = |at: i8| [0, 2, 4, 6, 1, 3, 5, 7].map(|i: i8| at + i);
                let [a, b] = [
                    i64::from_le_bytes(eight(0).map(|i| i as u8)),
                    i64::from_le_bytes(eight(8).map(|i| i as u8)),
                ];
                _mm256_shuffle_epi8(bytes, _mm256_set_epi64x(b, a, b, a))
            }
        };
        // SAFETY: 32 bytes, which are 32 digits, are written; alignment does not matter.
        unsafe { _mm256_storeu_si256(digits.0.as_mut_ptr().cast(), bytes) };
    }
    Group { unit, sum: unit * sum as f32 }
}

/// See [`super::Unit::multiply`].
#[target_feature(
    enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,fma,bmi1,bmi2,lzcnt,popcnt"
)]
pub fn multiply<B: Integer>(
    simd: V4,
    words: &[Words],
    row_words: usize,
    rows: &Rows,
    y: &mut [f32],
) {
    let n = rows.count();
    for (tile, y) in words.chunks_exact(row_words).zip(y.chunks_exact_mut(n * LANES)) {
        for turn in turns(n, MOST) {
            let y = &mut y[turn.start * LANES..turn.end * LANES];
            match turn.len() {
                1 => products::<B, 1>(simd, tile, rows, turn.start, y),
                2 => products::<B, 2>(simd, tile, rows, turn.start, y),
                3 => products::<B, 3>(simd, tile, rows, turn.start, y),
                4 => products::<B, 4>(simd, tile, rows, turn.start, y),
                5 => products::<B, 5>(simd, tile, rows, turn.start, y),
                6 => products::<B, 6>(simd, tile, rows, turn.start, y),
                rows => unreachable!("{rows} rows at a time"),
            }
        }
    }
}

/// Of `N` rows of `x`, from `row` on, with one tile: `y` is `[N, 16]`.
#[target_feature(
    enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,fma,bmi1,bmi2,lzcnt,popcnt"
)]
fn products<B: Integer, const N: usize>(
    simd: V4,
    tile: &[Words],
    rows: &Rows,
    row: usize,
    y: &mut [f32],
) {
    let mut digits: [&[[Digits; 3]]; N] = [&[]; N];
    for i in 0..N {
        digits[i] = &rows.digits[(row + i) * rows.width..(row + i + 1) * rows.width];
    }
    let n = rows.count();
    let mut total = [_mm512_setzero_ps(); N];
    let mut at = 0;
    for tile in tile.chunks_exact(B::WORDS) {
        if row == 0 {
            prefetch(tile);
        }
        for group in 0..B::VALUES / GROUP {
            let mut sums = [[_mm512_setzero_si512(); 3]; N];
            for four in 0..GROUP / 4 {
                let codes = four_codes::<B>(B::codes_of(tile, group), four);
                for i in 0..N {
                    for (sum, digits) in sums[i].iter_mut().zip(&digits[i][at]) {
                        let digits =
                            i32::from_le_bytes(digits.0.as_chunks::<4>().0[four].map(|x| x as u8));
                        *sum = _mm512_dpbusd_epi32(*sum, codes, _mm512_set1_epi32(digits));
                    }
                }
            }
            let affine = affine::<B>(simd, tile, group);
            let groups = &rows.groups[at * n + row..at * n + row + N];
            for i in 0..N {
                total[i] = add(total[i], sums[i], affine, groups[i]);
            }
            at += 1;
        }
    }
    for (y, total) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(total) {
        // SAFETY: 16 values are written in place of 16.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), total) };
    }
}

/// Scales and offsets of a group of a block.
#[inline]
#[target_feature(
    enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,fma,bmi1,bmi2,lzcnt,popcnt"
)]
pub(super) fn affine<B: Integer>(simd: V4, tile: &[Words], group: usize) -> [__m512; 2] {
    let (scale, offset) = B::scale_and_offset(Part { simd, tile, part: 0 }, group);
    // SAFETY: both are 16 floats of a vector.
    unsafe { std::mem::transmute::<[f32x16; 2], [__m512; 2]>([scale, offset]) }
}

/// The codes of four columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn four_codes<B: Integer>(codes: &[Words], four: usize) -> __m512i {
    let words = |index: usize| {
        // SAFETY: one word of each of 16 rows is read; it is aligned.
        unsafe { _mm512_load_si512(codes[index].0.as_ptr().cast()) }
    };
    let mask = _mm512_set1_epi32(0x0f0f_0f0f);
    match (B::ORDER, four % 2) {
        (Order::Bytes, _) => words(four),
        (Order::Nibbles, 0) => _mm512_and_si512(words(four / 2), mask),
        (Order::Nibbles, _) => _mm512_and_si512(_mm512_srli_epi32::<4>(words(four / 2)), mask),
    }
}

/// Adds a group's products to a row's.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add(
    total: __m512,
    [high, middle, low]: [__m512i; 3],
    [scale, offset]: [__m512; 2],
    group: Group,
) -> __m512 {
    let upper = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(high), middle));
    let sum = _mm512_fmadd_ps(upper, _mm512_set1_ps(256.0), _mm512_cvtepi32_ps(low));
    let total = _mm512_fmadd_ps(offset, _mm512_set1_ps(group.sum), total);
    _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(group.unit)), sum, total)
}
