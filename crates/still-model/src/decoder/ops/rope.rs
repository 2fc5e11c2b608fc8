//! Rotary position embedding, half rotation (Hugging Face's layout).

use std::marker::PhantomData;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use still_attention::Real;

use super::{slice, values};

/// Cosines and sines of a run of positions, one run for the whole batch or one per sequence.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// `[runs, tokens, D/2]`
    cos: Arc<Vec<f32>>,
    /// `[runs, tokens, D/2]`
    sin: Arc<Vec<f32>>,
    tokens: usize,
    half: usize,
}

impl Rotation {
    /// From angles `[runs, tokens, D/2]` in radians, given the number of tokens of one run times the runs.
    ///
    /// # Errors
    /// If the angles do not divide into `rows` rows.
    pub fn from_angles(angles: &[f64], rows: usize) -> Result<Self> {
        if rows == 0 || !angles.len().is_multiple_of(rows) {
            candle_core::bail!("rope: {} angles do not make {rows} rows", angles.len())
        }
        Ok(Self {
            cos: Arc::new(angles.iter().map(|a| a.cos() as f32).collect()),
            sin: Arc::new(angles.iter().map(|a| a.sin() as f32).collect()),
            tokens: rows,
            half: angles.len() / rows,
        })
    }

    /// From one run of angles per sequence, `tokens` tokens each.
    ///
    /// # Errors
    /// If the angles do not divide.
    pub fn of_runs(angles: &[f64], runs: usize, tokens: usize) -> Result<Self> {
        let all = Self::from_angles(angles, runs * tokens)?;
        Ok(Self { tokens, ..all })
    }

    /// Angles of sequence `sequence`'s token `token`: its cosines and sines.
    fn row(&self, sequence: usize, token: usize) -> (&[f32], &[f32]) {
        let runs = self.cos.len() / (self.tokens * self.half);
        let run = if runs == 1 { 0 } else { sequence };
        let start = (run * self.tokens + token) * self.half;
        (&self.cos[start..start + self.half], &self.sin[start..start + self.half])
    }
}

/// Rotates `x` `[B, H, N, D]`: channel `i` with channel `i + D/2`. The gradient rotates back.
///
/// # Errors
/// Another number of tokens or channels than the rotation's; a dtype other than f32 and f64.
pub fn rope(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    let (batch, _, tokens, head_dim) = x.dims4()?;
    let runs = rotation.cos.len() / (rotation.tokens * rotation.half).max(1);
    if tokens != rotation.tokens || head_dim != 2 * rotation.half || (runs != 1 && runs != batch) {
        candle_core::bail!(
            "rope: x is {:?}, the rotation is for {runs} runs of {} tokens of {} channels",
            x.dims(),
            rotation.tokens,
            2 * rotation.half
        )
    }
    rotate(&x.contiguous()?, rotation, false)
}

fn rotate(x: &Tensor, rotation: &Rotation, back: bool) -> Result<Tensor> {
    let rotation = rotation.clone();
    match x.dtype() {
        DType::F32 => x.apply_op1(Rope::<f32> { rotation, back, dtype: PhantomData }),
        DType::F64 => x.apply_op1(Rope::<f64> { rotation, back, dtype: PhantomData }),
        other => candle_core::bail!("rope: no kernel for {other:?}, expected f32 or f64"),
    }
}

struct Rope<T> {
    rotation: Rotation,
    back: bool,
    dtype: PhantomData<fn() -> T>,
}

impl<T: Real> Rope<T> {
    fn run(&self, x: &[T], heads: usize, back: bool) -> Vec<T> {
        let (tokens, half) = (self.rotation.tokens, self.rotation.half);
        let block = tokens * 2 * half;
        let mut y = vec![T::zero(); x.len()];
        y.par_chunks_mut(block).zip(x.par_chunks(block)).enumerate().for_each(|(task, (y, x))| {
            let sequence = task / heads;
            for (token, (y, x)) in
                y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)).enumerate()
            {
                let (cos, sin) = self.rotation.row(sequence, token);
                let (x_low, x_high) = x.split_at(half);
                let (y_low, y_high) = y.split_at_mut(half);
                for i in 0..half {
                    let cos = T::of(f64::from(cos[i]));
                    let sin = T::of(f64::from(if back { -sin[i] } else { sin[i] }));
                    y_low[i] = x_low[i] * cos - x_high[i] * sin;
                    y_high[i] = x_high[i] * cos + x_low[i] * sin;
                }
            }
        });
        y
    }
}

impl<T: Real> CustomOp1 for Rope<T> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.run(slice::<T>(x, layout)?, layout.dims()[1], self.back);
        Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = self.run(&values::<T>(dy)?, x.dim(1)?, !self.back);
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
