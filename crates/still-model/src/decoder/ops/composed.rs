//! A result that other ops have computed, with a gradient of its own.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail,
};

/// `value`, which is `f(x)` of a detached `x`, in the graph of `x`; `backward(x, dy)` is its gradient.
///
/// # Errors
/// An error of the tensor library.
pub(super) fn of_one(
    x: &Tensor,
    value: Tensor,
    backward: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !x.track_op() {
        return Ok(value);
    }
    x.apply_op1(Composed { value: Mutex::new(Some(value)), backward })
}

/// [`of_one`] of three tensors.
///
/// # Errors
/// An error of the tensor library.
pub(super) fn of_three(
    [x, y, z]: [&Tensor; 3],
    value: Tensor,
    backward: impl Fn([&Tensor; 3], &Tensor) -> Result<[Tensor; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    if ![x, y, z].iter().any(|tensor| tensor.track_op()) {
        return Ok(value);
    }
    x.apply_op3(y, z, Composed { value: Mutex::new(Some(value)), backward })
}

struct Composed<F> {
    /// Until the op takes it.
    value: Mutex<Option<Tensor>>,
    backward: F,
}

impl<F> Composed<F> {
    fn take(&self) -> Result<Tensor> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(value) = value else { bail!("an op's value was asked for twice") };
        // An op's result is a storage of its own, without a layout.
        if value.is_contiguous() && value.layout().start_offset() == 0 {
            Ok(value)
        } else {
            value.force_contiguous()
        }
    }

    fn on_cpu(&self) -> Result<(CpuStorage, Shape)> {
        let value = self.take()?;
        match &*value.storage_and_layout().0 {
            Storage::Cpu(storage) => Ok((storage.clone(), value.shape().clone())),
            _ => bail!("expected a value on the CPU"),
        }
    }

    fn on_cuda(&self) -> Result<(CudaStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, value.shape().clone())),
            _ => bail!("expected a value on CUDA"),
        }
    }
}

impl<F: Fn(&Tensor, &Tensor) -> Result<Tensor>> CustomOp1 for Composed<F> {
    fn name(&self) -> &'static str {
        "composed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        (self.backward)(&x.detach(), &dy.contiguous()?).map(Some)
    }
}

impl<F: Fn([&Tensor; 3], &Tensor) -> Result<[Tensor; 3]>> CustomOp3 for Composed<F> {
    fn name(&self) -> &'static str {
        "composed"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let inputs = [x.detach(), y.detach(), z.detach()];
        let [dx, dy, dz] = (self.backward)(inputs.each_ref(), &d.contiguous()?)?;
        Ok((Some(dx), Some(dy), Some(dz)))
    }
}
