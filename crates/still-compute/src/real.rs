//! The floating-point types that the CPU kernels run in.

use candle_core::WithDType;
use num_traits::Float;

use crate::rows::Rows;
use crate::vector;

/// A float that the CPU kernels are generic over: f32 to run, f64 to check gradients against.
pub trait Real: Rows + Float + WithDType + Default + std::iter::Sum + std::fmt::Debug {
    /// Nearest value to `x`.
    fn of(x: f64) -> Self;
    /// The same value.
    fn of_f32(x: f32) -> Self;
    /// As f64, exactly.
    fn wide(self) -> f64;
    /// `e^x`. For f32 a branch-free polynomial that the compiler vectorises (within 2 ulp).
    fn fast_exp(self) -> Self;
    /// The same values, if this is f32.
    fn as_f32s(values: &[Self]) -> Option<&[f32]>;
    /// [`Real::as_f32s`], to write.
    fn as_f32s_mut(values: &mut [Self]) -> Option<&mut [f32]>;
    /// From f32 values, exactly.
    fn from_f32s(values: Vec<f32>) -> Vec<Self>;
    /// [`vector::vectorize`] for f32. f64 checks gradients and is run as it is: vector code for it would double what has to
    /// be compiled.
    fn vectorize<R>(body: impl FnOnce() -> R) -> R;
    /// [`Real::vectorize`] for a small batch of rows: `body` is told whether to go through several of them at a time. One at a
    /// time gives the same results and is a fourth of the code, which is all that is compiled where there are no vectors.
    fn vectorize_batch<R>(body: impl FnOnce(bool) -> R) -> R;
}

impl Real for f64 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn of_f32(x: f32) -> Self {
        f64::from(x)
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }

    #[inline(always)]
    fn fast_exp(self) -> Self {
        self.exp()
    }

    fn as_f32s(_: &[f64]) -> Option<&[f32]> {
        None
    }

    fn as_f32s_mut(_: &mut [f64]) -> Option<&mut [f32]> {
        None
    }

    fn from_f32s(values: Vec<f32>) -> Vec<f64> {
        values.into_iter().map(f64::from).collect()
    }

    #[inline(always)]
    fn vectorize<R>(body: impl FnOnce() -> R) -> R {
        body()
    }

    #[inline(always)]
    fn vectorize_batch<R>(body: impl FnOnce(bool) -> R) -> R {
        body(false)
    }
}

impl Real for f32 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }

    #[inline(always)]
    fn of_f32(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn fast_exp(self) -> Self {
        // Range reduction x = n ln 2 + r, |r| ≤ ln 2 / 2, ln 2 in two parts so that r is exact,
        // then the degree-6 Taylor-like minimax polynomial of Cephes' expf.
        // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits: a conversion to i32 would
        // not vectorise, because it has to saturate.
        const ROUND: f32 = 12_582_912.0;
        let x = self.clamp(-104.0, 88.7);
        let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = n.mul_add(-0.693_359_4, x);
        let r = n.mul_add(2.121_944_4e-4, r);
        let mut p = 1.987_569_1e-4_f32;
        p = p.mul_add(r, 1.398_199_9e-3);
        p = p.mul_add(r, 8.333_452e-3);
        p = p.mul_add(r, 4.166_579_6e-2);
        p = p.mul_add(r, 1.666_666_5e-1);
        p = p.mul_add(r, 0.5);
        let y = p.mul_add(r * r, r) + 1.0;
        // 2^n in two factors keeps the subnormal range right without a branch.
        let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let half = n >> 1;
        let scale = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
        if self < -103.9 { 0.0 } else { y * scale(half) * scale(n.wrapping_sub(half)) }
    }

    fn as_f32s(values: &[f32]) -> Option<&[f32]> {
        Some(values)
    }

    fn as_f32s_mut(values: &mut [f32]) -> Option<&mut [f32]> {
        Some(values)
    }

    fn from_f32s(values: Vec<f32>) -> Vec<f32> {
        values
    }

    #[inline(always)]
    fn vectorize<R>(body: impl FnOnce() -> R) -> R {
        vector::vectorize(body)
    }

    #[inline(always)]
    fn vectorize_batch<R>(body: impl FnOnce(bool) -> R) -> R {
        vector::vectorize_batch(body)
    }
}

#[cfg(test)]
mod tests {
    use super::Real;

    #[test]
    fn fast_exp_is_within_two_ulp() {
        let mut worst = 0.0_f64;
        for i in -870_000..=887_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(x.fast_exp()) - exact).abs() / exact;
            worst = worst.max(error);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst:e}");
        assert_eq!(f32::NEG_INFINITY.fast_exp(), 0.0);
        assert!(f32::NAN.fast_exp().is_nan());
        assert_eq!(0.0_f32.fast_exp(), 1.0);
    }
}
