//! Losses over the vocabulary, in blocks of rows: a full `[tokens, vocab]` tensor never exists.

use candle_core::Tensor;
use rayon::prelude::*;
use still_attention::linalg::{Mat, par_matmul};
use still_attention::tensor::borrow;
use still_attention::vector::{self, vectorize};

use crate::error::Result;

/// Rows whose logits exist at a time.
pub(crate) const BLOCK: usize = 256;
/// Logits summed in f32 before they join a float64 total.
const SHORT: usize = 512;

/// Values whose squared errors one thread sums at a time.
const PART: usize = 16_384;

/// `mean((x − target)²)` of equal shapes, f32, and its gradient with respect to `x`.
///
/// # Errors
/// Shapes that differ.
pub fn mean_squared_error(x: &Tensor, target: &Tensor) -> candle_core::Result<(f64, Tensor)> {
    if x.dims() != target.dims() {
        candle_core::bail!("mean_squared_error: {:?} and {:?}", x.dims(), target.dims())
    }
    let count = x.elem_count().max(1);
    let weight = 2.0 / count as f32;
    let mut gradient = vec![0.0_f32; x.elem_count()];
    let total = borrow(x, |x: &[f32]| {
        borrow(target, |target: &[f32]| {
            let parts = gradient.par_chunks_mut(PART).zip(x.par_chunks(PART));
            sum_in_order(parts.zip(target.par_chunks(PART)).map(|((gradient, x), target)| {
                vectorize(
                    #[inline(always)]
                    || {
                        for ((gradient, &x), &target) in gradient.iter_mut().zip(x).zip(target) {
                            *gradient = x - target;
                        }
                        let squares = f64::from(vector::dot(gradient, gradient));
                        gradient.iter_mut().for_each(|gradient| *gradient *= weight);
                        squares
                    },
                )
            }))
        })
    })??;
    Ok((total / count as f64, Tensor::from_vec(gradient, x.shape(), x.device())?))
}

/// The variance of all values of a tensor, f32.
///
/// # Errors
/// Another dtype or device.
pub(crate) fn variance(x: &Tensor) -> candle_core::Result<f64> {
    borrow(x, |x: &[f32]| {
        let mean_of = |of: &(dyn Fn(f64) -> f64 + Sync)| {
            let parts = x.par_chunks(PART);
            let sums = parts.map(|part| part.iter().map(|&x| of(f64::from(x))).sum::<f64>());
            sum_in_order(sums) / x.len().max(1) as f64
        };
        let mean = mean_of(&|x| x);
        mean_of(&|x| (x - mean).powi(2))
    })
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

/// Loss in nats per token, and its gradient with respect to `hidden`.
///
/// `hidden` `[N, E]`: the student's final-normed hidden states, f32, detached. `lm_head` `[vocab, E]`. `counted`
/// `[N]`: if given, the mean is over the rows before a counted token alone; their logits are the only ones computed.
///
/// # Errors
/// Shapes that do not fit.
pub fn vocabulary_loss<'a>(
    hidden: &Tensor,
    lm_head: &Tensor,
    target: Target<'a>,
    counted: Option<&[bool]>,
) -> Result<(f64, Tensor)> {
    let (tokens, width) = hidden.dims2()?;
    let Some(counted) = counted else {
        let next = |ids: &'a [u32]| &ids[1.min(ids.len())..];
        let target = match target {
            Target::Teacher(_) => target,
            Target::NextToken(ids) => Target::NextToken(next(ids)),
            Target::Mixed { teacher, ids, kl } => Target::Mixed { teacher, ids: next(ids), kl },
        };
        let mut gradient = vec![0.0_f32; tokens * width];
        let loss = rows_loss(hidden, lm_head, target, &mut gradient)?;
        return Ok((loss, Tensor::from_vec(gradient, hidden.shape(), hidden.device())?));
    };
    if counted.len() != tokens {
        let what = format!("vocabulary_loss: {tokens} rows, a mask of {}", counted.len());
        return Err(candle_core::Error::Msg(what).into());
    }
    let rows: Vec<u32> =
        (1..tokens as u32).filter(|&t| counted[t as usize]).map(|t| t - 1).collect();
    let mut gradient = vec![0.0_f32; tokens * width];
    if rows.is_empty() {
        return Ok((0.0, Tensor::from_vec(gradient, hidden.shape(), hidden.device())?));
    }
    let index = Tensor::new(rows.as_slice(), hidden.device())?;
    let of_rows = |hidden: &Tensor| hidden.index_select(&index, 0);
    let next = |ids: &[u32]| rows.iter().map(|&row| ids[row as usize + 1]).collect::<Vec<_>>();
    let (next_ids, teacher_rows);
    let target = match target {
        Target::Teacher(teacher) => {
            teacher_rows = of_rows(teacher)?;
            Target::Teacher(&teacher_rows)
        }
        Target::NextToken(ids) => {
            next_ids = next(ids);
            Target::NextToken(&next_ids)
        }
        Target::Mixed { teacher, ids, kl } => {
            (next_ids, teacher_rows) = (next(ids), of_rows(teacher)?);
            Target::Mixed { teacher: &teacher_rows, ids: &next_ids, kl }
        }
    };
    let mut gathered = vec![0.0_f32; rows.len() * width];
    let loss = rows_loss(&of_rows(hidden)?, lm_head, target, &mut gathered)?;
    for (&row, gathered) in rows.iter().zip(gathered.chunks_exact(width)) {
        gradient[row as usize * width..][..width].copy_from_slice(gathered);
    }
    Ok((loss, Tensor::from_vec(gradient, hidden.shape(), hidden.device())?))
}

/// The mean loss of rows of `hidden` and, over zeros in `gradient`, its gradient. Ids are those that the rows predict, the
/// first ones if there are fewer than rows.
fn rows_loss(
    hidden: &Tensor,
    lm_head: &Tensor,
    target: Target<'_>,
    gradient: &mut [f32],
) -> Result<f64> {
    let (tokens, _) = hidden.dims2()?;
    let (rows, predicted) = match target {
        Target::Teacher(_) => (tokens, 0),
        Target::NextToken(ids) => (ids.len(), ids.len()),
        Target::Mixed { ids, .. } => (tokens, ids.len()),
    };
    let (vocab, width) = lm_head.dims2()?;
    let kl_share = match target {
        Target::Teacher(_) => 1.0,
        Target::NextToken(_) => 0.0,
        Target::Mixed { kl, .. } => kl,
    };
    // What one row's divergence and one row's surprise count.
    let kl_weight = kl_share as f32 / rows.max(1) as f32;
    let next_weight = (1.0 - kl_share) as f32 / predicted.max(1) as f32;
    let (mut divergences, mut surprises) = (0.0, 0.0);
    let (mut student, mut teacher) = (Vec::new(), Vec::new());
    for (start, gradient) in (0..rows).step_by(BLOCK).zip(gradient.chunks_mut(BLOCK * width)) {
        let count = BLOCK.min(rows - start);
        logits(&hidden.narrow(0, start, count)?, lm_head, &mut student)?;
        let students = student.par_chunks_exact_mut(vocab);
        match target {
            Target::NextToken(ids) => {
                let rows = students.zip(&ids[start..start + count]);
                surprises += sum_in_order(rows.map(|(student, &id)| {
                    vectorize(
                        #[inline(always)]
                        || surprise(student, id as usize, next_weight),
                    )
                }));
            }
            Target::Teacher(hidden) | Target::Mixed { teacher: hidden, .. } => {
                logits(&hidden.narrow(0, start, count)?, lm_head, &mut teacher)?;
                let ids = match target {
                    Target::Mixed { ids, .. } => ids,
                    _ => &[],
                };
                let rows = students.zip(teacher.par_chunks_exact_mut(vocab)).enumerate();
                let pairs = rows.map(|(row, (student, teacher))| {
                    // The last token predicts nothing that is there.
                    let next = ids.get(start + row).map(|&id| (id as usize, next_weight));
                    vectorize(
                        #[inline(always)]
                        || divergence(student, teacher, kl_weight, next),
                    )
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
    let mean = |total: f64, rows: usize| total / rows.max(1) as f64;
    Ok(kl_share * mean(divergences, rows) + (1.0 - kl_share) * mean(surprises, predicted))
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

/// −ln p(id) of one row of logits, which becomes `weight` times its gradient.
#[inline(always)]
fn surprise(logits: &mut [f32], id: usize, weight: f32) -> f64 {
    let max = vector::max(logits);
    let own = f64::from(logits[id] - max);
    let sum = vector::exp_sub_sum(logits, max);
    let scale = weight / sum;
    logits.iter_mut().for_each(|x| *x *= scale);
    logits[id] -= weight;
    f64::from(sum.ln()) - own
}

/// KL(teacher ‖ student) of one row of logits each and, if `next` gives an id and its weight, −ln p(id), else 0.
///
/// `student` becomes the gradient of `weight` times the one plus the id's weight times the other; `teacher` is spent.
#[inline(always)]
fn divergence(
    student: &mut [f32],
    teacher: &mut [f32],
    weight: f32,
    next: Option<(usize, f32)>,
) -> (f64, f64) {
    let (max_s, max_t) = (vector::max(student), vector::max(teacher));
    let own = next.map(|(id, _)| f64::from(student[id] - max_s));
    let (mut sum_s, mut sum_t, mut cross) = (0.0_f64, 0.0_f64, 0.0_f64);
    // Short partial sums in f32, their total in f64.
    for (student, teacher) in student.chunks_mut(SHORT).zip(teacher.chunks_mut(SHORT)) {
        let mut shifted = [0.0_f32; SHORT];
        for ((shifted, &s), &t) in shifted.iter_mut().zip(student.iter()).zip(teacher.iter()) {
            *shifted = (t - max_t) - (s - max_s);
        }
        sum_s += f64::from(vector::exp_sub_sum(student, max_s));
        sum_t += f64::from(vector::exp_sub_sum(teacher, max_t));
        cross += f64::from(vector::dot(teacher, &shifted[..teacher.len()]));
    }
    let next_weight = next.map_or(0.0, |(_, weight)| weight);
    let (scale_s, scale_t) = ((weight + next_weight) / sum_s as f32, weight / sum_t as f32);
    for (student, &teacher) in student.iter_mut().zip(teacher.iter()) {
        *student = *student * scale_s - teacher * scale_t;
    }
    if let Some((id, weight)) = next {
        student[id] -= weight;
    }
    let surprise = own.map_or(0.0, |own| sum_s.ln() - own);
    (cross / sum_t + sum_s.ln() - sum_t.ln(), surprise)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use still_attention::router::random_score;

    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
        let values: Vec<f32> =
            (0..rows * columns).map(|i| (4.0 * random_score(seed, 0, 0, i) - 2.0) as f32).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    /// Log-softmax of the logits in float64.
    fn log_softmax(hidden: &Tensor, head: &Tensor) -> Vec<Vec<f64>> {
        let logits: Vec<Vec<f32>> = hidden.matmul(&head.t().unwrap()).unwrap().to_vec2().unwrap();
        let row = |row: &Vec<f32>| {
            let z: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            row.iter().map(|&x| f64::from(x) - z.ln()).collect()
        };
        logits.iter().map(row).collect()
    }

    fn check_gradient(loss: impl Fn(&Tensor) -> (f64, Tensor), hidden: &Tensor) {
        let (_, gradient) = loss(hidden);
        let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
        let base: Vec<f32> = hidden.flatten_all().unwrap().to_vec1().unwrap();
        for i in (0..base.len()).step_by(7) {
            let at = |delta: f32| {
                let mut moved = base.clone();
                moved[i] += delta;
                loss(&Tensor::from_vec(moved, hidden.shape(), &Device::Cpu).unwrap()).0
            };
            let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
            let error = (f64::from(gradient[i]) - numeric).abs();
            assert!(error < 2e-5 + 1e-3 * numeric.abs(), "{i}: {} vs {numeric}", gradient[i]);
        }
    }

    #[test]
    fn squared_error_equals_its_definition_over_several_parts() {
        let (x, target) = (random(150, 300, 1), random(150, 300, 2));
        let expected = (&x - &target).unwrap();
        let mean = expected.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        let (got, gradient) = mean_squared_error(&x, &target).unwrap();
        assert!((got - f64::from(mean)).abs() < 1e-5 * got, "{got} vs {mean}");
        let expected = (expected * (2.0 / 45_000.0)).unwrap();
        let worst = (gradient - expected).unwrap().abs().unwrap().max_all().unwrap();
        assert!(worst.to_scalar::<f32>().unwrap() < 1e-9);
        assert!(mean_squared_error(&x, &random(3, 3, 1)).is_err());
    }

    #[test]
    fn variance_is_that_of_all_values() {
        let x = random(150, 300, 1);
        let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / 45_000.0;
        let expected =
            values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 45_000.0;
        assert!((variance(&x).unwrap() / expected - 1.0).abs() < 1e-9);
    }

    #[test]
    fn kl_equals_its_definition_over_several_blocks() {
        let (hidden, teacher, head) = (random(150, 6, 1), random(150, 6, 2), random(700, 6, 3));
        let (student_logs, teacher_logs) =
            (log_softmax(&hidden, &head), log_softmax(&teacher, &head));
        let kl: f64 = student_logs
            .iter()
            .zip(&teacher_logs)
            .map(|(s, t)| s.iter().zip(t).map(|(s, t)| t.exp() * (t - s)).sum::<f64>())
            .sum::<f64>()
            / 150.0;
        let loss = |h: &Tensor| vocabulary_loss(h, &head, Target::Teacher(&teacher), None).unwrap();
        assert!((loss(&hidden).0 - kl).abs() < 1e-5, "{} vs {kl}", loss(&hidden).0);
        assert!(loss(&teacher).0.abs() < 1e-6);
        check_gradient(loss, &hidden);
    }

    #[test]
    fn a_mask_is_the_mean_over_the_rows_that_it_counts() {
        let (hidden, teacher, head) = (random(300, 6, 1), random(300, 6, 2), random(90, 6, 3));
        let ids: Vec<u32> = (0..300).map(|i| i * 37 % 90).collect();
        let counted: Vec<bool> = (0..300).map(|i| i % 3 == 0 || i > 280).collect();
        let rows: Vec<usize> = (0..299).filter(|&row| counted[row + 1]).collect();
        let logs = log_softmax(&hidden, &head);
        let nll = rows.iter().map(|&row| -logs[row][ids[row + 1] as usize]).sum::<f64>();
        let loss = |h: &Tensor| {
            vocabulary_loss(h, &head, Target::NextToken(&ids), Some(&counted)).unwrap()
        };
        assert!((loss(&hidden).0 - nll / rows.len() as f64).abs() < 1e-5);
        check_gradient(loss, &hidden);
        let kl = |h: &Tensor| {
            vocabulary_loss(h, &head, Target::Teacher(&teacher), Some(&counted)).unwrap()
        };
        check_gradient(kl, &hidden);
        let gradient: Vec<Vec<f32>> = kl(&hidden).1.to_vec2().unwrap();
        for (row, gradient) in gradient.iter().enumerate() {
            assert_eq!(gradient.iter().any(|&g| g != 0.0), rows.contains(&row), "row {row}");
        }
        let nothing = vec![false; 300];
        let (loss, gradient) =
            vocabulary_loss(&hidden, &head, Target::Teacher(&teacher), Some(&nothing)).unwrap();
        assert_eq!(
            (loss, gradient.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()),
            (0.0, 0.0)
        );
        assert!(
            vocabulary_loss(&hidden, &head, Target::NextToken(&ids), Some(&nothing[1..])).is_err()
        );
    }

    #[test]
    fn cross_entropy_equals_its_definition() {
        let (hidden, head) = (random(140, 6, 1), random(90, 6, 3));
        let ids: Vec<u32> = (0..140).map(|i| i * 37 % 90).collect();
        let logs = log_softmax(&hidden, &head);
        let nll = (0..139).map(|i| -logs[i][ids[i + 1] as usize]).sum::<f64>() / 139.0;
        let loss = |h: &Tensor| vocabulary_loss(h, &head, Target::NextToken(&ids), None).unwrap();
        assert!((loss(&hidden).0 - nll).abs() < 1e-5);
        check_gradient(loss, &hidden);
        let last: Vec<f32> = loss(&hidden).1.get(139).unwrap().to_vec1().unwrap();
        assert!(last.iter().all(|&g| g == 0.0), "the last token predicts nothing");
    }

    #[test]
    fn a_mixture_is_the_weighted_sum_of_both_in_loss_and_gradient() {
        let (hidden, teacher, head) = (random(300, 6, 1), random(300, 6, 2), random(90, 6, 3));
        let ids: Vec<u32> = (0..300).map(|i| i * 37 % 90).collect();
        let of = |target| vocabulary_loss(&hidden, &head, target, None).unwrap();
        let (kl, d_kl) = of(Target::Teacher(&teacher));
        let (nll, d_nll) = of(Target::NextToken(&ids));
        for share in [0.0, 0.3, 1.0] {
            let (loss, gradient) = of(Target::Mixed { teacher: &teacher, ids: &ids, kl: share });
            assert!((loss - (share * kl + (1.0 - share) * nll)).abs() < 1e-6);
            let expected = ((&d_kl * share).unwrap() + (&d_nll * (1.0 - share)).unwrap()).unwrap();
            let worst = (gradient - expected).unwrap().abs().unwrap().max_all().unwrap();
            assert!(worst.to_scalar::<f32>().unwrap() < 1e-7);
        }
    }
}
