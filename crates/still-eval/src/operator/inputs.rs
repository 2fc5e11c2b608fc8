//! Random arguments of the operator.

use candle_core::{DType, Device, Shape, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use still_attention::{HeadGeometry, HybridWeights};
use still_model::Result;

/// Values of mean 0 and a standard deviation, uniform: the device's own numbers on a GPU, seeded there too.
pub(super) fn random(
    shape: impl Into<Shape>,
    deviation: f32,
    seed: u64,
    device: &Device,
    dtype: DType,
) -> Result<Tensor> {
    let shape = shape.into();
    let reach = deviation * 3_f32.sqrt();
    let values = if device.is_cpu() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values = (0..shape.elem_count()).map(|_| reach * (2.0 * rng.random::<f32>() - 1.0));
        Tensor::from_vec(values.collect::<Vec<f32>>(), shape, device)?
    } else {
        device.set_seed(seed)?;
        Tensor::rand(-reach, reach, shape, device)?
    };
    Ok(values.to_dtype(dtype)?)
}

/// Q `[B, H, N, D]`, K and V `[B, K, N, D]` with channels of unit variance, as norms before the projections leave them: logits
/// have unit variance too.
pub(super) fn rows(
    geometry: HeadGeometry,
    batch: usize,
    tokens: usize,
    device: &Device,
    dtype: DType,
) -> Result<[Tensor; 3]> {
    let HeadGeometry { num_heads, num_key_value_heads, head_dim } = geometry;
    let of = |heads, seed| random((batch, heads, tokens, head_dim), 1.0, seed, device, dtype);
    Ok([of(num_heads, 11)?, of(num_key_value_heads, 12)?, of(num_key_value_heads, 13)?])
}

/// Maps that keep a row's size, `ℓ = ln 8` as students start with; f32.
pub(super) fn weights(geometry: HeadGeometry, device: &Device) -> Result<HybridWeights> {
    let HeadGeometry { num_heads, num_key_value_heads, head_dim: d } = geometry;
    let map = |heads, seed| random((heads, d, d), (d as f32).powf(-0.5), seed, device, DType::F32);
    Ok(HybridWeights {
        feature_map_q: map(num_heads, 14)?,
        feature_map_k: map(num_key_value_heads, 15)?,
        householder_q: None,
        householder_k: None,
        log_lambda: Some(Tensor::full(8_f32.ln(), num_heads, device)?),
        window_factor: None,
    })
}
