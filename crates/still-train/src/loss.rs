//! Losses over the vocabulary, in blocks of rows: a full `[tokens, vocab]` tensor never exists.

use candle_core::{CpuStorage, Storage, Tensor};
use rayon::prelude::*;
use still_attention::vector;

use crate::error::Result;

/// Rows whose logits exist at a time.
const BLOCK: usize = 128;

/// What the student's distribution is held against.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// The teacher's final-normed hidden states `[N, E]`: mean over `N` rows of KL(teacher ‖ student).
    Teacher(&'a Tensor),
    /// The sequence's own ids: mean over `N − 1` rows of the next token's negative log-probability.
    NextToken(&'a [u32]),
}

/// Loss in nats per token, and its gradient with respect to `hidden`.
///
/// `hidden` `[N, E]`: the student's final-normed hidden states, f32, detached. `lm_head` `[vocab, E]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn vocabulary_loss(
    hidden: &Tensor,
    lm_head: &Tensor,
    target: Target<'_>,
) -> Result<(f64, Tensor)> {
    let (tokens, _) = hidden.dims2()?;
    let rows = match target {
        Target::Teacher(_) => tokens,
        Target::NextToken(_) => tokens.saturating_sub(1),
    };
    let head = lm_head.t()?;
    let mut total = 0.0;
    let mut gradients = Vec::new();
    for start in (0..rows).step_by(BLOCK) {
        let count = BLOCK.min(rows - start);
        let logits = hidden.narrow(0, start, count)?.matmul(&head)?;
        let teacher = match target {
            Target::Teacher(teacher) => Some(teacher.narrow(0, start, count)?.matmul(&head)?),
            Target::NextToken(_) => None,
        };
        let ids = match target {
            Target::Teacher(_) => None,
            Target::NextToken(ids) => Some(&ids[start + 1..start + 1 + count]),
        };
        let (loss, d_logits) = block(&logits, teacher.as_ref(), ids, 1.0 / rows as f32)?;
        total += loss;
        gradients.push(d_logits.matmul(lm_head)?);
    }
    if rows < tokens {
        gradients.push(hidden.narrow(0, rows, tokens - rows)?.zeros_like()?);
    }
    Ok((total / rows.max(1) as f64, Tensor::cat(&gradients, 0)?))
}

/// Summed loss of a block of rows, and the gradient of `weight` times it with respect to the logits.
fn block(
    logits: &Tensor,
    teacher: Option<&Tensor>,
    ids: Option<&[u32]>,
    weight: f32,
) -> Result<(f64, Tensor)> {
    let (rows, vocab) = logits.dims2()?;
    let mut gradient = vec![0.0_f32; rows * vocab];
    let (guard, _) = logits.storage_and_layout();
    let student = cpu_values(&guard)?;
    let teacher_guard = teacher.map(|teacher| teacher.storage_and_layout().0);
    let teacher = teacher_guard.as_deref().map(cpu_values).transpose()?;
    let losses: Vec<f64> = gradient
        .par_chunks_mut(vocab)
        .enumerate()
        .map(|(row, gradient)| {
            let span = row * vocab..(row + 1) * vocab;
            let student = &student[span.clone()];
            let (log_z, scale) = exponentials(student, gradient);
            gradient.iter_mut().for_each(|g| *g *= scale * weight);
            if let Some(ids) = ids {
                let id = ids[row] as usize;
                gradient[id] -= weight;
                return f64::from(log_z) - f64::from(student[id]);
            }
            let Some(teacher) = teacher else { return f64::NAN };
            let teacher = &teacher[span];
            let mut share = vec![0.0_f32; vocab];
            let (teacher_log_z, scale) = exponentials(teacher, &mut share);
            let mut kl = 0.0_f64;
            // Short partial sums in f32, their total in f64.
            for start in (0..vocab).step_by(512) {
                let end = (start + 512).min(vocab);
                let mut part = 0.0_f32;
                for i in start..end {
                    let p = share[i] * scale;
                    part += p * (teacher[i] - student[i]);
                    gradient[i] -= p * weight;
                }
                kl += f64::from(part);
            }
            kl + f64::from(log_z) - f64::from(teacher_log_z)
        })
        .collect();
    Ok((losses.iter().sum(), Tensor::from_vec(gradient, (rows, vocab), logits.device())?))
}

/// Writes `e^{x − max}`; returns the log-sum-exp and the inverse of the sum.
fn exponentials(x: &[f32], to: &mut [f32]) -> (f32, f32) {
    let max = vector::max(x);
    to.copy_from_slice(x);
    let sum = vector::exp_sub_sum(to, max);
    (max + sum.ln(), 1.0 / sum)
}

fn cpu_values(storage: &Storage) -> Result<&[f32]> {
    match storage {
        Storage::Cpu(storage @ CpuStorage::F32(_)) => Ok(storage.as_slice()?),
        _ => {
            Err(candle_core::Error::Msg("vocabulary_loss has an f32 CPU kernel only".into()).into())
        }
    }
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
        let loss = |h: &Tensor| vocabulary_loss(h, &head, Target::Teacher(&teacher)).unwrap();
        assert!((loss(&hidden).0 - kl).abs() < 1e-5, "{} vs {kl}", loss(&hidden).0);
        assert!(loss(&teacher).0.abs() < 1e-6);
        check_gradient(loss, &hidden);
    }

    #[test]
    fn cross_entropy_equals_its_definition() {
        let (hidden, head) = (random(140, 6, 1), random(90, 6, 3));
        let ids: Vec<u32> = (0..140).map(|i| i * 37 % 90).collect();
        let logs = log_softmax(&hidden, &head);
        let nll = (0..139).map(|i| -logs[i][ids[i + 1] as usize]).sum::<f64>() / 139.0;
        let loss = |h: &Tensor| vocabulary_loss(h, &head, Target::NextToken(&ids)).unwrap();
        assert!((loss(&hidden).0 - nll).abs() < 1e-5);
        check_gradient(loss, &hidden);
        let last: Vec<f32> = loss(&hidden).1.get(139).unwrap().to_vec1().unwrap();
        assert!(last.iter().all(|&g| g == 0.0), "the last token predicts nothing");
    }
}
