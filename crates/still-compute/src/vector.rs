//! Elementwise loops over slices, in the form that the compiler vectorises, and the one place where it is told for
//! which CPU.

use crate::real::Real;

/// Runs `body` compiled for the widest vectors that this CPU has, as found at run time.
///
/// What `body` calls must be `#[inline(always)]` to be compiled so too, and `body` itself should be written
/// `#[inline(always)] || …`. Enter once per block of rows: within, a second call only stands in the way.
#[inline(always)]
pub fn vectorize<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// [`vectorize`], which tells `body` whether there are vectors: a constant where it is compiled.
#[inline(always)]
pub fn vectorize_batch<R>(body: impl FnOnce(bool) -> R) -> R {
    struct Batch<F>(F);
    impl<R, F: FnOnce(bool) -> R> pulp::WithSimd for Batch<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> R {
            (self.0)(S::F32_LANES > 1)
        }
    }
    pulp::Arch::new().dispatch(Batch(body))
}

/// Bytes between what is used and what [`prefetch`] asks for.
const AHEAD: usize = 4096;

/// Asks for the memory some way past `values` to be brought near, as many bytes as they have.
///
/// What is read once a step comes from far away, and what the processor fetches by itself does not hide all of that.
#[inline(always)]
pub fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..size_of_val(values)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let address = values.as_ptr().cast::<i8>().wrapping_add(at + AHEAD);
        // SAFETY: prefetching has no effect but on speed, whatever the address; it may lie past the values' memory.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, AHEAD);
}

/// Partial results kept side by side: one vector register's worth, so that a reduction vectorises.
const LANES: usize = 16;

/// Name of the vector code that [`vectorize`] runs on this CPU.
pub fn level() -> &'static str {
    struct Lanes;
    impl pulp::WithSimd for Lanes {
        type Output = usize;
        fn with_simd<S: pulp::Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    match (pulp::Arch::new().dispatch(Lanes), cfg!(target_arch = "x86_64")) {
        (16, true) => "AVX-512",
        (8, true) => "AVX2",
        (1, _) => "portable",
        (_, false) => "NEON or like",
        _ => "unknown",
    }
}

/// Whether sums of 64 columns of a few rows fit in the registers of [`vectorize`]'s code.
#[inline(always)]
pub fn has_many_registers() -> bool {
    #[cfg(target_arch = "x86_64")]
    return matches!(pulp::Arch::new(), pulp::Arch::V4(_));
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Folds lanes by halves: a chain over all of them would cost more than the row that they came from.
#[inline(always)]
fn fold<T: Real>(mut lanes: [T; LANES], pick: impl Fn(T, T) -> T) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = pick(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// What is left of a row after its whole blocks, as one more block.
#[inline(always)]
fn padded<T: Real>(rest: &[T], padding: T) -> [T; LANES] {
    let mut block = [padding; LANES];
    for (to, &from) in block.iter_mut().zip(rest) {
        *to = from;
    }
    block
}

/// What is left of all values after `pick` took one of two again and again; −∞ of an empty slice.
#[inline(always)]
fn pick_one<T: Real>(row: &[T], pick: impl Fn(T, T) -> T + Copy) -> T {
    // Several chains of comparisons, which need not wait for each other.
    const CHAINS: usize = 4;
    let mut lanes = [[T::neg_infinity(); LANES]; CHAINS];
    let (blocks, rest) = row.as_chunks::<LANES>();
    let (groups, blocks) = blocks.as_chunks::<CHAINS>();
    for group in groups {
        for (lanes, block) in lanes.iter_mut().zip(group) {
            for i in 0..LANES {
                lanes[i] = pick(lanes[i], block[i]);
            }
        }
    }
    let [mut first, others @ ..] = lanes;
    for block in others.iter().chain(blocks).chain([&padded(rest, T::neg_infinity())]) {
        for i in 0..LANES {
            first[i] = pick(first[i], block[i]);
        }
    }
    fold(first, pick)
}

/// The largest value; `−∞` of an empty slice. NaN if any value is NaN.
#[inline(always)]
pub fn max<T: Real>(row: &[T]) -> T {
    pick_one(row, |a, b| if a > b || a.is_nan() { a } else { b })
}

/// What a softmax subtracts from its logits: the largest number among them, `−∞` if there is none.
///
/// NaN is left out, at half the cost of [`max`], since what follows brings it back: [`exp_sub_sum`] of a row with a NaN is NaN.
#[inline(always)]
pub fn softmax_shift<T: Real>(row: &[T]) -> T {
    pick_one(row, |a, b| if b > a { b } else { a })
}

/// The sum, in lanes (its rounding differs from left-to-right).
#[inline(always)]
pub fn sum<T: Real>(row: &[T]) -> T {
    let mut lanes = [T::zero(); LANES];
    let (blocks, rest) = row.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            lanes[i] += block[i];
        }
    }
    let rest = padded(rest, T::zero());
    for i in 0..LANES {
        lanes[i] += rest[i];
    }
    fold(lanes, |a, b| a + b)
}

/// `Σ a_i b_i`.
#[inline(always)]
pub fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    assert_eq!(a.len(), b.len(), "dot of slices of different lengths");
    let mut lanes = [T::zero(); LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    let rest: T = a_rest.iter().zip(b_rest).map(|(&a, &b)| a * b).sum();
    fold(lanes, |a, b| a + b) + rest
}

/// `y += a x`.
#[inline(always)]
pub fn axpy<T: Real>(y: &mut [T], a: T, x: &[T]) {
    assert_eq!(y.len(), x.len(), "axpy of slices of different lengths");
    for (y, &x) in y.iter_mut().zip(x) {
        *y = a.mul_add(x, *y);
    }
}

/// `x_i = e^{x_i − shift}`; returns their sum.
#[inline(always)]
pub fn exp_sub_sum<T: Real>(row: &mut [T], shift: T) -> T {
    let mut lanes = [T::zero(); LANES];
    let (blocks, rest) = row.as_chunks_mut::<LANES>();
    // The block itself and the sum have no part in common until the end: the sum stays in a register.
    let exp = |block: &[T; LANES]| {
        let mut e = [T::zero(); LANES];
        for i in 0..LANES {
            e[i] = (block[i] - shift).fast_exp();
        }
        e
    };
    for block in blocks {
        let e = exp(block);
        *block = e;
        for i in 0..LANES {
            lanes[i] += e[i];
        }
    }
    if !rest.is_empty() {
        let e = exp(&padded(rest, T::neg_infinity()));
        rest.copy_from_slice(&e[..rest.len()]);
        for i in 0..LANES {
            lanes[i] += e[i];
        }
    }
    fold(lanes, |a, b| a + b)
}

/// Softmax in place.
#[inline(always)]
pub fn softmax<T: Real>(row: &mut [T]) {
    let shift = softmax_shift(row);
    let scale = T::one() / exp_sub_sum(row, shift);
    for x in row.iter_mut() {
        *x *= scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_cover_whole_blocks_and_the_rest() {
        for n in [0, 1, 15, 16, 17, 40] {
            let row: Vec<f64> = (0..n).map(|i| f64::from(i * 7 % 11) - 3.0).collect();
            assert_eq!(sum(&row), row.iter().sum::<f64>());
            assert_eq!(dot(&row, &row), row.iter().map(|x| x * x).sum::<f64>());
            let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert_eq!((max(&row), softmax_shift(&row)), (largest, largest));
        }
    }

    #[test]
    fn max_lets_nan_through() {
        for at in [0, 5, 17] {
            let mut row = vec![1.0_f32; 18];
            row[at] = f32::NAN;
            assert!(max(&row).is_nan(), "NaN at {at} was dropped");
        }
    }

    #[test]
    fn softmax_lets_nan_through() {
        for n in [1, 18, 64, 130] {
            for at in [0, n / 2, n - 1] {
                let mut row = vec![1.0_f32; n];
                row[at] = f32::NAN;
                assert_eq!(softmax_shift(&row), if n == 1 { f32::NEG_INFINITY } else { 1.0 });
                softmax(&mut row);
                assert!(row.iter().all(|x| x.is_nan()), "NaN at {at} of {n} was dropped");
            }
        }
    }
}
