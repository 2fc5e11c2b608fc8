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
