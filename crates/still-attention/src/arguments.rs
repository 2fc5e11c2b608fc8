//! Checks of an operator's arguments: device, dtype and shape, with their names in the error.

use candle_core::{DType, Tensor};
use still_compute::Real;
use still_compute::tensor::borrow;

use crate::error::{AttentionError, Result};

/// The values of an argument, borrowed.
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

/// One length per sequence, each at most `tokens`.
pub(crate) fn checked_lengths(
    op: &'static str,
    lengths: Option<&[usize]>,
    batch: usize,
    tokens: usize,
) -> Result<Vec<usize>> {
    let lengths = lengths.map_or_else(|| vec![tokens; batch], <[usize]>::to_vec);
    if lengths.len() != batch || lengths.iter().any(|&length| length > tokens) {
        return Err(AttentionError::Shape {
            op,
            tensor: "lengths",
            expected: format!("{batch} lengths of at most {tokens}"),
            got: lengths,
        });
    }
    Ok(lengths)
}
