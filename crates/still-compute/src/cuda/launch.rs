//! Device addresses of tensors and buffers while kernels are queued.

use std::ffi::{c_int, c_void};
use std::ops::Deref;
use std::sync::Arc;

use candle_core::cuda::CudaStorageSlice;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, SyncOnDrop, result};
use candle_core::{CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use still_kernels::{Rows, STILL_BF16, STILL_F32, check};

/// A dtype as the kernels name it.
///
/// # Errors
/// Another than f32 and bf16.
pub fn kind(dtype: DType) -> Result<i32> {
    match dtype {
        DType::F32 => Ok(STILL_F32),
        DType::BF16 => Ok(STILL_BF16),
        other => bail!("the kernels take f32 or bf16, not {other:?}"),
    }
}

/// The CUDA storage of a tensor that is on CUDA.
///
/// # Errors
/// Another device.
pub fn on_cuda(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("expected a tensor on CUDA"),
    }
}

/// Queues one kernel: `f` gets where the values of `inputs` begin and where those of new tensors of `outputs`' shapes and dtypes
/// will be, which it is to fill, and the stream; it returns a status code of `call`. The new tensors are of the first input's
/// device, and in no graph.
///
/// # Errors
/// Inputs that are not on CUDA, or of other values than f32, bf16 or u32; what the status code stands for.
pub fn queue<const I: usize, const O: usize>(
    call: &'static str,
    inputs: [&Tensor; I],
    outputs: [(candle_core::Shape, DType); O],
    f: impl FnOnce([*mut c_void; I], [*mut c_void; O], *mut c_void) -> c_int,
) -> Result<[Tensor; O]> {
    let made = queue_any(call, &inputs, outputs.into(), |inputs, outputs, stream| {
        let (mut from, mut to) = ([std::ptr::null_mut(); I], [std::ptr::null_mut(); O]);
        from.copy_from_slice(inputs);
        to.copy_from_slice(outputs);
        f(from, to, stream)
    })?;
    made.try_into().map_err(|_| candle_core::Error::Msg(format!("{call}: outputs were lost")))
}

/// [`queue`] of any number of tensors.
///
/// # Errors
/// As there.
pub fn queue_any(
    call: &'static str,
    inputs: &[&Tensor],
    outputs: Vec<(candle_core::Shape, DType)>,
    f: impl FnOnce(&[*mut c_void], &[*mut c_void], *mut c_void) -> c_int,
) -> Result<Vec<Tensor>> {
    let Some(first) = inputs.first() else { bail!("{call}: no input says which device it is on") };
    let device = first.device();
    // SAFETY: the kernel fills them.
    let new = |(shape, dtype): (candle_core::Shape, DType)| unsafe {
        Tensor::empty(shape, dtype, device)
    };
    let made = outputs.into_iter().map(new).collect::<Result<Vec<_>>>()?;
    queue_into(call, inputs, &made, f)?;
    Ok(made)
}

/// [`queue_any`] with outputs that are there: contiguous, on the device of the first input.
///
/// # Errors
/// As there.
pub fn queue_into(
    call: &'static str,
    inputs: &[&Tensor],
    outputs: &[Tensor],
    f: impl FnOnce(&[*mut c_void], &[*mut c_void], *mut c_void) -> c_int,
) -> Result<()> {
    let Some(first) = inputs.first() else { bail!("{call}: no input says which device it is on") };
    let stream = first.device().as_cuda_device()?.cuda_stream();
    let held: Vec<_> = inputs.iter().map(|input| input.storage_and_layout()).collect();
    let made: Vec<_> = outputs.iter().map(Tensor::storage_and_layout).collect();
    let mut launch = Launch::new(&stream)?;
    let (mut from, mut to) = (Vec::with_capacity(held.len()), Vec::with_capacity(made.len()));
    for (storage, layout) in &held {
        from.push(launch.values(on_cuda(storage)?, layout)?);
    }
    for (storage, layout) in &made {
        to.push(launch.values(on_cuda(storage)?, layout)?);
    }
    check(call, f(&from, &to, launch.stream())).map_err(candle_core::Error::wrap)
}

/// The stream that a call's kernels are queued on. What they use is marked so, for other streams, when this is dropped.
pub struct Launch<'a> {
    stream: &'a Arc<CudaStream>,
    used: Vec<SyncOnDrop<'a>>,
}

impl<'a> Launch<'a> {
    /// Makes the stream's context the thread's, which the CUDA runtime launches in.
    ///
    /// # Errors
    /// An error of the driver.
    pub fn new(stream: &'a Arc<CudaStream>) -> Result<Self> {
        stream.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
        Ok(Self { stream, used: Vec::new() })
    }

    /// The stream itself.
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

    /// Queues a copy of `bytes` bytes.
    ///
    /// # Errors
    /// An error of the driver.
    ///
    /// # Safety
    /// Both are addresses of so many bytes on the device, there until the stream has passed.
    pub unsafe fn copy(&mut self, from: *mut u8, to: *mut u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's.
        let copied = unsafe {
            result::memcpy_dtod_async(to as u64, from as u64, bytes, self.stream.cu_stream())
        };
        copied.map_err(candle_core::Error::wrap)
    }

    /// Where a tensor's first value lies.
    ///
    /// # Errors
    /// Other values than f32, bf16, u32 or u8.
    pub fn values<P>(&mut self, storage: &'a CudaStorage, layout: &Layout) -> Result<*mut P> {
        let (base, bytes): (*mut u8, usize) = match &storage.slice {
            CudaStorageSlice::F32(slice) => (self.at(slice), 4),
            CudaStorageSlice::BF16(slice) => (self.at(slice), 2),
            CudaStorageSlice::U32(slice) => (self.at(slice), 4),
            CudaStorageSlice::U8(slice) => (self.at(slice), 1),
            _ => bail!("expected f32, bf16, u32 or u8"),
        };
        Ok(base.wrapping_add(layout.start_offset() * bytes).cast())
    }

    /// [`Launch::values`] of a tensor as it is held, null for one that is not there.
    ///
    /// # Errors
    /// As [`Launch::values`]; a tensor elsewhere.
    pub fn optional_values<P>(
        &mut self,
        held: &'a Option<(impl Deref<Target = Storage>, &Layout)>,
    ) -> Result<*mut P> {
        match held {
            Some((storage, layout)) => self.values(on_cuda(storage)?, layout),
            None => Ok(std::ptr::null_mut()),
        }
    }

    /// [`Launch::rows`] of a tensor as it is held, [`Rows::NONE`] for one that is not there.
    ///
    /// # Errors
    /// As [`Launch::rows`]; a tensor elsewhere.
    pub fn optional_rows(
        &mut self,
        held: &'a Option<(impl Deref<Target = Storage>, &Layout)>,
    ) -> Result<Rows> {
        match held {
            Some((storage, layout)) => self.rows(on_cuda(storage)?, layout),
            None => Ok(Rows::NONE),
        }
    }

    /// The rows of a tensor `[B, heads, N, D]`.
    ///
    /// # Errors
    /// Another number of dimensions, other values than f32, bf16, u32 or u8.
    pub fn rows(&mut self, storage: &'a CudaStorage, layout: &Layout) -> Result<Rows> {
        let &[batch, head, token, _] = layout.stride() else {
            bail!("expected four dimensions, got {layout:?}")
        };
        let data = self.values(storage, layout)?;
        Ok(Rows { data, batch: batch as i64, head: head as i64, token: token as i64 })
    }
}
