//! Borrowing a tensor's values as a slice.

use std::ops::Deref;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};

use crate::matmul::Mat;
use crate::real::Real;

/// The values of a contiguous part of a CPU storage.
///
/// # Errors
/// A layout with gaps, or another dtype.
pub fn slice<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor, got {layout:?}")
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}

/// Calls `body` with the values of a CPU tensor, made contiguous if it is not.
///
/// # Errors
/// Another dtype or device.
pub fn borrow<T: Real, R>(tensor: &Tensor, body: impl FnOnce(&[T]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match storage.deref() {
        Storage::Cpu(storage) => Ok(body(slice(storage, layout)?)),
        _ => {
            bail!("this op has a CPU kernel only, got a tensor on {:?}", tensor.device().location())
        }
    }
}

/// [`borrow`] of several tensors.
///
/// # Errors
/// As there.
pub fn borrow_all<T: Real, R>(tensors: &[&Tensor], body: impl FnOnce(&[&[T]]) -> R) -> Result<R> {
    let tensors: Vec<Tensor> = tensors.iter().map(|t| t.contiguous()).collect::<Result<_>>()?;
    let held: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let values = held.iter().map(|(storage, layout)| match storage.deref() {
        Storage::Cpu(storage) => slice(storage, layout),
        _ => bail!("this op has a CPU kernel only, got a tensor on another device"),
    });
    Ok(body(&values.collect::<Result<Vec<_>>>()?))
}

/// Calls `body` with a CPU matrix, f32, as it lies.
///
/// # Errors
/// Another rank, dtype or device.
pub fn with_matrix<R>(x: &Tensor, body: impl FnOnce(Mat<'_, f32>) -> R) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    let (&[row_stride, col_stride], Storage::Cpu(storage)) = (layout.stride(), &*storage) else {
        bail!("expected a matrix on the CPU, got {:?}", x.shape())
    };
    let data = &storage.as_slice::<f32>()?[layout.start_offset()..];
    Ok(body(Mat { data, row_stride, col_stride }))
}
