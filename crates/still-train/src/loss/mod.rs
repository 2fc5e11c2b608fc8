//! Losses and their gradients. Those over the vocabulary take rows in blocks: a full `[tokens, vocab]` tensor never exists.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
#[cfg(test)]
mod tests;

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::scalar::Scalar;

/// `mean((x − target)²)` of equal shapes, over `variance` if it is given, and the gradient of `weight` times it with respect
/// to `x`, in its dtype: f32, or on a device f32 or bf16.
///
/// # Errors
/// Shapes that differ.
pub(crate) fn mean_squared_error(
    x: &Tensor,
    target: &Tensor,
    variance: Option<&Scalar>,
    weight: f64,
) -> Result<(Scalar, Tensor)> {
    if x.dims() != target.dims() {
        let what = format!("mean_squared_error: {:?} and {:?}", x.dims(), target.dims());
        return Err(candle_core::Error::Msg(what).into());
    }
    match x.device() {
        Device::Cpu => cpu::mean_squared_error(x, target, variance, weight),
        _ => device::mean_squared_error(x, target, variance, weight),
    }
}

/// The variance of all values of a tensor: f32, or on a device f32 or bf16.
///
/// # Errors
/// Another dtype.
pub(crate) fn variance(x: &Tensor) -> Result<Scalar> {
    match x.device() {
        Device::Cpu => cpu::variance(x),
        _ => device::variance(x),
    }
}

/// What the student's distribution is held against.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// The teacher's final-normed hidden states `[N, E]`: mean over `N` rows of KL(teacher ‖ student).
    Teacher(&'a Tensor),
    /// The sequence's own ids: mean over `N − 1` rows of the next token's negative log-probability.
    NextToken(&'a [u32]),
    /// `kl` times the first plus `1 − kl` times the second.
    Mixed {
        /// The teacher's final-normed hidden states `[N, E]`.
        teacher: &'a Tensor,
        /// The sequence's own ids.
        ids: &'a [u32],
        /// Weight of the divergence, 0 … 1.
        kl: f64,
    },
}

impl<'a> Target<'a> {
    fn teacher(&self) -> Option<&'a Tensor> {
        match *self {
            Self::Teacher(teacher) | Self::Mixed { teacher, .. } => Some(teacher),
            Self::NextToken(_) => None,
        }
    }

    fn ids(&self) -> &'a [u32] {
        match *self {
            Self::Teacher(_) => &[],
            Self::NextToken(ids) | Self::Mixed { ids, .. } => ids,
        }
    }

    /// The same with other hidden states and ids in the place of those it has.
    fn with<'b>(&self, teacher: Option<&'b Tensor>, ids: &'b [u32]) -> Target<'b> {
        match (teacher, self) {
            (Some(teacher), Self::Mixed { kl, .. }) => Target::Mixed { teacher, ids, kl: *kl },
            (Some(teacher), _) => Target::Teacher(teacher),
            (None, _) => Target::NextToken(ids),
        }
    }

    /// What counts of `tokens` rows when the ids are those that rows predict, the first ones if there are fewer than rows.
    fn shares(&self, tokens: usize) -> Shares {
        let predicted = self.ids().len();
        let (rows, kl) = match self {
            Self::Teacher(_) => (tokens, 1.0),
            Self::NextToken(_) => (predicted, 0.0),
            Self::Mixed { kl, .. } => (tokens, *kl),
        };
        Shares {
            rows,
            divergence: kl / rows.max(1) as f64,
            surprise: (1.0 - kl) / predicted.max(1) as f64,
        }
    }
}

/// What makes up a loss.
struct Shares {
    /// Rows that count, from the first.
    rows: usize,
    /// What the divergence of one row counts, in all that the loss is.
    divergence: f64,
    /// What the surprise of one row's next token counts.
    surprise: f64,
}

/// Rows whose logits exist at a time.
pub(crate) fn block_rows(device: &Device, vocab: usize) -> usize {
    match device {
        Device::Cpu => cpu::BLOCK,
        _ => device::block_rows(vocab),
    }
}

/// Loss in nats per token, and the gradient of `weight` times it with respect to `hidden`, in its dtype.
///
/// `hidden` `[N, E]`: the student's final-normed hidden states, detached. `lm_head` `[vocab, E]`. Both are f32 or, on a
/// device, both bf16; logits and what is summed are f32 there too. `counted` `[N]`: if given, the mean is over the rows
/// before a counted token alone; their logits are the only ones computed.
///
/// # Errors
/// Shapes that do not fit.
pub fn vocabulary_loss(
    hidden: &Tensor,
    lm_head: &Tensor,
    target: Target<'_>,
    counted: Option<&[bool]>,
    weight: f64,
) -> Result<(Scalar, Tensor)> {
    let rows_loss = match hidden.device() {
        Device::Cpu => cpu::rows_loss,
        _ => device::rows_loss,
    };
    let tokens = hidden.dim(0)?;
    let Some(counted) = counted else {
        let ids = target.ids();
        let target = target.with(target.teacher(), &ids[1.min(ids.len())..]);
        return rows_loss(hidden, lm_head, target, weight);
    };
    if counted.len() != tokens {
        let what = format!("vocabulary_loss: {tokens} rows, a mask of {}", counted.len());
        return Err(candle_core::Error::Msg(what).into());
    }
    let before_counted = (1..tokens as u32).filter(|&t| counted[t as usize]).map(|t| t - 1);
    let rows: Vec<u32> = before_counted.collect();
    if rows.is_empty() {
        return Ok((Scalar::Host(0.0), hidden.zeros_like()?));
    }
    let index = Tensor::new(rows.as_slice(), hidden.device())?;
    let of_rows = |hidden: &Tensor| hidden.index_select(&index, 0);
    let teacher = target.teacher().map(of_rows).transpose()?;
    let ids: Vec<u32> = match target.ids() {
        [] => Vec::new(),
        ids => rows.iter().map(|&row| ids[row as usize + 1]).collect(),
    };
    let target = target.with(teacher.as_ref(), &ids);
    let (loss, gradient) = rows_loss(&of_rows(hidden)?, lm_head, target, weight)?;
    Ok((loss, hidden.zeros_like()?.index_add(&index, &gradient, 0)?))
}
