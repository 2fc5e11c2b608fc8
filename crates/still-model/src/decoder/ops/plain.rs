//! The ops without a graph, forward and backward, on the device of their tensors: what [`super::super::SavingOps`] and the ops in the
//! graph are made of.
//!
//! On the CPU f32 has the kernels of the fused ops; other dtypes, which check gradients, and other devices have those of
//! `device`. Activations are matrices `[rows, width]`, contiguous.

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor};
use still_compute::matmul::{Mat, par_matmul, par_matmul_new, par_matmul_scaled};
use still_compute::rows::{self, Rows};
use still_compute::tensor::{borrow_all, with_matrix};
use still_quant::{Fused, Gated, LowRank};

use super::heads::merge_rotated_back;
use super::{Dropout, Rotation, device, merge_heads, with_values};
use crate::config::Activation;
use crate::decoder::{Linear, Lora, Weight};

/// Whether the CPU's own kernels take it.
fn has_kernels(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

fn matrix(values: Vec<f32>, width: usize, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, ((), width), like.device())
}

/// `x` through a projection with its bias.
pub(in crate::decoder) fn linear(x: &Tensor, linear: &Linear) -> Result<Tensor> {
    let (out, _) = linear.weight.dims2()?;
    if has_kernels(x) {
        return matrix(with_values(x, |x: &[f32]| linear.multiply(x))??, out, x);
    }
    let y = match by_codes(x, &linear.weight, x.dtype())? {
        Some(y) => y,
        None => product(x, &linear.weight.dense()?.t()?, 1.0, None)?,
    };
    match &linear.bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// `onto + x Wᵀ` of the rows `x`, `W` with its update, where a kernel adds both to values that it has at hand; elsewhere `None`.
pub(in crate::decoder) fn fused_linear(
    x: &Tensor,
    weight: &Weight,
    lora: Option<&Lora>,
    onto: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let Weight::Packed(packed) = weight else { return Ok(None) };
    if !has_kernels(x) || lora.is_some_and(|lora| lora.dropout.is_some()) {
        return Ok(None);
    }
    let parts = lora.map_or(Vec::new(), |lora| vec![&lora.a, &lora.b]);
    let parts: Vec<_> =
        parts.into_iter().map(|part| part.detach().to_dtype(DType::F32)).collect::<Result<_>>()?;
    let tensors: Vec<_> = [x].into_iter().chain(onto).chain(&parts).collect();
    let product = borrow_all(&tensors, |values| {
        let (onto, parts) = values[1..].split_at(values.len() - 1 - parts.len());
        let update = match (lora, parts) {
            (Some(lora), &[a, b]) => Some(LowRank { a, b, scale: lora.scale as f32 }),
            _ => None,
        };
        packed.multiply_fused(values[0], Fused { update, gated: None, onto: onto.first().copied() })
    })?;
    product.map(|product| matrix(product, packed.rows(), x)).transpose()
}

/// `x Wᵀ` in `dtype` by the codes of a quantized matrix; `None` of other matrices and of many rows, whose products are those of values.
pub(super) fn by_codes(x: &Tensor, weight: &Weight, dtype: DType) -> Result<Option<Tensor>> {
    match weight {
        Weight::Quantized(matrix) => matrix.product(x, dtype),
        Weight::Dense(_) | Weight::Packed(_) => Ok(None),
    }
}

/// `Σ dyᵢ Wᵢ`, on top of `onto` if that is given: the gradient of what several projections share.
pub(in crate::decoder) fn linear_backward(
    outputs: &[(&Tensor, &Weight)],
    onto: Option<Tensor>,
) -> Result<Tensor> {
    let Some(((first, weight), others)) = outputs.split_first() else {
        candle_core::bail!("no projection to go back through")
    };
    if !has_kernels(first) {
        let through_first = product(first, &weight.dense()?, 1.0, onto)?;
        return others.iter().try_fold(through_first, |onto, (dy, weight)| {
            product(dy, &weight.dense()?, 1.0, Some(onto))
        });
    }
    let (width, rows) = (weight.dims2()?.1, first.dim(0)?);
    let mut dx = match &onto {
        Some(onto) => with_values(onto, <[f32]>::to_vec)?,
        None => Vec::new(),
    };
    for (dy, weight) in outputs {
        let (out, _) = weight.dims2()?;
        with_values(dy, |dy: &[f32]| {
            weight.with_values(|weight| {
                let (dy, weight) = (Mat::rows(dy, out), Mat::rows(weight, width));
                if dx.is_empty() {
                    dx = par_matmul_new((rows, width, out), dy, weight);
                } else {
                    par_matmul((rows, width, out), &mut dx, width, true, dy, weight);
                }
            })
        })??;
    }
    matrix(dx, width, first)
}

/// What the backward pass of a low-rank update reads.
#[derive(Debug)]
pub(in crate::decoder) struct Update {
    /// `A` and `B` in the dtype of activations.
    a: Tensor,
    b: Tensor,
    /// `x Aᵀ`, `[rows, rank]`.
    pub low: Tensor,
}

/// `y` plus the update of `x`.
pub(in crate::decoder) fn low_rank(x: &Tensor, lora: &Lora, y: Tensor) -> Result<(Tensor, Update)> {
    let [a, b] = [&lora.a, &lora.b].map(|part| part.detach().to_dtype(x.dtype()));
    let (a, b) = (a?, b?);
    let low = product(&dropped(x, lora.dropout.as_ref())?, &a.t()?, 1.0, None)?;
    let y = product(&low, &b.t()?, lora.scale, Some(y))?;
    Ok((y, Update { a, b, low }))
}

impl Update {
    /// `scale · dy B`, which the gradients of `A` and `x` have in common.
    pub fn up(&self, dy: &Tensor, scale: f64) -> Result<Tensor> {
        product(dy, &self.b, scale, None)
    }

    /// The gradient of `x` through the update.
    pub fn through(&self, up: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        dropped(&product(up, &self.a, 1.0, None)?, dropout)
    }
}

/// Columns of a product up to which the matrix library sums [`TERMS`] terms at a time if there are as few rows, and others if there
/// are more.
const SHORT: usize = 64;
const TERMS: usize = 512;

/// `x y` in a new vector. Where a row's sums would depend on how many rows there are, they are summed in the same parts always: a prompt is
/// read in longer pieces when nobody else is served.
fn new_product((m, n, k): (usize, usize, usize), x: Mat<'_, f32>, y: Mat<'_, f32>) -> Vec<f32> {
    let first = if n <= SHORT { k.min(TERMS) } else { k };
    let mut product = par_matmul_new((m, n, first), x, y);
    for start in (first..k).step_by(TERMS) {
        let x = Mat { data: &x.data[start * x.col_stride..], ..x };
        let y = Mat { data: &y.data[start * y.row_stride..], ..y };
        par_matmul((m, n, TERMS.min(k - start)), &mut product, n, true, x, y);
    }
    product
}

/// `scale · x y` of matrices or transposed views of such, on top of `onto` if that is given, in their dtype; `onto` must be nobody
/// else's. Sums are f32.
pub(in crate::decoder) fn product(
    x: &Tensor,
    y: &Tensor,
    scale: f64,
    onto: Option<Tensor>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let options =
            still_compute::cuda::Gemm { alpha: scale, accumulate: onto, dtype: x.dtype() };
        return still_compute::cuda::gemm(x, y, options);
    }
    if !has_kernels(x) || !has_kernels(y) {
        let product = (x.contiguous()?.matmul(&y.contiguous()?)? * scale)?;
        return match onto {
            Some(onto) => product + onto,
            None => Ok(product),
        };
    }
    let ((m, k), (_, n)) = (x.dims2()?, y.dims2()?);
    if let Some(onto) = onto {
        let (sizes, scale) = ((m, n, k), scale as f32);
        with_matrix(x, |x| {
            with_matrix(y, |y| onto.inplace_op1(&AddProduct { sizes, scale, x, y }))
        })???;
        return Ok(onto);
    }
    let mut product = with_matrix(x, |x| with_matrix(y, |y| new_product((m, n, k), x, y)))??;
    if scale != 1.0 {
        rows::scale(&mut product, scale as f32);
    }
    matrix(product, n, x)
}

/// Adds `scale · x y`, `[m, n]`, to a matrix in its own memory.
struct AddProduct<'a> {
    /// `(m, n, k)`
    sizes: (usize, usize, usize),
    scale: f32,
    x: Mat<'a, f32>,
    y: Mat<'a, f32>,
}

impl InplaceOp1 for AddProduct<'_> {
    fn name(&self) -> &'static str {
        "add_product"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Self { sizes: (m, n, k), scale, x, y } = *self;
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("add_product: expected contiguous f32 values, got {layout:?}")
        };
        if end - start != m * n {
            candle_core::bail!("add_product: {layout:?} is not {m}x{n}")
        }
        par_matmul_scaled((m, n, k), &mut values[start..end], n, true, scale, x, y);
        Ok(())
    }
}

/// `x` as an update with this dropout reads it.
pub(in crate::decoder) fn dropped(x: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
    let Some(dropout) = dropout else { return Ok(x.clone()) };
    if has_kernels(x) {
        let mut values = with_values(x, <[f32]>::to_vec)?;
        dropout.apply(&mut values);
        return matrix(values, x.dim(1)?, x);
    }
    let mask = dropout.mask(x.elem_count(), x.device())?;
    x.mul(&mask.to_dtype(x.dtype())?.reshape(x.shape())?)
}

/// The gradient of `x` in a root-mean-square norm over the last axis, on top of `add`, if that is given.
pub(in crate::decoder) fn norm_backward(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: &Tensor,
    add: Option<&Tensor>,
) -> Result<Tensor> {
    if !has_kernels(x) {
        return device::norm::backward(x, weight, eps, dy, add);
    }
    let mut dx = match add {
        Some(add) => with_values(add, <[f32]>::to_vec)?,
        None => vec![0.0; x.elem_count()],
    };
    with_values(x, |x: &[f32]| {
        with_values(weight, |weight| {
            with_values(dy, |dy| Rows::par_rms_norm_backward(x, weight, eps, dy, &mut dx))
        })
    })???;
    Tensor::from_vec(dx, x.shape(), x.device())
}

/// `activation(gate(x)) ⊙ up(x)` where no backward pass is to come: on the CPU in the memory of `gate(x)`.
pub(in crate::decoder) fn gated(
    x: &Tensor,
    gate: &Linear,
    up: &Linear,
    activation: Activation,
) -> Result<Tensor> {
    if !has_kernels(x) {
        return activated(activation, &linear(x, gate)?, &linear(x, up)?);
    }
    let hidden = with_values(x, |x: &[f32]| -> Result<_> {
        if let Some(hidden) = fused_gated(x, gate, up, activation) {
            return Ok(hidden);
        }
        let mut hidden = gate.multiply(x)?;
        rows::par_activate(activation, &mut hidden, &up.multiply(x)?);
        Ok(hidden)
    })??;
    matrix(hidden, gate.weight.dims2()?.0, x)
}

/// [`gated`] where a kernel has the products of both matrices at hand.
fn fused_gated(x: &[f32], gate: &Linear, up: &Linear, activation: Activation) -> Option<Vec<f32>> {
    let (Weight::Packed(packed), Weight::Packed(up_packed)) = (&gate.weight, &up.weight) else {
        return None;
    };
    if gate.bias.is_some() || up.bias.is_some() {
        return None;
    }
    let activate = |gate: &mut [f32], up: &[f32]| rows::activate(activation, gate, up);
    let gated = Some(Gated { up: up_packed, activate: &activate });
    packed.multiply_fused(x, Fused { gated, ..Fused::default() })
}

/// `activation(gate) ⊙ up`.
pub(in crate::decoder) fn activated(
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
) -> Result<Tensor> {
    if !has_kernels(gate) {
        return device::activation::forward(activation, gate, up);
    }
    let mut hidden = with_values(gate, <[f32]>::to_vec)?;
    with_values(up, |up| rows::par_activate(activation, &mut hidden, up))?;
    Tensor::from_vec(hidden, gate.shape(), gate.device())
}

/// Gradients of `gate` and `up` in [`activated`].
pub(in crate::decoder) fn activated_backward(
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
    d_hidden: &Tensor,
) -> Result<[Tensor; 2]> {
    if !has_kernels(gate) {
        return device::activation::backward(activation, gate, up, d_hidden);
    }
    let mut d_up = with_values(d_hidden, <[f32]>::to_vec)?;
    let d_gate = with_values(gate, |gate: &[f32]| {
        with_values(up, |up| rows::par_activate_backward(activation, gate, up, &mut d_up))
    })??;
    let tensor = |values| Tensor::from_vec(values, gate.shape(), gate.device());
    Ok([tensor(d_gate)?, tensor(d_up)?])
}

/// The gradient of rows `[B · N, H · D]` from that of their heads `[B, H, N, D]`, rotated back if they were rotated.
pub(in crate::decoder) fn heads_backward(
    d_heads: &Tensor,
    rotation: Option<&Rotation>,
) -> Result<Tensor> {
    let (batch, heads, tokens, head_dim) = d_heads.dims4()?;
    let rows = match rotation {
        Some(rotation) if d_heads.device().is_cpu() => merge_rotated_back(d_heads, rotation)?,
        Some(rotation) => device::rotate(d_heads, rotation, true)?.transpose(1, 2)?,
        None if d_heads.device().is_cpu() => merge_heads(d_heads)?,
        None => d_heads.transpose(1, 2)?,
    };
    rows.contiguous()?.reshape((batch * tokens, heads * head_dim))
}
