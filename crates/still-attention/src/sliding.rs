//! Causal softmax attention to a window of the last tokens: that of layers which a student keeps as they are.

use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor};
use still_compute::Real;
use still_compute::tensor::{borrow, slice};

use crate::Result;
use crate::arguments::{expect_cpu, expect_shape, whole_sequences};
use crate::config::{check_logit_scale, logit_scale};
use crate::cpu::sliding::{Sizes, backward, forward};

const OP: &str = "sliding_attention";

/// Causal attention of whole sequences to the last `window` tokens, each token's own among them: `q` `[B, H, N, D]`, `k`, `v`
/// `[B, K, N, D]` → `[B, H, N, D]`. Logits are `q·k` times `logit_scale`, `1/√D` if absent. On the CPU, in f32 or f64;
/// differentiable.
///
/// # Errors
/// Shapes that contradict each other; a window of 0; a scale that is no positive number; a dtype or device without a kernel.
pub fn sliding_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    window: usize,
    logit_scale: Option<f64>,
) -> Result<Tensor> {
    let sizes = checked(q, k, v, window, logit_scale)?;
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    #[cfg(feature = "float64")]
    if q.dtype() == DType::F64 {
        return Ok(q.apply_op3(&k, &v, Sliding::<f64> { sizes, dtype: PhantomData })?);
    }
    Ok(q.apply_op3(&k, &v, Sliding::<f32> { sizes, dtype: PhantomData })?)
}

/// Gradients of `q`, `k` and `v` in [`sliding_attention`], for `d_out` `[B, H, N, D]`: without a graph.
///
/// # Errors
/// As [`sliding_attention`].
pub fn sliding_attention_backward(
    [q, k, v]: [&Tensor; 3],
    d_out: &Tensor,
    window: usize,
    logit_scale: Option<f64>,
) -> Result<[Tensor; 3]> {
    let sizes = checked(q, k, v, window, logit_scale)?;
    expect_shape(OP, "d_out", d_out, q.dims())?;
    expect_cpu(OP, "d_out", d_out, q.dtype())?;
    #[cfg(feature = "float64")]
    if q.dtype() == DType::F64 {
        return Ok(gradients::<f64>([q, k, v, d_out], sizes)?);
    }
    Ok(gradients::<f32>([q, k, v, d_out], sizes)?)
}

fn checked(q: &Tensor, k: &Tensor, v: &Tensor, window: usize, given: Option<f64>) -> Result<Sizes> {
    check_logit_scale(given)?;
    let (_, tokens, geometry) = whole_sequences(OP, [q, k, v])?;
    let (heads, num_heads) = (geometry.num_key_value_heads, geometry.num_heads);
    if window == 0 || heads == 0 || !num_heads.is_multiple_of(heads) {
        return Err(crate::AttentionError::Config(format!(
            "attention to a window of {window} tokens, {num_heads} query heads for {heads} key/value heads"
        )));
    }
    let wide = cfg!(feature = "float64") && q.dtype() == DType::F64;
    let dtype = if wide { DType::F64 } else { DType::F32 };
    for (name, tensor) in [("q", q), ("k", k), ("v", v)] {
        expect_cpu(OP, name, tensor, dtype)?;
    }
    Ok(Sizes { geometry, tokens, window, logit_scale: logit_scale(given, geometry.head_dim) })
}

fn gradients<T: Real>(
    [q, k, v, d_out]: [&Tensor; 4],
    sizes: Sizes,
) -> candle_core::Result<[Tensor; 3]> {
    let [dq, dk, dv] = borrow(q, |q| {
        borrow(k, |k| borrow(v, |v| borrow(d_out, |d_out| backward::<T>(q, k, v, d_out, sizes))))
    })????;
    let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
    Ok([tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?])
}

struct Sliding<T> {
    sizes: Sizes,
    dtype: PhantomData<fn() -> T>,
}

impl<T: Real> CustomOp3 for Sliding<T> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (q, k, v) = (slice::<T>(q, q_layout)?, slice(k, k_layout)?, slice(v, v_layout)?);
        let out = forward(q, k, v, self.sizes);
        Ok((T::to_cpu_storage_owned(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _out: &Tensor,
        d_out: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = gradients::<T>([q, k, v, d_out], self.sizes)?;
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}
