//! Products of many rows: a tile of codes meets 16 rows of digits an instruction.

use std::arch::asm;
use std::arch::x86_64::*;

use pulp::x86::V4;
use still_compute::amx::Shapes;
use still_compute::vector::prefetch;

use super::vnni::{add, affine, four_codes};
use super::{Digits, GROUP, Group, Integer, Order, Rows};
use crate::tile::{LANES, Words};

/// Rows of a register.
pub const ROWS: usize = 16;

/// A group's sums: by what the digits weigh, `[16, 16]` each.
type Sums = [[[i32; LANES]; ROWS]; 3];

/// What passes between tiles and vectors.
#[repr(C, align(64))]
struct Passed {
    codes: [Words; GROUP / 4],
    /// Of a group and of the next.
    sums: [Sums; 2],
}

/// See [`super::Unit::multiply`]; of [`ROWS`] rows or more. The last block of so many may have some of the one before again.
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
    assert!(n >= ROWS, "{n} rows are no block");
    let mut passed =
        Passed { codes: [Words::default(); GROUP / 4], sums: [[[[0; LANES]; ROWS]; 3]; 2] };
    // Sums of 16 rows, their digits, and the codes of 16 lanes.
    let (sums, digits, codes) = ((16, 64), (16, 32), (8, 64));
    let shapes = Shapes::new([sums, sums, sums, digits, digits, digits, codes, (0, 0)]);
    // SAFETY: the shapes are those of palette 1; the caller may use tiles.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly, preserves_flags)) };
    for (tile, y) in words.chunks_exact(row_words).zip(y.chunks_exact_mut(n * LANES)) {
        for first in (0..n).step_by(ROWS) {
            let first = first.min(n - ROWS);
            let y = &mut y[first * LANES..(first + ROWS) * LANES];
            products::<B>(simd, tile, rows, first, &mut passed, y);
        }
    }
    // SAFETY: as above. A thread that uses no tiles is cheaper to interrupt.
    unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
}

/// Of 16 rows of `x`, from `row` on, with one tile: `y` is `[16, 16]`.
#[target_feature(
    enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,fma,bmi1,bmi2,lzcnt,popcnt"
)]
fn products<B: Integer>(
    simd: V4,
    tile: &[Words],
    rows: &Rows,
    row: usize,
    passed: &mut Passed,
    y: &mut [f32],
) {
    let digits = &rows.digits[row * rows.width..(row + ROWS) * rows.width];
    let n = rows.count();
    let in_block = B::VALUES / GROUP;
    let block = |at: usize| &tile[at / in_block * B::WORDS..(at / in_block + 1) * B::WORDS];
    let mut total = [_mm512_setzero_ps(); ROWS];
    // A group's sums are added while those of the next are made.
    for at in 0..=rows.width {
        if at < rows.width {
            if row == 0 && at % in_block == 0 {
                prefetch(block(at));
            }
            let codes = codes::<B>(B::codes_of(block(at), at % in_block), &mut passed.codes);
            let sums = &mut passed.sums[at % 2];
            // SAFETY: the group's digits of 16 rows are there, one row `width` groups after the other.
            unsafe { multiply_digits(codes, &digits[at..], rows.width, sums) };
        }
        if let Some(at) = at.checked_sub(1) {
            let affine = affine::<B>(simd, block(at), at % in_block);
            let groups = rows.groups[at * n + row..].first_chunk().expect("a group a row");
            add_sums(&mut total, &passed.sums[at % 2], affine, groups);
        }
    }
    for (y, total) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(total) {
        // SAFETY: 16 values are written in place of 16.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), total) };
    }
}

/// Adds a group's products to those of all rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_sums(
    total: &mut [__m512; ROWS],
    [high, middle, low]: &Sums,
    affine: [__m512; 2],
    groups: &[Group; ROWS],
) {
    // SAFETY: 16 numbers are read; they are aligned.
    let load = |sums: &[i32; LANES]| unsafe { _mm512_load_si512(sums.as_ptr().cast()) };
    let sums = high.iter().zip(middle).zip(low);
    for ((total, group), ((high, middle), low)) in total.iter_mut().zip(groups).zip(sums) {
        *total = add(*total, [load(high), load(middle), load(low)], affine, *group);
    }
}

/// A group's codes, a byte each: where they are, or unpacked.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes<'a, B: Integer>(
    codes: &'a [Words],
    unpacked: &'a mut [Words; GROUP / 4],
) -> &'a [Words; GROUP / 4] {
    if B::ORDER == Order::Bytes {
        return codes.first_chunk().expect("four codes a word");
    }
    for four in 0..GROUP / 4 {
        let codes = four_codes::<B>(codes, four);
        // SAFETY: one word of each of 16 rows is written; it is aligned.
        unsafe { _mm512_store_si512(unpacked[four].0.as_mut_ptr().cast(), codes) };
    }
    unpacked
}

/// `sums[digit][i][lane] = Σ code · digit` for a group of 16 rows.
///
/// # Safety
/// The registers have their [`Shapes`], and `digits` have 16 rows, of which each begins `width` groups after the one before.
#[inline]
unsafe fn multiply_digits(
    codes: &[Words; GROUP / 4],
    digits: &[[Digits; 3]],
    width: usize,
    sums: &mut Sums,
) {
    debug_assert!(digits.len() > (ROWS - 1) * width);
    // SAFETY: what is read and written is there, by this function's own contract; no other code uses tiles.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tileloadd tmm6, [{codes} + {line}*1]",
            "tileloadd tmm3, [{digits} + {stride}*1]",
            "tdpbsud tmm0, tmm3, tmm6",
            "tileloadd tmm4, [{digits} + {stride}*1 + 32]",
            "tdpbsud tmm1, tmm4, tmm6",
            "tileloadd tmm5, [{digits} + {stride}*1 + 64]",
            "tdpbsud tmm2, tmm5, tmm6",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            "tilestored [{sums} + {line}*1 + 2048], tmm2",
            codes = in(reg) codes,
            digits = in(reg) digits.as_ptr(),
            sums = in(reg) sums,
            line = in(reg) size_of::<Words>(),
            stride = in(reg) width * size_of::<[Digits; 3]>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
            out("tmm6") _,
            options(nostack, preserves_flags),
        );
    }
}
