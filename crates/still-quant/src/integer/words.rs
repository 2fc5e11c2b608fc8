//! Products of codes of eight bits in AVX2: two codes meet two words an instruction, in sums of 32 bits.
//!
//! Two digits are one word of 16 bits, `2⁸ h + m`, and the third is one by itself.

use std::arch::x86_64::*;

use pulp::x86::V3;
use still_compute::vector::prefetch;

use super::avx2::{WIDTH, affine, total_of};
use super::{Digits, GROUP, Integer, Order, RowWords, Rows};
use crate::tile::{LANES, Words, turns};

/// Rows whose sums are in registers.
const MOST: usize = 4;

/// A group's digits as words, those of a code's first and third column before those of its second and fourth.
pub fn words_of([high, middle, low]: &[Digits; 3]) -> RowWords {
    let mut words = [[0; GROUP]; 2];
    for (at, column) in (0..GROUP).map(|i| (i, i / 4 * 4 + [0, 2, 1, 3][i % 4])) {
        words[0][at] = i16::from(high.0[column]) * 256 + i16::from(middle.0[column]);
        words[1][at] = i16::from(low.0[column]);
    }
    RowWords(words)
}

/// See [`super::Unit::multiply`]; of formats whose codes have eight bits.
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
pub fn multiply<B: Integer>(
    simd: V3,
    words: &[Words],
    row_words: usize,
    rows: &Rows,
    y: &mut [f32],
) {
    assert_eq!(B::ORDER, Order::Bytes, "codes of four bits have faster products");
    let n = rows.count();
    for (tile, y) in words.chunks_exact(row_words).zip(y.chunks_exact_mut(n * LANES)) {
        for turn in turns(n, MOST) {
            let y = &mut y[turn.start * LANES..turn.end * LANES];
            for part in 0..LANES / WIDTH {
                match turn.len() {
                    1 => products::<B, 1>(simd, (tile, part), rows, turn.start, y),
                    2 => products::<B, 2>(simd, (tile, part), rows, turn.start, y),
                    3 => products::<B, 3>(simd, (tile, part), rows, turn.start, y),
                    4 => products::<B, 4>(simd, (tile, part), rows, turn.start, y),
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
    let mut of_rows: [&[RowWords]; N] = [&[]; N];
    for i in 0..N {
        of_rows[i] = &rows.words[(row + i) * rows.width..(row + i + 1) * rows.width];
    }
    let n = rows.count();
    let mut total = [_mm256_setzero_ps(); N];
    let mut at = 0;
    for tile in tile.chunks_exact(B::WORDS) {
        if row == 0 && part == 0 {
            prefetch(tile);
        }
        for group in 0..B::VALUES / GROUP {
            let codes: &[Words; GROUP / 4] =
                B::codes_of(tile, group).first_chunk().expect("four codes a word");
            let mut sums = [[_mm256_setzero_si256(); 2]; N];
            for (four, codes) in codes.iter().enumerate() {
                // SAFETY: 8 of 16 words are read, and `part` is 0 or 1; they are aligned.
                let codes = unsafe { _mm256_load_si256(codes.0.as_ptr().add(part * WIDTH).cast()) };
                for odd in 0..2 {
                    let codes = match odd {
                        0 => _mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
                        _ => _mm256_srli_epi16::<8>(codes),
                    };
                    for i in 0..N {
                        for (sum, words) in sums[i].iter_mut().zip(&of_rows[i][at].0) {
                            let [a, b] = words.as_chunks::<2>().0[2 * four + odd];
                            let pair =
                                _mm256_set1_epi32(i32::from(b) << 16 | i32::from(a) & 0xffff);
                            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(codes, pair));
                        }
                    }
                }
            }
            let affine = affine::<B>(simd, tile, group, part);
            let groups = &rows.groups[at * n + row..at * n + row + N];
            for i in 0..N {
                total[i] = total_of(total[i], sums[i], affine, groups[i]);
            }
            at += 1;
        }
    }
    for (y, total) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(total) {
        // SAFETY: 8 values are written in place of 8 of 16.
        unsafe { _mm256_storeu_ps(y.as_mut_ptr().add(part * WIDTH), total) };
    }
}
