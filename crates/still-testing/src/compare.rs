//! Comparators: shape, dtype and finiteness first, then errors.

use candle_core::{DType, Tensor};

/// What can be compared.
pub trait Values {
    /// Shape and dtype. Both sides of a comparison must have the same.
    fn form(&self) -> (Vec<usize>, DType);

    /// All values, row by row.
    fn values(&self) -> Vec<f64>;
}

impl Values for [f32] {
    fn form(&self) -> (Vec<usize>, DType) {
        (vec![self.len()], DType::F32)
    }

    fn values(&self) -> Vec<f64> {
        self.iter().copied().map(f64::from).collect()
    }
}

impl Values for [f64] {
    fn form(&self) -> (Vec<usize>, DType) {
        (vec![self.len()], DType::F64)
    }

    fn values(&self) -> Vec<f64> {
        self.to_vec()
    }
}

/// Rows of one length.
impl Values for [Vec<f32>] {
    fn form(&self) -> (Vec<usize>, DType) {
        let columns = self.first().map_or(0, Vec::len);
        assert!(self.iter().all(|row| row.len() == columns), "rows of different lengths");
        (vec![self.len(), columns], DType::F32)
    }

    fn values(&self) -> Vec<f64> {
        self.iter().flatten().copied().map(f64::from).collect()
    }
}

impl<T> Values for Vec<T>
where
    [T]: Values,
{
    fn form(&self) -> (Vec<usize>, DType) {
        self.as_slice().form()
    }

    fn values(&self) -> Vec<f64> {
        self.as_slice().values()
    }
}

impl Values for Tensor {
    fn form(&self) -> (Vec<usize>, DType) {
        (self.dims().to_vec(), self.dtype())
    }

    fn values(&self) -> Vec<f64> {
        let flat = self.contiguous().unwrap().flatten_all().unwrap();
        flat.to_dtype(DType::F64).unwrap().to_vec1().unwrap()
    }
}

/// How far values are from those expected.
#[derive(Clone, Copy, Debug)]
pub struct Errors {
    /// `‖got - expected‖`, the root of the sum of squares.
    pub norm: f64,
    /// `‖expected‖`.
    pub expected_norm: f64,
    /// The largest `|got - expected| / (1 + |expected|)`.
    pub max: f64,
    /// Which value has it.
    pub at: usize,
}

impl Errors {
    /// Compares `got` with `expected`; `what` names the case in failures.
    ///
    /// # Panics
    /// On another shape or dtype, and on a value that is not finite, on either side.
    #[track_caller]
    pub fn of<A, B>(what: &str, got: &A, expected: &B) -> Self
    where
        A: Values + ?Sized,
        B: Values + ?Sized,
    {
        assert_eq!(got.form(), expected.form(), "{what}: shape or dtype differs");
        let (got, expected) = (got.values(), expected.values());
        for (side, values) in [("got", &got), ("expected", &expected)] {
            let wrong = values.iter().position(|x| !x.is_finite());
            assert!(wrong.is_none(), "{what}: value {wrong:?} of those {side} is not finite");
        }
        let mut errors = Self { norm: 0.0, expected_norm: 0.0, max: 0.0, at: 0 };
        for (at, (a, b)) in got.iter().zip(&expected).enumerate() {
            errors.norm += (a - b) * (a - b);
            errors.expected_norm += b * b;
            let error = (a - b).abs() / (1.0 + b.abs());
            if error > errors.max {
                (errors.max, errors.at) = (error, at);
            }
        }
        Self { norm: errors.norm.sqrt(), expected_norm: errors.expected_norm.sqrt(), ..errors }
    }

    /// `‖got - expected‖ / ‖expected‖`.
    ///
    /// # Panics
    /// Where all expected values are zero: nothing is relative to them.
    #[track_caller]
    pub fn relative_rms(&self) -> f64 {
        assert!(self.expected_norm > 0.0, "all expected values are zero");
        self.norm / self.expected_norm
    }
}

/// `‖got - expected‖ / ‖expected‖`.
///
/// # Panics
/// As [`Errors::of`] and [`Errors::relative_rms`].
#[track_caller]
pub fn relative_rms<A, B>(got: &A, expected: &B) -> f64
where
    A: Values + ?Sized,
    B: Values + ?Sized,
{
    Errors::of("relative RMS", got, expected).relative_rms()
}

/// Asserts that `‖got - expected‖ ≤ bound ‖expected‖`.
///
/// # Panics
/// If not, and as [`Errors::of`] and [`Errors::relative_rms`].
#[track_caller]
pub fn assert_relative_rms<A, B>(what: &str, got: &A, expected: &B, bound: f64)
where
    A: Values + ?Sized,
    B: Values + ?Sized,
{
    let errors = Errors::of(what, got, expected);
    let error = errors.relative_rms();
    let Errors { max, at, .. } = errors;
    assert!(
        error <= bound,
        "{what}: relative RMS {error:e} > {bound:e}; the largest error is {max:e}, at {at}"
    );
}

/// Asserts that every `|got - expected| < bound (1 + |expected|)`.
///
/// # Panics
/// If not, and as [`Errors::of`].
#[track_caller]
pub fn assert_max_error<A, B>(what: &str, got: &A, expected: &B, bound: f64)
where
    A: Values + ?Sized,
    B: Values + ?Sized,
{
    let Errors { norm, expected_norm, max, at } = Errors::of(what, got, expected);
    assert!(
        max < bound,
        "{what}: the largest error, at {at}, is {max:e}, not below {bound:e}; norms: {norm:e} of {expected_norm:e}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_those_of_their_definitions() {
        let errors = Errors::of("", &[3.0_f32, 4.0][..], &[3.0_f32, 4.5][..]);
        assert_eq!((errors.norm, errors.at), (0.5, 1));
        assert_eq!(errors.max, 0.5 / 5.5);
        assert_eq!(errors.relative_rms(), 0.5 / 29.25_f64.sqrt());
        assert_relative_rms("", &[1.0, 2.0][..], &[1.0, 2.0][..], 0.0);
    }

    #[test]
    #[should_panic(expected = "shape or dtype differs")]
    fn rows_are_not_columns() {
        assert_max_error("", &vec![vec![1.0_f32], vec![1.0]], &vec![vec![1.0, 1.0]], 1.0);
    }

    #[test]
    #[should_panic(expected = "shape or dtype differs")]
    fn f32_is_not_f64() {
        assert_max_error("", &[1.0_f32][..], &[1.0_f64][..], 1.0);
    }

    #[test]
    #[should_panic(expected = "value Some(1) of those got is not finite")]
    fn nan_is_far_from_everything() {
        assert_relative_rms("", &[1.0, f64::NAN][..], &[1.0, 1.0][..], f64::INFINITY);
    }

    #[test]
    #[should_panic(expected = "of those expected is not finite")]
    fn nothing_is_near_infinity() {
        assert_max_error("", &[1.0][..], &[f64::INFINITY][..], f64::INFINITY);
    }

    #[test]
    #[should_panic(expected = "relative RMS 1e0 > 9.9e-1; the largest error is 5e-1, at 0")]
    fn zeros_in_place_of_values_have_an_error_of_one() {
        assert_relative_rms("", &[0.0, 0.0][..], &[1.0, 1.0][..], 0.99);
    }

    #[test]
    #[should_panic(expected = "is 5e-1, not below 5e-1")]
    fn the_bound_of_the_largest_error_is_not_within_it() {
        assert_max_error("", &[0.0][..], &[1.0][..], 0.5);
    }

    #[test]
    #[should_panic(expected = "all expected values are zero")]
    fn zeros_have_no_relative_error() {
        assert_relative_rms("", &[0.0][..], &[0.0][..], 1.0);
    }
}
