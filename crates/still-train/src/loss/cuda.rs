//! The loss of rows of logits in one kernel.

use std::ptr::null;

use candle_core::{DType, Result, Tensor};
use still_compute::cuda::{kind, queue};
use still_kernels::decoder::{VocabularyLoss, still_vocabulary_loss};

use super::device::{Rows, Weights};

/// The sum of the rows' losses, without axes, and the gradient of the student's logits in `dtype`.
pub(super) fn loss(rows: &Rows, weights: &Weights, dtype: DType) -> Result<(Tensor, Tensor)> {
    let Rows { student, teacher, next } = rows;
    let (count, vocab) = student.dims2()?;
    let kind = kind(dtype)?;
    // What is not there is not read.
    let other = teacher.as_ref().unwrap_or(student);
    let (ids, there) = next.as_ref().map_or((student, student), |next| (&next.ids, &next.there));
    let inputs =
        [student.contiguous()?, other.contiguous()?, ids.contiguous()?, there.contiguous()?];
    let outputs = [(count.into(), DType::F32), ((count, vocab).into(), dtype)];
    let [losses, d_logits] = queue(
        "still_vocabulary_loss",
        inputs.each_ref(),
        outputs,
        |[student, other, ids, there], [losses, d_logits], stream| {
            let args = VocabularyLoss {
                rows: count as i64,
                vocab: vocab as i32,
                dtype: kind,
                student: student.cast(),
                teacher: if teacher.is_some() { other.cast() } else { null() },
                ids: if next.is_some() { ids.cast() } else { null() },
                there: if next.is_some() { there.cast() } else { null() },
                kl_share: weights.kl_share as f32,
                kl_weight: weights.kl_weight as f32,
                next_share: weights.next_share as f32,
                next_weight: weights.next_weight as f32,
                losses: losses.cast(),
                d_logits,
            };
            // SAFETY: logits are contiguous f32 of these sizes; ids are u32 and, like `there`, one a row.
            unsafe { still_vocabulary_loss(&raw const args, stream) }
        },
    )?;
    Ok((losses.sum_all()?, d_logits))
}
