//! Checks of an operator's arguments: device, dtype and shape, with their names in the error.

use candle_core::{DType, Tensor};
use still_compute::Real;
use still_compute::tensor::borrow;

use crate::HeadGeometry;
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
    expect_dims(op, name, tensor.dims(), shape)
}

/// An error unless a shape is this one.
pub(crate) fn expect_dims(
    op: &'static str,
    name: &'static str,
    dims: &[usize],
    shape: &[usize],
) -> Result<()> {
    if dims == shape {
        return Ok(());
    }
    let (expected, got) = (format!("{shape:?}"), dims.to_vec());
    Err(AttentionError::Shape { op, tensor: name, expected, got })
}

/// Sequences, tokens and heads of `q` `[B, H, N, D]`; an error unless `k` and `v` are `[B, K, N, D]`.
pub(crate) fn whole_sequences(
    op: &'static str,
    rows: [&Tensor; 3],
) -> Result<(usize, usize, HeadGeometry)> {
    whole_sequences_of(op, rows.map(Tensor::dims))
}

/// [`whole_sequences`] of shapes.
pub(crate) fn whole_sequences_of(
    op: &'static str,
    [q, k, v]: [&[usize]; 3],
) -> Result<(usize, usize, HeadGeometry)> {
    let rank = |tensor: &'static str, dims: &[usize]| match *dims {
        [a, b, c, d] => Ok([a, b, c, d]),
        _ => Err(AttentionError::Shape {
            op,
            tensor,
            expected: "[batch, heads, tokens, head_dim]".into(),
            got: dims.to_vec(),
        }),
    };
    let ([batch, num_heads, tokens, head_dim], [_, num_key_value_heads, ..]) =
        (rank("q", q)?, rank("k", k)?);
    let expected = [batch, num_key_value_heads, tokens, head_dim];
    expect_dims(op, "k", k, &expected)?;
    expect_dims(op, "v", v, &expected)?;
    Ok((batch, tokens, HeadGeometry { num_heads, num_key_value_heads, head_dim }))
}

/// The tokens of `q`; an error unless it is `[batch, H, tokens, D]`, `k` and `v` `[batch, K, tokens, D]`.
pub(crate) fn expect_rows(
    op: &'static str,
    [q, k, v]: [&Tensor; 3],
    geometry: HeadGeometry,
    batch: usize,
) -> Result<usize> {
    let HeadGeometry { num_heads, num_key_value_heads, head_dim } = geometry;
    let tokens = q.dim(2)?;
    expect_shape(op, "q", q, &[batch, num_heads, tokens, head_dim])?;
    expect_shape(op, "k", k, &[batch, num_key_value_heads, tokens, head_dim])?;
    expect_shape(op, "v", v, &[batch, num_key_value_heads, tokens, head_dim])?;
    Ok(tokens)
}

/// Feeds rows of `batch` sequences, on the CPU in f32, to `advance` as plain values: those of `q`, `k` and `v`, each sequence's
/// length, and the output `[B, H, T, D]`, zeros so far.
pub(crate) fn advance_values(
    op: &'static str,
    [q, k, v]: [&Tensor; 3],
    geometry: HeadGeometry,
    batch: usize,
    lengths: Option<&[usize]>,
    advance: impl FnOnce([&[f32]; 3], &[usize], &mut [f32]),
) -> Result<Tensor> {
    let tokens = expect_rows(op, [q, k, v], geometry, batch)?;
    let lengths = checked_lengths(op, lengths, batch, tokens)?;
    let mut out = vec![0.0; q.elem_count()];
    with_values(op, "q", q, |q| {
        with_values(op, "k", k, |k| {
            with_values(op, "v", v, |v| advance([q, k, v], &lengths, &mut out))
        })
    })???;
    Ok(Tensor::from_vec(out, q.shape(), q.device())?)
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
