//! Rotary position embedding, half rotation (Hugging Face's layout).

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;
use still_compute::rows::Angles;

use crate::decoder::RopeBase;

/// Angles from which on threads share them, and a GPU makes its own: it would wait for those of a prompt.
pub(in crate::decoder) const SHARED: usize = 1 << 14;

fn each(angles: &[f64], f: impl Fn(f64) -> f64 + Sync) -> Vec<f32> {
    match angles.len() < SHARED {
        true => angles.iter().map(|&angle| f(angle) as f32).collect(),
        false => angles.par_iter().with_min_len(SHARED / 8).map(|&angle| f(angle) as f32).collect(),
    }
}

/// Cosines and sines of a run of positions, one run for the whole batch or one per sequence. Channels of a head beyond those
/// that it is for stay as they are.
///
/// They are on the host, and copied to a device that asks, or made on a device and not on the host.
#[derive(Clone, Debug, Default)]
pub struct Rotation {
    /// `[runs, tokens, rotary_dim / 2]`
    cos: Arc<Vec<f32>>,
    /// `[runs, tokens, rotary_dim / 2]`
    sin: Arc<Vec<f32>>,
    runs: usize,
    tokens: usize,
    half: usize,
    head_dim: usize,
    /// Both as tensors, once a device has asked for them.
    tensors: Arc<OnceLock<(Tensor, Tensor)>>,
    /// By the base of layers with a sliding window, where a model has one.
    local: Option<Box<Self>>,
}

impl Rotation {
    /// From angles `[runs, tokens, rotary_dim / 2]` in radians.
    ///
    /// # Errors
    /// If the angles do not divide into so many rows.
    pub fn from_angles(angles: &[f64], runs: usize, tokens: usize) -> Result<Self> {
        let head_dim = 2 * angles.len() / (runs * tokens).max(1);
        Self::partial(angles, (runs, tokens), head_dim, 1.0)
    }

    /// [`Rotation::from_angles`] of the first channels of heads of `head_dim`, which are multiplied by `scale`.
    pub(crate) fn partial(
        angles: &[f64],
        (runs, tokens): (usize, usize),
        head_dim: usize,
        scale: f64,
    ) -> Result<Self> {
        let rows = runs * tokens;
        if rows == 0 || !angles.len().is_multiple_of(rows) {
            candle_core::bail!("rope: {} angles do not make {rows} rows", angles.len())
        }
        Ok(Self {
            cos: Arc::new(each(angles, |angle| scale * angle.cos())),
            sin: Arc::new(each(angles, |angle| scale * angle.sin())),
            runs,
            tokens,
            half: angles.len() / rows,
            head_dim,
            tensors: Arc::default(),
            local: None,
        })
    }

    /// Of cosines and sines `[runs · tokens, rotary_dim / 2]`, f32, on a device, which uses them alone.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(
        [cos, sin]: [Tensor; 2],
        (runs, tokens): (usize, usize),
        head_dim: usize,
    ) -> Result<Self> {
        let half = cos.dim(1)?;
        let shaped = |angles: Tensor| match runs {
            1 => Ok(angles),
            runs => angles.reshape((runs, tokens, half)),
        };
        let tensors = Arc::new(OnceLock::from((shaped(cos)?, shaped(sin)?)));
        Ok(Self { runs, tokens, half, head_dim, tensors, ..Self::default() })
    }

    /// With the rotation of the same positions by another base, for layers with a sliding window.
    pub(crate) fn with_local(self, local: Option<Self>) -> Self {
        Self { local: local.map(Box::new), ..self }
    }

    /// The rotation by a base.
    ///
    /// # Errors
    /// If it is for a model without such layers.
    pub(crate) fn of(&self, base: RopeBase) -> Result<&Self> {
        match (base, &self.local) {
            (RopeBase::Global, _) => Ok(self),
            (RopeBase::Local, Some(local)) => Ok(local),
            (RopeBase::Local, None) => {
                candle_core::bail!(
                    "rope: a rotation of full attention for a layer with a sliding window"
                )
            }
        }
    }

    /// The rotation of layers with a sliding window, whose positions are set too.
    pub(crate) fn local_mut(&mut self) -> &mut Self {
        self.local.get_or_insert_default()
    }

    /// Replaces the angles by those of one token at each of `positions`, one run a sequence; `frequencies` are in radians per position, `[D/2]`.
    pub(crate) fn set_positions(
        &mut self,
        positions: impl Iterator<Item = usize>,
        frequencies: &[f64],
        (head_dim, scale): (usize, f64),
    ) {
        let (cos, sin) = (Arc::make_mut(&mut self.cos), Arc::make_mut(&mut self.sin));
        cos.clear();
        sin.clear();
        for position in positions {
            let angles = frequencies.iter().map(|frequency| position as f64 * frequency);
            cos.extend(angles.clone().map(|angle| (scale * angle.cos()) as f32));
            sin.extend(angles.map(|angle| (scale * angle.sin()) as f32));
        }
        (self.tokens, self.half, self.head_dim) = (1, frequencies.len(), head_dim);
        self.runs = self.cos.len() / self.half.max(1);
        self.tensors = Arc::default();
    }

    /// Cosines and sines on the host, `[runs, tokens, rotary_dim / 2]`.
    #[cfg(feature = "cuda")]
    pub(crate) fn values(&self) -> [&[f32]; 2] {
        [&self.cos, &self.sin]
    }

    /// Cosines and sines, `[tokens, D/2]` or `[runs, tokens, rotary_dim / 2]`; copied to the device once, if it always is the same.
    pub(crate) fn tensors(&self, device: &Device, dtype: DType) -> Result<(Tensor, Tensor)> {
        let make = |values: &[f32]| {
            let tensor = match self.runs {
                1 => Tensor::from_slice(values, (self.tokens, self.half), device)?,
                runs => Tensor::from_slice(values, (runs, self.tokens, self.half), device)?,
            };
            tensor.to_dtype(dtype)
        };
        if let Some((cos, sin)) = self.tensors.get()
            && cos.device().same_device(device)
            && cos.dtype() == dtype
        {
            return Ok((cos.clone(), sin.clone()));
        }
        let both = match self.tensors.get() {
            // They were made on a device.
            Some((cos, sin)) if self.cos.is_empty() => {
                let there = |angles: &Tensor| angles.to_device(device)?.to_dtype(dtype);
                (there(cos)?, there(sin)?)
            }
            _ => (make(&self.cos)?, make(&self.sin)?),
        };
        // Another device or dtype than the first one's is not kept.
        let _ = self.tensors.set(both.clone());
        Ok(both)
    }

    /// As the CPU's loops read them.
    pub(crate) fn angles(&self) -> Angles<'_> {
        let Self { cos, sin, runs, tokens, half, .. } = self;
        Angles { cos, sin, runs: *runs, tokens: *tokens, half: *half }
    }

    /// Whether it is for `batch` sequences of `tokens` tokens with heads of `head_dim` channels.
    pub(super) fn fits(&self, batch: usize, tokens: usize, head_dim: usize) -> bool {
        let runs = self.runs;
        tokens == self.tokens && head_dim == self.head_dim && (runs == 1 || runs == batch)
    }

    /// Channels of a head that are rotated, from the first on.
    pub(crate) fn rotary_dim(&self) -> usize {
        2 * self.half
    }
}
