//! Borrowing a tensor's values as a slice.

use std::ops::Deref;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};

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
