//! Rows of `x` in digits, and products, in AVX2: two codes meet two digits an instruction, in sums of 16 bits.
//!
//! Codes are below 16 and digits at most 128 from 0, so that 16 products of a group are less than 2¹⁵. Codes of eight bits are
//! multiplied in [`super::words`].

use std::arch::asm;
use std::arch::x86_64::*;

use pulp::f32x8;
use pulp::x86::V3;
use still_compute::vector::prefetch;

use super::digits::LEAST;
use super::words::words_of;
use super::{Digits, GROUP, Group, Integer, Order, Rows};
use crate::tile::{LANES, Part, Words, turns};

/// Rows whose sums are in registers.
const MOST: usize = 3;

/// Lanes of a vector.
pub(super) const WIDTH: usize = 8;

/// See [`super::Unit::digits_into`].
#[target_feature(enable = "avx2,fma")]
pub fn digits_into(x: &[f32], columns: usize, order: Order, rows: &mut Rows) {
    rows.fill(x, columns, |x, digits| digits_of(x, order, digits));
    rows.words.clear();
    if order == Order::Bytes {
        rows.words.extend(rows.digits.iter().map(words_of));
    }
}

/// The digits of a group, and what else is to know of it.
#[target_feature(enable = "avx2,fma")]
fn digits_of(x: &[f32; GROUP], order: Order, digits: &mut [Digits; 3]) -> Group {
    let mut values = [_mm256_setzero_ps(); GROUP / WIDTH];
    for (value, x) in values.iter_mut().zip(x.as_chunks::<WIDTH>().0) {
        // SAFETY: 8 values are read.
        *value = unsafe { _mm256_loadu_ps(x.as_ptr()) };
    }
    // Without their signs numbers are ordered as their bits are, and what is no number comes last.
    let mut most = _mm256_setzero_si256();
    for value in values {
        let size = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(i32::MAX));
        most = _mm256_max_epu32(most, size);
    }
    let most = f32::from_bits(lanes(most).into_iter().fold(0, u32::max));
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
    let inverse = _mm256_set1_ps(f32::from_bits((2 * 127 + 22 - power) << 23));
    let mut whole = [_mm256_setzero_si256(); GROUP / WIDTH];
    let mut sum = _mm256_setzero_si256();
    for (whole, value) in whole.iter_mut().zip(values) {
        *whole = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse));
        sum = _mm256_add_epi32(sum, *whole);
    }
    let sum: i32 = lanes(sum).into_iter().map(|lane| lane as i32).sum();
    // Digits of 0 … 255 but for the first: 128 more each.
    let mut more = whole;
    for more in &mut more {
        *more = _mm256_add_epi32(*more, _mm256_set1_epi32(0x8080));
    }
    let [mut high, mut middle] = [more; 2];
    for (high, middle) in high.iter_mut().zip(&mut middle) {
        *high = _mm256_srli_epi32::<16>(*high);
        *middle = _mm256_srli_epi32::<8>(*middle);
    }
    let less = |bytes: __m256i| _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    let all = [low_bytes(high), less(low_bytes(middle)), less(low_bytes(more))];
    for (digits, bytes) in digits.iter_mut().zip(all) {
        let bytes = match order {
            Order::Bytes => bytes,
            Order::Nibbles => {
                let even_then_odd =
                    _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
                _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(even_then_odd))
            }
        };
        // SAFETY: 32 bytes, which are 32 digits, are written; alignment does not matter.
        unsafe { _mm256_storeu_si256(digits.0.as_mut_ptr().cast(), bytes) };
    }
    Group { unit, sum: unit * sum as f32 }
}

/// The lanes of a vector.
#[target_feature(enable = "avx2")]
fn lanes(vector: __m256i) -> [u32; WIDTH] {
    let mut lanes = [0; WIDTH];
    // SAFETY: 32 bytes are written, which are 8 lanes.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), vector) };
    lanes
}

/// The lowest byte of each lane, in order.
#[target_feature(enable = "avx2")]
fn low_bytes(of: [__m256i; GROUP / WIDTH]) -> __m256i {
    let byte = |of: __m256i| _mm256_and_si256(of, _mm256_set1_epi32(0xff));
    let first = _mm256_packus_epi32(byte(of[0]), byte(of[1]));
    let second = _mm256_packus_epi32(byte(of[2]), byte(of[3]));
    // Halves of vectors are packed on their own.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order)
}

/// See [`super::Unit::multiply`]; of formats whose codes have four bits.
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
pub fn multiply<B: Integer>(
    simd: V3,
    words: &[Words],
    row_words: usize,
    rows: &Rows,
    y: &mut [f32],
) {
    assert_eq!(B::ORDER, Order::Nibbles, "codes of eight bits overflow sums of 16 bits");
    let n = rows.count();
    for (tile, y) in words.chunks_exact(row_words).zip(y.chunks_exact_mut(n * LANES)) {
        for turn in turns(n, MOST) {
            let y = &mut y[turn.start * LANES..turn.end * LANES];
            for part in 0..LANES / WIDTH {
                match turn.len() {
                    1 => products::<B, 1>(simd, (tile, part), rows, turn.start, y),
                    2 => products::<B, 2>(simd, (tile, part), rows, turn.start, y),
                    3 => products::<B, 3>(simd, (tile, part), rows, turn.start, y),
                    rows => unreachable!("{rows} rows at a time"),
                }
            }
        }
    }
}

/// Of `N` rows of `x`, from `row` on, with half a tile: its lanes of `y`, `[N, 16]`.
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
fn products<B: Integer, const N: usize>(
    simd: V3,
    (tile, part): (&[Words], usize),
    rows: &Rows,
    row: usize,
    y: &mut [f32],
) {
    let mut digits: [&[[Digits; 3]]; N] = [&[]; N];
    for i in 0..N {
        digits[i] = &rows.digits[(row + i) * rows.width..(row + i + 1) * rows.width];
    }
    let n = rows.count();
    let mut total = [_mm256_setzero_ps(); N];
    let mut at = 0;
    for tile in tile.chunks_exact(B::WORDS) {
        if row == 0 && part == 0 {
            prefetch(tile);
        }
        for group in 0..B::VALUES / GROUP {
            let codes: &[Words; GROUP / 8] =
                B::codes_of(tile, group).first_chunk().expect("eight codes a word");
            let mut sums = [[_mm256_setzero_si256(); 3]; N];
            for (eight, words) in codes.iter().enumerate() {
                // SAFETY: 8 of 16 words are read, and `part` is 0 or 1; they are aligned.
                let words = unsafe { _mm256_load_si256(words.0.as_ptr().add(part * WIDTH).cast()) };
                for odd in 0..2 {
                    let codes = if odd == 0 { words } else { _mm256_srli_epi32::<4>(words) };
                    let codes = _mm256_and_si256(codes, _mm256_set1_epi32(0x0f0f_0f0f));
                    for i in 0..N {
                        for (sum, digits) in sums[i].iter_mut().zip(&digits[i][at]) {
                            let four = digits.0.as_chunks::<4>().0[2 * eight + odd];
                            let four = _mm256_set1_epi32(i32::from_le_bytes(four.map(|x| x as u8)));
                            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, four));
                        }
                        sums[i] = pinned(sums[i]);
                    }
                }
            }
            let affine = affine::<B>(simd, tile, group, part);
            let groups = &rows.groups[at * n + row..at * n + row + N];
            for i in 0..N {
                total[i] = add(total[i], sums[i], affine, groups[i]);
            }
            at += 1;
        }
    }
    for (y, total) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(total) {
        // SAFETY: 8 values are written in place of 8 of 16.
        unsafe { _mm256_storeu_ps(y.as_mut_ptr().add(part * WIDTH), total) };
    }
}

/// The same sums, which nothing may be moved across: the compiler would rather add all products with one digit before those with the
/// next, and run out of registers for codes.
#[inline]
#[target_feature(enable = "avx2")]
fn pinned([mut high, mut middle, mut low]: [__m256i; 3]) -> [__m256i; 3] {
    // SAFETY: there is no instruction.
    unsafe {
        asm!(
            "/* {0} {1} {2} */",
            inout(ymm_reg) high,
            inout(ymm_reg) middle,
            inout(ymm_reg) low,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    [high, middle, low]
}

/// Scales and offsets of a group of a block.
#[inline]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
pub(super) fn affine<B: Integer>(
    simd: V3,
    tile: &[Words],
    group: usize,
    part: usize,
) -> [__m256; 2] {
    let (scale, offset) = B::scale_and_offset(Part { simd, tile, part }, group);
    // SAFETY: both are 8 floats of a vector.
    unsafe { std::mem::transmute::<[f32x8; 2], [__m256; 2]>([scale, offset]) }
}

/// Adds a group's products, two a lane, to a row's.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add(
    total: __m256,
    [high, middle, low]: [__m256i; 3],
    affine: [__m256; 2],
    group: Group,
) -> __m256 {
    let times = |sums: __m256i, weight: i16| _mm256_madd_epi16(sums, _mm256_set1_epi16(weight));
    let upper = _mm256_add_epi32(times(high, 256), times(middle, 1));
    total_of(total, [upper, times(low, 1)], affine, group)
}

/// Adds a group's products to a row's: those that weigh 2⁸, and 1. The roundings are those of [`super::vnni`].
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn total_of(
    total: __m256,
    [upper, low]: [__m256i; 2],
    [scale, offset]: [__m256; 2],
    group: Group,
) -> __m256 {
    let (upper, low) = (_mm256_cvtepi32_ps(upper), _mm256_cvtepi32_ps(low));
    let sum = _mm256_fmadd_ps(upper, _mm256_set1_ps(256.0), low);
    let total = _mm256_fmadd_ps(offset, _mm256_set1_ps(group.sum), total);
    _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(group.unit)), sum, total)
}
