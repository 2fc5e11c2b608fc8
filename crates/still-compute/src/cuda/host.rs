//! Copies between host and device that allocate nothing.

use candle_core::cuda::cudarc::driver::{DeviceRepr, PinnedHostSlice, result};
use candle_core::{CudaDevice, DType, Error, Result, Tensor, bail};

use super::launch::{Launch, on_cuda};

/// Queues a copy of `values` over those of a contiguous tensor of f32 or u32.
///
/// # Errors
/// Another number of values, of another size; a tensor that is not contiguous or not on CUDA; an error of the driver.
pub fn overwrite<T: DeviceRepr>(tensor: &Tensor, values: &[T]) -> Result<()> {
    let fits = tensor.elem_count() == values.len()
        && tensor.dtype().size_in_bytes() == size_of::<T>()
        && tensor.is_contiguous();
    if !fits {
        let (dims, dtype) = (tensor.dims(), tensor.dtype());
        bail!("overwrite: {} values for a tensor {dims:?} of {dtype:?}", values.len())
    }
    let stream = tensor.device().as_cuda_device()?.cuda_stream();
    let (storage, layout) = tensor.storage_and_layout();
    let mut launch = Launch::new(&stream)?;
    let to: *mut T = launch.values(on_cuda(&storage)?, layout)?;
    // SAFETY: the tensor is as long as the values, and lives until the copy is queued on the stream that frees it. The driver has
    // read pageable memory of the host when this returns.
    let copied = unsafe { result::memcpy_htod_async(to as u64, values, stream.cu_stream()) };
    copied.map_err(Error::wrap)
}

/// Page-locked memory for the values of one tensor: a copy to it is several times as fast as one to other memory.
pub struct PinnedCopy {
    values: PinnedHostSlice<f32>,
    device: CudaDevice,
}

impl std::fmt::Debug for PinnedCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PinnedCopy").field("len", &self.values.len()).finish_non_exhaustive()
    }
}

impl PinnedCopy {
    /// Room for `len` values of tensors on `device`.
    ///
    /// # Errors
    /// An error of the driver.
    pub fn new(device: &CudaDevice, len: usize) -> Result<Self> {
        // The default flags would make memory that is slow to read.
        // SAFETY: f32 is valid whatever its bits; values are read after they were copied here.
        let values = unsafe { device.cuda_stream().context().alloc_pinned_with_flags(len, 0) };
        Ok(Self { values: values.map_err(Error::wrap)?, device: device.clone() })
    }

    /// The values of a contiguous f32 tensor on the device, at most as many as there is room for, once all that is queued has run.
    ///
    /// # Errors
    /// Another tensor; an error of the driver.
    pub fn read(&mut self, tensor: &Tensor) -> Result<&[f32]> {
        let stream = self.device.cuda_stream();
        let (storage, layout) = tensor.storage_and_layout();
        if tensor.dtype() != DType::F32 {
            bail!("a copy to the host: expected f32, got {:?}", tensor.dtype())
        }
        let count = tensor.elem_count();
        let to = self.values.as_mut_slice().map_err(Error::wrap)?;
        let room = to.len();
        let Some(to) = to.get_mut(..count).filter(|_| layout.is_contiguous()) else {
            bail!("a copy to the host: expected at most {room} adjacent values, got {layout:?}")
        };
        let mut launch = Launch::new(&stream)?;
        let from: *mut f32 = launch.values(on_cuda(&storage)?, layout)?;
        // SAFETY: the tensor has as many values, and lives until the stream has passed the copy, which is waited for.
        let copied =
            unsafe { result::memcpy_dtoh_async(&mut *to, from as u64, stream.cu_stream()) };
        copied.map_err(Error::wrap)?;
        stream.synchronize().map_err(Error::wrap)?;
        Ok(to)
    }

    /// The first `count` values that were [read](Self::read) last.
    ///
    /// # Errors
    /// An error of the driver.
    ///
    /// # Panics
    /// Where there is no room for so many.
    pub fn last(&self, count: usize) -> Result<&[f32]> {
        Ok(&self.values.as_slice().map_err(Error::wrap)?[..count])
    }
}
