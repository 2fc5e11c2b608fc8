//! Borrowing a tensor's values as a slice.

use std::ops::Deref;

use candle_core::{CpuStorage, DType, Layout, Storage, Tensor};

use crate::error::{AttentionError, Result};
use crate::real::Real;

/// The values of a contiguous part of a CPU storage.
///
/// # Errors
/// A layout with gaps, or another dtype.
pub fn slice<'a, T: Real>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("expected a contiguous tensor, got {layout:?}")
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}

/// Calls `body` with the values of a CPU tensor, made contiguous if it is not.
///
/// # Errors
/// Another dtype or device.
pub fn borrow<T: Real, R>(tensor: &Tensor, body: impl FnOnce(&[T]) -> R) -> candle_core::Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match storage.deref() {
        Storage::Cpu(storage) => Ok(body(slice(storage, layout)?)),
        _ => candle_core::bail!(
            "this op has a CPU kernel only, got a tensor on {:?}",
            tensor.device().location()
        ),
    }
}

/// [`borrow`] for an operator's argument, with its name in the error.
pub(crate) fn with_values<T: Real, R>(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
    body: impl FnOnce(&[T]) -> R,
) -> Result<R> {
    expect_cpu(op, name, tensor, T::DTYPE)?;
    Ok(borrow(tensor, body)?)
}

/// Copies a CPU tensor's values.
pub(crate) fn values<T: Real>(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
) -> Result<Vec<T>> {
    with_values(op, name, tensor, <[T]>::to_vec)
}

/// An error unless the tensor is on the CPU and of this dtype.
pub(crate) fn expect_cpu(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
    dtype: DType,
) -> Result<()> {
    if !tensor.device().is_cpu() {
        return Err(AttentionError::Unsupported {
            op,
            tensor: name,
            expected: "a tensor on the CPU",
            got: format!("on {:?}", tensor.device().location()),
        });
    }
    if tensor.dtype() != dtype {
        return Err(AttentionError::Unsupported {
            op,
            tensor: name,
            expected: if dtype == DType::F64 { "f64" } else { "f32" },
            got: tensor.dtype().as_str().into(),
        });
    }
    Ok(())
}

/// An error unless the tensor has this shape.
pub(crate) fn expect_shape(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
    shape: &[usize],
) -> Result<()> {
    if tensor.dims() == shape {
        return Ok(());
    }
    Err(AttentionError::Shape {
        op,
        tensor: name,
        expected: format!("{shape:?}"),
        got: tensor.dims().to_vec(),
    })
}
