//! Random tensors of a seed, alike on every platform.

use candle_core::{DType, Device, Shape, Tensor};

/// Uniform values in [-2, 2), f64 on the CPU.
pub fn random(shape: impl Into<Shape>, seed: u64) -> Tensor {
    uniform(shape, 2.0, seed)
}

/// [`random`], rounded to f32.
pub fn random_f32(shape: impl Into<Shape>, seed: u64) -> Tensor {
    random(shape, seed).to_dtype(DType::F32).unwrap()
}

/// Uniform values in [-reach, reach), f64 on the CPU.
pub fn uniform(shape: impl Into<Shape>, reach: f64, seed: u64) -> Tensor {
    let shape = shape.into();
    let value = |i| reach * (2.0 * still_compute::random::uniform(seed, [0, 0, i]) - 1.0);
    let values: Vec<f64> = (0..shape.elem_count()).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fill_their_range_and_depend_on_the_seed() {
        let values = |seed| uniform((40, 25), 3.0, seed).flatten_all().unwrap().to_vec1().unwrap();
        let (a, b): (Vec<f64>, Vec<f64>) = (values(1), values(2));
        assert!(a.iter().all(|x| (-3.0..3.0).contains(x)));
        assert!(a.iter().any(|x| *x < -2.9) && a.iter().any(|x| *x > 2.9));
        assert_eq!(a, values(1));
        assert_ne!(a, b);
    }
}
