//! [`Tiles`](super::Tiles) in AVX-512 and AMX.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::{BLOCK, DEPTH, DIGITS, SIDE, Tile};
use crate::amx::Shapes;

/// Whether this CPU cuts numbers into digits of bf16.
pub fn narrows() -> bool {
    is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

/// Products of 32 rows with 32.
#[repr(C, align(64))]
struct Products([[f32; BLOCK]; BLOCK]);

/// The first `count` lanes, at most all.
fn lanes(count: usize) -> __mmask16 {
    if count >= SIDE { !0 } else { (1 << count) - 1 }
}

/// The next digit of 16 numbers, as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn digit(x: __m512) -> __m512 {
    // SAFETY: both are 32 bytes for which every bit pattern is valid.
    let narrow: __m256i = unsafe { std::mem::transmute(_mm512_cvtneps_pbh(x)) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)))
}

/// 32 numbers in bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn narrow([low, high]: [__m512; 2]) -> __m512i {
    // SAFETY: both are 64 bytes for which every bit pattern is valid.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

/// At most 16 rows `x` of `k` columns in tiles: the digits of the first 32 columns, then of the next; zeros where there is nothing.
///
/// # Safety
/// The CPU has the features, and there are as many tiles as `k` columns take.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub unsafe fn split(x: &[f32], k: usize, tiles: &mut [MaybeUninit<Tile>]) {
    debug_assert_eq!(tiles.len(), k.div_ceil(DEPTH) * DIGITS);
    let rows = x.len() / k;
    for (step, tiles) in tiles.chunks_exact_mut(DIGITS).enumerate() {
        let left = k - step * DEPTH;
        let masks = [lanes(left), lanes(left.saturating_sub(SIDE))];
        for row in 0..SIDE {
            let mut rest = [_mm512_setzero_ps(); 2];
            if row < rows {
                let from = x[row * k + step * DEPTH..].as_ptr();
                // SAFETY: only lanes within the row are read.
                rest = unsafe {
                    [
                        _mm512_maskz_loadu_ps(masks[0], from),
                        _mm512_maskz_loadu_ps(masks[1], from.wrapping_add(SIDE)),
                    ]
                };
            }
            for tile in &mut *tiles {
                let digits = [digit(rest[0]), digit(rest[1])];
                // SAFETY: a tile has 32 values of each of 16 rows.
                unsafe {
                    let to = tile.as_mut_ptr().cast::<u16>().add(row * DEPTH);
                    _mm512_store_si512(to.cast(), narrow(digits));
                }
                rest = [_mm512_sub_ps(rest[0], digits[0]), _mm512_sub_ps(rest[1], digits[1])];
            }
        }
    }
}

/// [`split`], of the right factor.
///
/// # Safety
/// As of [`split`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub unsafe fn split_transposed(x: &[f32], k: usize, tiles: &mut [MaybeUninit<Tile>]) {
    // SAFETY: by this function's own contract.
    unsafe { split(x, k, tiles) };
    for tile in tiles {
        // SAFETY: it is written just now, 16 lines of 16 pairs.
        unsafe { transpose(&mut *tile.as_mut_ptr().cast()) };
    }
}

/// Lines of pairs become columns of them.
#[target_feature(enable = "avx512f")]
fn transpose(pairs: &mut [[u32; SIDE]; SIDE]) {
    let mut x = [_mm512_setzero_si512(); SIDE];
    for (x, line) in x.iter_mut().zip(&*pairs) {
        // SAFETY: 16 numbers are read.
        *x = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
    }
    let mut y = x;
    for i in (0..SIDE).step_by(2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for i in (0..SIDE).step_by(4) {
        for j in 0..2 {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
        }
    }
    // Of lines 4i to 4i + 3, x[4i + c] has the columns c, c + 4, c + 8 and c + 12.
    for c in 0..4 {
        let even = |a, b| _mm512_shuffle_i32x4::<0x88>(a, b);
        let odd = |a, b| _mm512_shuffle_i32x4::<0xdd>(a, b);
        let (first, second) = ((x[c], x[4 + c]), (x[8 + c], x[12 + c]));
        let (a, b) = (even(first.0, first.1), even(second.0, second.1));
        (y[c], y[8 + c]) = (even(a, b), odd(a, b));
        let (a, b) = (odd(first.0, first.1), odd(second.0, second.1));
        (y[4 + c], y[12 + c]) = (even(a, b), odd(a, b));
    }
    for (line, y) in pairs.iter_mut().zip(y) {
        // SAFETY: 16 numbers are written.
        unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), y) };
    }
}

/// Rows of `x` with those of `w`, whose strips of 16 rows have `strip` tiles: `y` has rows of `n` values.
///
/// # Safety
/// The CPU multiplies tiles, and this process may; all tiles are written.
pub unsafe fn multiply(
    x: &[MaybeUninit<Tile>],
    w: &[MaybeUninit<Tile>],
    strip: usize,
    y: &mut [f32],
    n: usize,
) {
    let mut products = Products([[0.0; BLOCK]; BLOCK]);
    // All of them tiles of 64 bytes a row.
    let shapes = Shapes::new([(16, 64); 8]);
    // SAFETY: the shapes are those of palette 1; the caller may use tiles.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly, preserves_flags)) };
    // 32 rows of `w` stay in the core's cache while they meet all of `x`, which does too.
    for (w, column) in w.chunks_exact(2 * strip).zip((0..n).step_by(BLOCK)) {
        let width = BLOCK.min(n - column);
        for (x, y) in x.chunks_exact(2 * strip).zip(y.chunks_mut(BLOCK * n)) {
            let whole = width == BLOCK && y.len() == BLOCK * n;
            let (to, stride) = match whole {
                true => (y[column..].as_mut_ptr(), n),
                false => (products.0.as_mut_ptr().cast(), BLOCK),
            };
            // SAFETY: both factors have 32 rows of tiles, and there is room for 32 rows of 32 values.
            unsafe { multiply_block(x, w, strip, to, stride) };
            if !whole {
                for (y, products) in y.chunks_exact_mut(n).zip(&products.0) {
                    y[column..column + width].copy_from_slice(&products[..width]);
                }
            }
        }
    }
    // SAFETY: as above. A thread that uses no tiles is cheaper to interrupt.
    unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
}

/// Products of 32 rows with 32, each two strips of tiles, into rows of `stride` values.
///
/// # Safety
/// The registers have their [`Shapes`]; all tiles are written; there are 32 rows of 32 values to write.
#[inline]
unsafe fn multiply_block(
    x: &[MaybeUninit<Tile>],
    w: &[MaybeUninit<Tile>],
    strip: usize,
    y: *mut f32,
    stride: usize,
) {
    debug_assert!(x.len() == 2 * strip && w.len() == 2 * strip && strip.is_multiple_of(DIGITS));
    // By step, the products of small digits first: each factor's next digits are read while others are multiplied.
    // SAFETY: what is read and written is there, by this function's own contract; no other code uses tiles.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{x} + {line}*1]",
            "tileloadd tmm6, [{w} + {line}*1 + 2048]",
            "tileloadd tmm5, [{x2} + {line}*1]",
            "tileloadd tmm7, [{w2} + {line}*1 + 2048]",
            // The first digits of x, the third of w.
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloadd tmm6, [{w} + {line}*1 + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm7, [{w2} + {line}*1 + 1024]",
            // The first, the second.
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm4, [{x} + {line}*1 + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm5, [{x2} + {line}*1 + 1024]",
            // The second, the second.
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloadd tmm6, [{w} + {line}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm7, [{w2} + {line}*1]",
            // The second, the first.
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm4, [{x} + {line}*1 + 2048]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm5, [{x2} + {line}*1 + 2048]",
            // The third, the first.
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm4, [{x} + {line}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm5, [{x2} + {line}*1]",
            // The first, the first.
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {x}, 3072", "add {x2}, 3072", "add {w}, 3072", "add {w2}, 3072",
            "dec {steps}", "jnz 2b",
            "tilestored [{y} + {stride}*1], tmm0",
            "tilestored [{y} + {stride}*1 + 64], tmm1",
            "tilestored [{y2} + {stride}*1], tmm2",
            "tilestored [{y2} + {stride}*1 + 64], tmm3",
            x = inout(reg) x.as_ptr() => _,
            x2 = inout(reg) x[strip..].as_ptr() => _,
            w = inout(reg) w.as_ptr() => _,
            w2 = inout(reg) w[strip..].as_ptr() => _,
            steps = inout(reg) strip / DIGITS => _,
            y = in(reg) y,
            y2 = in(reg) y.add(SIDE * stride),
            line = in(reg) size_of::<Tile>() / SIDE,
            stride = in(reg) stride * size_of::<f32>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
            out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
