//! Reflections of the feature maps, as tensor ops: they fold into the maps' matrices.

use candle_core::{D, Tensor};

use crate::error::Result;

/// `H_û W = W − 2 û (ûᵀ W)` per head: a reflection keeps `‖x‖`, so that it folds into the matrix.
///
/// `w` `[S, D, F]`, `u` `[S, D]` (any length, never zero).
///
/// # Errors
/// Shapes that contradict each other.
pub fn fold_householder(w: &Tensor, u: &Tensor) -> Result<Tensor> {
    let unit = u.broadcast_div(&u.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?;
    let row = unit.unsqueeze(1)?;
    let along = row.matmul(w)?;
    Ok((w - (row.transpose(1, 2)?.contiguous()?.matmul(&along)? * 2.0)?)?)
}

/// Gradients of `w` and `u` from that of [`fold_householder`].
pub(crate) fn fold_householder_backward(
    w: &Tensor,
    u: &Tensor,
    d: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let length = u.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    let unit = u.broadcast_div(&length)?;
    let (row, column) = (unit.unsqueeze(1)?, unit.unsqueeze(2)?);
    let d_along = row.matmul(d)?;
    let d_w = (d - (column.matmul(&d_along)? * 2.0)?)?;
    // Of û: −2 (d (Wᵀ û) + W (dᵀ û)); what lies along û is lost to the division by the length.
    let columns = |along: Tensor| along.transpose(1, 2)?.contiguous();
    let through_w = d.matmul(&columns(row.matmul(w)?)?)?;
    let d_unit = ((through_w + w.matmul(&columns(d_along)?)?)? * -2.0)?.squeeze(2)?;
    let along = (&unit * &d_unit)?.sum_keepdim(D::Minus1)?;
    let d_u = (d_unit - unit.broadcast_mul(&along)?)?.broadcast_div(&length)?;
    Ok((d_w, d_u))
}
