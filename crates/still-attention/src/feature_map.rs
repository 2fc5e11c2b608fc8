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
