//! Memory of the host that a device copies to without a detour.

use candle_core::cuda::CudaStorageSlice;
use candle_core::cuda::cudarc::driver::PinnedHostSlice;
use candle_core::{CudaDevice, Error, Result, Tensor, bail};

use super::launch::on_cuda;

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

    /// The values of a contiguous f32 tensor on the device, as many as there is room for, once all that is queued has run.
    ///
    /// # Errors
    /// Another tensor; an error of the driver.
    pub fn read(&mut self, tensor: &Tensor) -> Result<&[f32]> {
        let stream = self.device.cuda_stream();
        let (storage, layout) = tensor.storage_and_layout();
        let CudaStorageSlice::F32(from) = &on_cuda(&storage)?.slice else {
            bail!("a copy to the host: expected f32, got {:?}", tensor.dtype())
        };
        let range = layout.contiguous_offsets();
        let Some((start, end)) = range.filter(|(start, end)| end - start == self.values.len())
        else {
            bail!(
                "a copy to the host: expected {} adjacent values, got {layout:?}",
                self.values.len()
            )
        };
        stream.memcpy_dtoh(&from.slice(start..end), &mut self.values).map_err(Error::wrap)?;
        stream.synchronize().map_err(Error::wrap)?;
        self.values.as_slice().map_err(Error::wrap)
    }
}
