//! The start of a backward pass from a known gradient.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};

/// A scalar, 0, whose gradient with respect to `output` is `gradient`: its `backward()` carries on a pass that was cut.
///
/// `Σ output ⊙ gradient` has the same gradient, but computes and stores three tensors to get it.
///
/// # Errors
/// Shapes that differ.
pub fn pull_back(output: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    if output.dims() != gradient.dims() {
        candle_core::bail!("pull_back: {:?} and {:?}", output.dims(), gradient.dims())
    }
    output.apply_op1(PullBack(gradient.detach()))
}

struct PullBack(Tensor);

impl CustomOp1 for PullBack {
    fn name(&self) -> &'static str {
        "pull_back"
    }

    fn cpu_fwd(&self, _output: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, output: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let scalar = Shape::from(());
        Ok((output.device().zeros_impl(&scalar, DType::F32)?, scalar))
    }

    fn bwd(&self, _output: &Tensor, _zero: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn a_cut_backward_pass_goes_on_where_it_was_cut() {
        let tensor = |values: [f64; 6]| Tensor::from_slice(&values, (2, 3), &Device::Cpu).unwrap();
        let x = Var::from_tensor(&tensor([1.0, -2.0, 3.0, 0.5, 0.0, 4.0])).unwrap();
        let y = (x.as_tensor() * 3.0).unwrap();
        let gradient = tensor([0.25, 1.0, -1.0, 2.0, 5.0, -0.5]);
        let grads = pull_back(&y, &gradient).unwrap().backward().unwrap();
        let got: Vec<f64> = grads.get(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(got, [0.75, 3.0, -3.0, 6.0, 15.0, -1.5]);
        assert!(pull_back(&y, &gradient.flatten_all().unwrap()).is_err());
    }
}
