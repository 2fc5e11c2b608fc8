//! Device addresses of tensors and buffers while kernels are queued.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda::CudaStorageSlice;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, SyncOnDrop};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use still_kernels::{Rows, STILL_BF16, STILL_F32, Shape};

/// Memory that some kernel fills before any reads it.
pub(super) fn uninit<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every user of this module queues what fills a buffer before what reads it. An empty one cannot be had.
    unsafe { device.alloc(len.max(1)) }
}

/// A shape as the kernels take it.
pub(super) fn shape(q: &Tensor, kv_heads: usize) -> Result<Shape> {
    let (batch, heads, tokens, head_dim) = q.dims4()?;
    let int = |x: usize| i32::try_from(x).map_err(candle_core::Error::wrap);
    let dtype = match q.dtype() {
        DType::BF16 => STILL_BF16,
        _ => STILL_F32,
    };
    Ok(Shape {
        batch: int(batch)?,
        heads: int(heads)?,
        kv_heads: int(kv_heads)?,
        tokens: int(tokens)?,
        head_dim: int(head_dim)?,
        dtype,
    })
}

/// The tensor apart from its graph, copied if its rows do not lie as the kernels need them: adjacent channels, 16-byte
/// aligned.
pub(super) fn rows_aligned(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.detach();
    let layout = tensor.layout();
    let unit = 16 / tensor.dtype().size_in_bytes();
    let [outer @ .., inner] = layout.stride() else { return Ok(tensor) };
    let aligned = |elements: usize| elements.is_multiple_of(unit);
    if *inner == 1 && aligned(layout.start_offset()) && outer.iter().all(|&s| aligned(s)) {
        return Ok(tensor);
    }
    tensor.force_contiguous()
}

/// The CUDA storage of a tensor that is on CUDA.
pub(super) fn on_cuda(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("expected a tensor on CUDA"),
    }
}

/// The stream that a call's kernels are queued on. What they use is marked so, for other streams, when this is dropped.
pub(super) struct Launch<'a> {
    stream: &'a Arc<CudaStream>,
    used: Vec<SyncOnDrop<'a>>,
}

impl<'a> Launch<'a> {
    /// Makes the stream's context the thread's, which the CUDA runtime launches in.
    pub fn new(stream: &'a Arc<CudaStream>) -> Result<Self> {
        stream.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
        Ok(Self { stream, used: Vec::new() })
    }

    pub fn stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// Where a buffer begins.
    pub fn at<T, P>(&mut self, slice: &'a CudaSlice<T>) -> *mut P {
        let (address, used) = slice.device_ptr(self.stream);
        self.used.push(used);
        address as *mut P
    }

    /// [`Launch::at`], null for a buffer that is not there.
    pub fn at_optional<T, P>(&mut self, slice: Option<&'a CudaSlice<T>>) -> *mut P {
        slice.map_or(std::ptr::null_mut(), |slice| self.at(slice))
    }

    /// Where a tensor's first value lies.
    pub fn values<P>(&mut self, storage: &'a CudaStorage, layout: &Layout) -> Result<*mut P> {
        let (base, bytes): (*mut u8, usize) = match &storage.slice {
            CudaStorageSlice::F32(slice) => (self.at(slice), 4),
            CudaStorageSlice::BF16(slice) => (self.at(slice), 2),
            CudaStorageSlice::U32(slice) => (self.at(slice), 4),
            _ => bail!("expected f32, bf16 or u32"),
        };
        Ok(base.wrapping_add(layout.start_offset() * bytes).cast())
    }

    /// The rows of a tensor `[B, heads, N, D]`.
    pub fn rows(&mut self, storage: &'a CudaStorage, layout: &Layout) -> Result<Rows> {
        let &[batch, head, token, _] = layout.stride() else {
            bail!("expected four dimensions, got {layout:?}")
        };
        let data = self.values(storage, layout)?;
        Ok(Rows { data, batch: batch as i64, head: head as i64, token: token as i64 })
    }
}
