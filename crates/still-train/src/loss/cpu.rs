//! The CPU's kernels, f32, sums of many values in float64.

use candle_core::Tensor;
use rayon::prelude::*;
use still_compute::losses;
use still_compute::matmul::{Mat, par_matmul};
use still_compute::tensor::borrow;

use super::Target;
use crate::error::Result;
use crate::scalar::Scalar;

/// Rows whose logits exist at a time.
pub(super) const BLOCK: usize = 256;
/// Values whose squared errors one thread sums at a time.
const PART: usize = 16_384;

/// [`super::mean_squared_error`] of equal shapes.
pub(super) fn mean_squared_error(
    x: &Tensor,
    target: &Tensor,
    variance: Option<&Scalar>,
    weight: f64,
) -> Result<(Scalar, Tensor)> {
    let scale = match variance {
        Some(variance) => 1.0 / variance.value()?,
        None => 1.0,
    };
    let count = x.elem_count().max(1) as f64;
    let weight = (2.0 * weight * scale / count) as f32;
    let mut gradient = vec![0.0_f32; x.elem_count()];
    let total =
        borrow(x, |x: &[f32]| {
            borrow(target, |target: &[f32]| {
                let parts = gradient.par_chunks_mut(PART).zip(x.par_chunks(PART));
                sum_in_order(parts.zip(target.par_chunks(PART)).map(|((gradient, x), target)| {
                    losses::squared_error(x, target, weight, gradient)
                }))
            })
        })??;
    let gradient = Tensor::from_vec(gradient, x.shape(), x.device())?;
    Ok((Scalar::Host(total / count * scale), gradient))
}

/// [`super::variance`].
pub(super) fn variance(x: &Tensor) -> Result<Scalar> {
    let variance = borrow(x, |x: &[f32]| {
        let mean_of = |of: &(dyn Fn(f64) -> f64 + Sync)| {
            let parts = x.par_chunks(PART);
            let sums = parts.map(|part| part.iter().map(|&x| of(f64::from(x))).sum::<f64>());
            sum_in_order(sums) / x.len().max(1) as f64
        };
        let mean = mean_of(&|x| x);
        mean_of(&|x| (x - mean).powi(2))
    })?;
    Ok(Scalar::Host(variance))
}

/// The mean loss of rows of `hidden`, and the gradient of `weight` times it. Ids are those that the rows predict, the first
/// ones if there are fewer than rows.
pub(super) fn rows_loss(
    hidden: &Tensor,
    lm_head: &Tensor,
    target: Target<'_>,
    weight: f64,
) -> Result<(Scalar, Tensor)> {
    let (tokens, _) = hidden.dims2()?;
    let (vocab, width) = lm_head.dims2()?;
    let (shares, ids) = (target.shares(tokens), target.ids());
    let kl_weight = (weight * shares.divergence) as f32;
    let next_weight = (weight * shares.surprise) as f32;
    let (mut divergences, mut surprises) = (0.0, 0.0);
    let (mut student, mut teacher) = (Vec::new(), Vec::new());
    let mut gradient = vec![0.0_f32; tokens * width];
    let blocks = (0..shares.rows).step_by(BLOCK).zip(gradient.chunks_mut(BLOCK * width));
    for (start, gradient) in blocks {
        let count = BLOCK.min(shares.rows - start);
        logits(&hidden.narrow(0, start, count)?, lm_head, &mut student)?;
        let students = student.par_chunks_exact_mut(vocab);
        match target.teacher() {
            None => {
                let rows = students.zip(&ids[start..start + count]);
                surprises += sum_in_order(rows.map(|(student, &id)| {
                    losses::cross_entropy(student, id as usize, next_weight)
                }));
            }
            Some(hidden) => {
                logits(&hidden.narrow(0, start, count)?, lm_head, &mut teacher)?;
                let rows = students.zip(teacher.par_chunks_exact_mut(vocab)).enumerate();
                let pairs = rows.map(|(row, (student, teacher))| {
                    // The last token predicts nothing that is there.
                    let next = ids.get(start + row).map(|&id| (id as usize, next_weight));
                    losses::divergence(student, teacher, kl_weight, next)
                });
                let pairs: Vec<(f64, f64)> = pairs.collect();
                divergences += pairs.iter().map(|(kl, _)| kl).sum::<f64>();
                surprises += pairs.iter().map(|(_, surprise)| surprise).sum::<f64>();
            }
        }
        let d_logits = Mat::rows(&student, vocab);
        borrow(lm_head, |head| {
            let head = Mat::rows(head, width);
            par_matmul((count, width, vocab), gradient, width, false, d_logits, head);
        })?;
    }
    let loss = shares.divergence * divergences + shares.surprise * surprises;
    Ok((Scalar::Host(loss), Tensor::from_vec(gradient, hidden.shape(), hidden.device())?))
}

/// `hidden` `[rows, E]` times `lm_head` `[vocab, E]` transposed, over what `out` held.
fn logits(hidden: &Tensor, lm_head: &Tensor, out: &mut Vec<f32>) -> Result<()> {
    let (rows, width) = hidden.dims2()?;
    let vocab = lm_head.dim(0)?;
    out.resize(rows * vocab, f32::NAN);
    borrow(hidden, |hidden: &[f32]| {
        borrow(lm_head, |head| {
            let (hidden, head) = (Mat::rows(hidden, width), Mat::rows(head, width).t());
            par_matmul((rows, vocab, width), out, vocab, false, hidden, head);
        })
    })??;
    Ok(())
}

/// The sum, always in the same order: an exactly resumed run must not depend on which thread was first.
fn sum_in_order(losses: impl IndexedParallelIterator<Item = f64>) -> f64 {
    losses.collect::<Vec<_>>().into_iter().sum()
}
