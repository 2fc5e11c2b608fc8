//! Any device's form, of tensor ops and on CUDA a kernel of our own: nothing is copied to the host. The CPU has it too, for tests.

use candle_core::{D, DType, Tensor};

use still_model::decoder::ops::wide_linear;

use super::Target;
use crate::error::Result;
use crate::scalar::Scalar;

/// Logits that exist at a time, of student and teacher each.
const LOGITS: usize = 1 << 26;
/// Blocks are of whole tiles of a matrix product.
const TILE: usize = 128;

/// Rows whose logits exist at a time.
pub(super) fn block_rows(vocab: usize) -> usize {
    (LOGITS / vocab.max(1) / TILE).max(1) * TILE
}

/// [`super::mean_squared_error`] of equal shapes.
pub(super) fn mean_squared_error(
    x: &Tensor,
    target: &Tensor,
    variance: Option<&Scalar>,
    weight: f64,
) -> Result<(Scalar, Tensor)> {
    let count = x.elem_count().max(1) as f64;
    let error = (x.detach().to_dtype(DType::F32)? - target.detach().to_dtype(DType::F32)?)?;
    let loss = (sum(&error.sqr()?)? * (1.0 / count))?;
    let gradient = (error * (2.0 * weight / count))?;
    let (loss, gradient) = match variance {
        Some(Scalar::Device(variance)) => ((loss / variance)?, gradient.broadcast_div(variance)?),
        Some(Scalar::Host(variance)) => ((loss / *variance)?, (gradient / *variance)?),
        None => (loss, gradient),
    };
    Ok((Scalar::Device(loss), gradient.to_dtype(x.dtype())?))
}

/// [`super::variance`].
pub(super) fn variance(x: &Tensor) -> Result<Scalar> {
    let x = x.detach().to_dtype(DType::F32)?;
    let share = 1.0 / x.elem_count().max(1) as f64;
    let mean = (sum(&x)? * share)?;
    Ok(Scalar::Device((sum(&x.broadcast_sub(&mean)?.sqr()?)? * share)?))
}

/// As [`super::cpu::rows_loss`].
pub(super) fn rows_loss(
    hidden: &Tensor,
    lm_head: &Tensor,
    target: Target<'_>,
    weight: f64,
) -> Result<(Scalar, Tensor)> {
    let block = block_rows(lm_head.dim(0)?);
    rows_loss_by(block, hidden, lm_head, target, weight)
}

/// [`rows_loss`], `block` rows at a time.
pub(super) fn rows_loss_by(
    block: usize,
    hidden: &Tensor,
    lm_head: &Tensor,
    target: Target<'_>,
    weight: f64,
) -> Result<(Scalar, Tensor)> {
    let (tokens, _) = hidden.dims2()?;
    let (hidden, lm_head) = (hidden.detach(), lm_head.detach());
    let shares = target.shares(tokens);
    let weights = Weights {
        kl_share: shares.divergence,
        kl_weight: weight * shares.divergence,
        next_share: shares.surprise,
        next_weight: weight * shares.surprise,
    };
    let next = NextTokens::new(target.ids(), shares.rows, &hidden)?;
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for start in (0..shares.rows).step_by(block) {
        let count = block.min(shares.rows - start);
        let logits =
            |hidden: &Tensor| wide_linear(&hidden.detach().narrow(0, start, count)?, &lm_head);
        let rows = Rows {
            student: logits(&hidden)?,
            teacher: target.teacher().map(logits).transpose()?,
            next: next.as_ref().map(|next| next.narrow(start, count)).transpose()?,
        };
        let (loss, d_logits) = rows.loss(&weights, hidden.dtype())?;
        losses.push(loss);
        gradients.push(d_logits.matmul(&lm_head)?);
    }
    if gradients.is_empty() {
        return Ok((Scalar::Host(0.0), hidden.zeros_like()?));
    }
    let gradient = Tensor::cat(&gradients, 0)?.pad_with_zeros(0, 0, tokens - shares.rows)?;
    Ok((Scalar::Device(Tensor::stack(&losses, 0)?.sum_all()?), gradient))
}

/// What a row's losses count in what is reported, and in what is minimized.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weights {
    pub kl_share: f64,
    pub kl_weight: f64,
    pub next_share: f64,
    pub next_weight: f64,
}

/// Rows of logits, `[rows, vocab]` f32, and what they are held against.
pub(super) struct Rows {
    pub student: Tensor,
    pub teacher: Option<Tensor>,
    pub next: Option<NextTokens>,
}

impl Rows {
    /// The sum of their losses, without axes, and the gradient of the student's logits in `dtype`.
    fn loss(self, weights: &Weights, dtype: DType) -> candle_core::Result<(Tensor, Tensor)> {
        #[cfg(feature = "cuda")]
        if self.student.device().is_cuda() {
            return super::cuda::loss(&self, weights, dtype);
        }
        self.composed_loss(weights, dtype)
    }

    /// [`Rows::loss`] of the tensor library's ops.
    fn composed_loss(
        self,
        weights: &Weights,
        dtype: DType,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let student = Softmax::new(self.student)?;
        let mut loss = Tensor::zeros((), DType::F32, student.sum.device())?;
        // The gradient of the student's logits: its own probabilities, less the teacher's and the token that came.
        let kl_weight = if self.teacher.is_some() { weights.kl_weight } else { 0.0 };
        let scale = match &self.next {
            Some(NextTokens { there, .. }) => there.affine(weights.next_weight, kl_weight)?,
            None => (student.sum.ones_like()? * kl_weight)?,
        };
        let mut d_logits = student.times(&scale)?;
        if let Some(teacher) = self.teacher {
            let teacher = Softmax::new(teacher)?;
            loss = (loss + (sum(&teacher.divergence_from(&student)?)? * weights.kl_share)?)?;
            let weight = (teacher.sum.ones_like()? * kl_weight)?;
            d_logits = (d_logits - teacher.times(&weight)?)?;
        }
        if let Some(NextTokens { ids, there }) = &self.next {
            let surprise = (student.surprise(ids)? * there)?;
            loss = (loss + (sum(&surprise)? * weights.next_share)?)?;
            d_logits.scatter_add_set(ids, &(there * -weights.next_weight)?, 1)?;
        }
        Ok((loss, d_logits.to_dtype(dtype)?))
    }
}

/// Distributions over the vocabulary.
struct Softmax {
    /// Logits less their row's largest, `[rows, vocab]`.
    shifted: Tensor,
    /// Their exponentials.
    powers: Tensor,
    /// Of the exponentials, `[rows, 1]`.
    sum: Tensor,
}

impl Softmax {
    fn new(logits: Tensor) -> candle_core::Result<Self> {
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
        drop(logits);
        let powers = shifted.exp()?;
        let sum = powers.sum_keepdim(D::Minus1)?;
        Ok(Self { shifted, powers, sum })
    }

    /// The probabilities of each row times its weight; `weight` is `[rows, 1]`.
    fn times(&self, weight: &Tensor) -> candle_core::Result<Tensor> {
        self.powers.broadcast_mul(&(weight / &self.sum)?)
    }

    /// KL(self ‖ other) of each row, `[rows, 1]`.
    fn divergence_from(&self, other: &Self) -> candle_core::Result<Tensor> {
        let difference = (&self.shifted - &other.shifted)?;
        let cross = ((&self.powers * difference)?.sum_keepdim(D::Minus1)? / &self.sum)?;
        (cross + other.sum.log()?)? - self.sum.log()?
    }

    /// −ln p(id) of each row, `[rows, 1]`; `ids` are `[rows, 1]`.
    fn surprise(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        self.sum.log()? - self.shifted.gather(ids, 1)?
    }
}

/// The tokens that rows predict.
pub(super) struct NextTokens {
    /// `[rows, 1]` u32
    pub ids: Tensor,
    /// `[rows, 1]` f32: 1, or 0 for the last row if nothing comes after it.
    pub there: Tensor,
}

impl NextTokens {
    /// None without ids.
    fn new(ids: &[u32], rows: usize, like: &Tensor) -> candle_core::Result<Option<Self>> {
        if ids.is_empty() {
            return Ok(None);
        }
        let mut ids = ids.to_vec();
        let mut there = vec![1.0_f32; ids.len()];
        ids.resize(rows, 0);
        there.resize(rows, 0.0);
        let ids = Tensor::from_vec(ids, (rows, 1), like.device())?;
        let there = Tensor::from_vec(there, (rows, 1), like.device())?;
        Ok(Some(Self { ids, there }))
    }

    fn narrow(&self, start: usize, rows: usize) -> candle_core::Result<Self> {
        let of = |column: &Tensor| column.narrow(0, start, rows);
        Ok(Self { ids: of(&self.ids)?, there: of(&self.there)? })
    }
}

/// The sum of all values, no axes. The inner axes come first: a sum to one value is the work of one block of threads.
fn sum(x: &Tensor) -> candle_core::Result<Tensor> {
    let mut x = x.clone();
    while x.rank() > 2 {
        x = x.sum(D::Minus1)?;
    }
    x.sum_all()
}
