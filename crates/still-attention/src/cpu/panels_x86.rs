//! [`PanelKeys::attend`] in AVX-512, and which kernels there are.

use std::arch::x86_64::*;

use pulp::x86::V3;

use super::{PanelKeys, Panels, Softmax, avx2};
use crate::cpu::key_store::TILE;
use still_compute::Real;

/// Queries and vectors of 16 columns whose sums fill the registers.
const ROWS: usize = 6;
const COLUMNS: usize = 4;

/// Queries, and keys, that are worked on together: at 64 channels 8 KB of bf16 keys or 16 KB of f32 ones, 16 KB of values and 6 KB
/// of logits, which the first cache holds.
const STRIP: usize = 4 * ROWS;
const BLOCK: usize = 4 * TILE;

/// Whether this CPU has AVX512_BF16.
pub fn pairs_multiply() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// Whether this CPU has AVX2.
pub fn singles_multiply() -> bool {
    V3::try_new().is_some()
}

pub(super) fn attend(
    keys: &PanelKeys<'_>,
    q: &[f32],
    softmax: Softmax<'_, f32>,
    lines: &mut Vec<u32>,
) {
    let d = keys.head_dim;
    lines.clear();
    match keys.k {
        Panels::Pairs(panels) => {
            assert!(pairs_multiply(), "this CPU does not multiply pairs");
            for row in q.chunks_exact(d) {
                // SAFETY: the CPU has the features.
                lines.extend(row.chunks(TILE).flat_map(|x| unsafe { narrow(x) }));
            }
            // SAFETY: as above.
            unsafe { attend_lines::<Pairs>(panels, keys, lines, softmax) }
        }
        Panels::Singles(panels) if !is_x86_feature_detected!("avx512f") => {
            let simd = V3::try_new().expect("keys are in panels only where there is AVX2");
            // SAFETY: `simd` proves that the CPU has the features.
            unsafe { avx2::attend(simd, panels, keys, q, softmax) };
        }
        Panels::Singles(panels) => {
            lines.extend(q.iter().map(|x| x.to_bits()));
            // SAFETY: an f32 and a u32 are of one size and alignment, and any bits are a u32.
            let panels =
                unsafe { std::slice::from_raw_parts(panels.as_ptr().cast(), panels.len()) };
            // SAFETY: the CPU has the feature.
            unsafe { attend_lines::<Singles>(panels, keys, lines, softmax) }
        }
    }
}

/// How lines of queries and of keys are multiplied.
trait Lines {
    /// Lines of a panel of keys of `d` channels.
    fn of(d: usize) -> usize;

    /// Products of `R` queries, rows of `width` lines, and `P` panels, into columns from `column` on.
    ///
    /// # Safety
    /// The CPU multiplies such lines.
    unsafe fn dot_tile<const R: usize, const P: usize>(
        q: (&[u32], usize),
        panels: (&[[u32; TILE]], usize),
        to: &mut [[f32; BLOCK]],
        column: usize,
    );
}

/// Two channels in bf16.
struct Pairs;

/// One channel in f32.
struct Singles;

/// The body of [`Lines::dot_tile`]: what a line of a query is as a vector, and how it is multiplied.
macro_rules! dot_tile {
    ($q:ident, $panels:ident, $to:ident, $column:ident, $multiply:expr) => {
        let ((q, width), (panels, lines)) = ($q, $panels);
        assert!(q.len() >= (R - 1) * width + lines && panels.len() >= P * lines);
        assert!($to.len() >= R && $column + P * TILE <= BLOCK);
        let mut sums = [[_mm512_setzero_ps(); P]; R];
        for line in 0..lines {
            let mut keys = [_mm512_setzero_si512(); P];
            for p in 0..P {
                // SAFETY: `panels` has line `line` of panel `p`, as asserted.
                keys[p] =
                    unsafe { _mm512_loadu_si512(panels.as_ptr().add(p * lines + line).cast()) };
            }
            for r in 0..R {
                // SAFETY: `q` has line `line` of row `r`, as asserted.
                let x = _mm512_set1_epi32(unsafe { *q.as_ptr().add(r * width + line) } as i32);
                for p in 0..P {
                    sums[r][p] = $multiply(sums[r][p], x, keys[p]);
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                // SAFETY: row `r` has 16 columns from here on, as asserted.
                unsafe {
                    _mm512_storeu_ps($to[r].as_mut_ptr().add($column + p * TILE), sums[r][p])
                };
            }
        }
    };
}

impl Lines for Pairs {
    fn of(d: usize) -> usize {
        d.div_ceil(2)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn dot_tile<const R: usize, const P: usize>(
        q: (&[u32], usize),
        panels: (&[[u32; TILE]], usize),
        to: &mut [[f32; BLOCK]],
        column: usize,
    ) {
        dot_tile!(q, panels, to, column, |sum, x, keys| {
            _mm512_dpbf16_ps(sum, as_bf16(x), as_bf16(keys))
        });
    }
}

impl Lines for Singles {
    fn of(d: usize) -> usize {
        d
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn dot_tile<const R: usize, const P: usize>(
        q: (&[u32], usize),
        panels: (&[[u32; TILE]], usize),
        to: &mut [[f32; BLOCK]],
        column: usize,
    ) {
        dot_tile!(q, panels, to, column, |sum, x, keys| {
            _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(keys), sum)
        });
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn as_bf16(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes for which every bit pattern is valid.
    unsafe { std::mem::transmute(x) }
}

/// The first `count` lanes, at most all.
fn lanes(count: usize) -> __mmask16 {
    if count >= 16 { !0 } else { (1 << count) - 1 }
}

/// `q` has a row of lines for each row of the softmax.
///
/// # Safety
/// The CPU multiplies such lines.
#[target_feature(enable = "avx512f")]
unsafe fn attend_lines<L: Lines>(
    panels: &[[u32; TILE]],
    keys: &PanelKeys<'_>,
    q: &[u32],
    softmax: Softmax<'_, f32>,
) {
    let (d, count) = (keys.head_dim, keys.len());
    let (lines, rows) = (L::of(d), softmax.denominator.len());
    let width = q.len() / rows.max(1);
    let mut logits = [[0.0_f32; BLOCK]; STRIP];
    let strips = q.chunks(STRIP * width).zip(softmax.attended.chunks_mut(STRIP * d));
    let running = softmax.denominator.chunks_mut(STRIP).zip(softmax.maximum.chunks_mut(STRIP));
    for ((q, attended), (denominator, maximum)) in strips.zip(running) {
        let rows = denominator.len();
        let mut sums = [_mm512_setzero_ps(); STRIP];
        for (sum, &mut denominator) in sums.iter_mut().zip(&mut *denominator) {
            *sum = _mm512_maskz_mov_ps(1, _mm512_set1_ps(denominator));
        }
        for start in (0..count).step_by(BLOCK) {
            let length = BLOCK.min(count - start);
            let panels = &panels[start / TILE * lines..][..length.div_ceil(TILE) * lines];
            for (q, logits) in q.chunks(ROWS * width).zip(logits.chunks_mut(ROWS)) {
                // SAFETY: by this function's own contract.
                unsafe { dots::<L>((q, width), (panels, lines), logits) };
            }
            for (row, logits) in logits[..rows].iter_mut().enumerate() {
                let attended = &mut attended[row * d..(row + 1) * d];
                weigh(logits, length, attended, &mut sums[row], &mut maximum[row]);
            }
            let v = &keys.v[start * d..(start + length) * d];
            for (weights, attended) in
                logits[..rows].chunks(ROWS).zip(attended.chunks_mut(ROWS * d))
            {
                add_values(weights, v, d, attended);
            }
        }
        for (denominator, sum) in denominator.iter_mut().zip(sums) {
            *denominator = _mm512_reduce_add_ps(sum);
        }
    }
}

/// Up to 16 values in bf16, two by two.
#[target_feature(enable = "avx512f,avx512bf16")]
fn narrow(x: &[f32]) -> [u32; TILE / 2] {
    // SAFETY: only as many lanes as `x` has values are read; both types of the result are 32 bytes of plain numbers.
    unsafe {
        let wide = _mm512_maskz_loadu_ps(lanes(x.len()), x.as_ptr());
        std::mem::transmute(_mm512_cvtneps_pbh(wide))
    }
}

/// Products of up to 6 queries with up to 4 panels of keys.
///
/// # Safety
/// The CPU multiplies such lines.
#[target_feature(enable = "avx512f")]
unsafe fn dots<L: Lines>(
    (q, width): (&[u32], usize),
    (panels, lines): (&[[u32; TILE]], usize),
    to: &mut [[f32; BLOCK]],
) {
    let (all_rows, all_panels) = (q.len() == ROWS * width, panels.len() == COLUMNS * lines);
    let each_panel = || panels.chunks_exact(lines).zip((0..).step_by(TILE));
    // SAFETY: by this function's own contract.
    unsafe {
        match (all_rows, all_panels) {
            (true, true) => L::dot_tile::<ROWS, COLUMNS>((q, width), (panels, lines), to, 0),
            (true, false) => {
                for (panel, column) in each_panel() {
                    L::dot_tile::<ROWS, 1>((q, width), (panel, lines), to, column);
                }
            }
            (false, true) => {
                for (row, q) in q.chunks_exact(width).enumerate() {
                    L::dot_tile::<1, COLUMNS>((q, width), (panels, lines), &mut to[row..], 0);
                }
            }
            (false, false) => {
                for (row, q) in q.chunks_exact(width).enumerate() {
                    for (panel, column) in each_panel() {
                        L::dot_tile::<1, 1>((q, width), (panel, lines), &mut to[row..], column);
                    }
                }
            }
        }
    }
}

/// Turns the first `count` logits of a row into `e^{s − m}`, the others into 0; a larger maximum shrinks what was added before. `sum`
/// is the denominator, lane by lane.
#[target_feature(enable = "avx512f")]
fn weigh(
    logits: &mut [f32; BLOCK],
    count: usize,
    attended: &mut [f32],
    sum: &mut __m512,
    maximum: &mut f32,
) {
    let low = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut x = [low; BLOCK / TILE];
    for (i, (x, logits)) in x.iter_mut().zip(logits.as_chunks::<TILE>().0).enumerate() {
        let seen = lanes(count.saturating_sub(i * TILE));
        // SAFETY: there are 16 values.
        *x = unsafe { _mm512_mask_loadu_ps(low, seen, logits.as_ptr()) };
    }
    // A NaN may get lost here, but not in the exponential below.
    let top = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
    if _mm512_cmp_ps_mask::<_CMP_GT_OQ>(top, _mm512_set1_ps(*maximum)) != 0 {
        let top = _mm512_reduce_max_ps(top);
        let shrink = (*maximum - top).fast_exp();
        *sum = _mm512_mul_ps(*sum, _mm512_set1_ps(shrink));
        attended.iter_mut().for_each(|sum| *sum *= shrink);
        *maximum = top;
    }
    let shift = _mm512_set1_ps(*maximum);
    for (x, logits) in x.iter().zip(logits.as_chunks_mut::<TILE>().0) {
        let weight = exp(_mm512_sub_ps(*x, shift));
        *sum = _mm512_add_ps(*sum, weight);
        // SAFETY: there are 16 values.
        unsafe { _mm512_storeu_ps(logits.as_mut_ptr(), weight) };
    }
}

/// `e^x` of `x ≤ 0`, within 2 ulp; 0 below the smallest normal number, NaN of NaN.
#[target_feature(enable = "avx512f")]
fn exp(x: __m512) -> __m512 {
    // As `Real::fast_exp`, but the instruction that scales by 2^n needs neither the range of n looked after nor two steps.
    // The bound comes first: of a NaN and a number this instruction gives the second.
    let x = _mm512_max_ps(_mm512_set1_ps(-200.0), x);
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
        _mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)),
    );
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693_359_4), x);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.121_944_4e-4), r);
    let mut p = _mm512_set1_ps(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    let one = _mm512_set1_ps(1.0);
    _mm512_scalef_ps(_mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), one), n)
}

/// Adds the rows of `v`, `d` values each, times the weights of up to 6 queries.
#[target_feature(enable = "avx512f")]
fn add_values(weights: &[[f32; BLOCK]], v: &[f32], d: usize, out: &mut [f32]) {
    let full = d / (COLUMNS * TILE) * COLUMNS * TILE;
    if weights.len() == ROWS {
        for column in (0..full).step_by(COLUMNS * TILE) {
            add_tile::<ROWS, COLUMNS>(weights, v, d, column, out);
        }
        for column in (full..d).step_by(TILE) {
            add_tile::<ROWS, 1>(weights, v, d, column, out);
        }
        return;
    }
    for (weights, out) in weights.iter().zip(out.chunks_exact_mut(d)) {
        for column in (0..full).step_by(COLUMNS * TILE) {
            add_tile::<1, COLUMNS>(std::slice::from_ref(weights), v, d, column, out);
        }
        for column in (full..d).step_by(TILE) {
            add_tile::<1, 1>(std::slice::from_ref(weights), v, d, column, out);
        }
    }
}

/// `R` queries and the columns from `column` on, `C` vectors of them; the last may be cut by the end of a row.
#[target_feature(enable = "avx512f")]
fn add_tile<const R: usize, const C: usize>(
    weights: &[[f32; BLOCK]],
    v: &[f32],
    d: usize,
    column: usize,
    out: &mut [f32],
) {
    let keys = v.len() / d;
    assert!(weights.len() >= R && keys <= BLOCK && out.len() >= R * d);
    assert!(column + (C - 1) * TILE < d);
    let last = lanes(d - column - (C - 1) * TILE);
    let seen = |c: usize| if c + 1 < C { !0 } else { last };
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    for key in 0..keys {
        let mut values = [_mm512_setzero_ps(); C];
        for c in 0..C {
            // SAFETY: only lanes within row `key` are read, and `v` has that row.
            values[c] = unsafe {
                let from = v.as_ptr().add(key * d + column + c * TILE);
                _mm512_maskz_loadu_ps(seen(c), from)
            };
        }
        for r in 0..R {
            // SAFETY: there are `R` rows of weights, and at most `BLOCK` keys, as asserted.
            let weight = _mm512_set1_ps(unsafe { *weights.get_unchecked(r).get_unchecked(key) });
            for c in 0..C {
                sums[r][c] = _mm512_fmadd_ps(weight, values[c], sums[r][c]);
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            // SAFETY: only lanes within row `r` of `out` are read and written, and `out` has that row.
            unsafe {
                let to = out.as_mut_ptr().add(r * d + column + c * TILE);
                let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(seen(c), to), sums[r][c]);
                _mm512_mask_storeu_ps(to, seen(c), sum);
            }
        }
    }
}
