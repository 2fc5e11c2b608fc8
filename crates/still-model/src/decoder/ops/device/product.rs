use candle_core::{DType, Result, Tensor};

/// `scale · x y` of matrices, on top of `onto` if that is given, in `dtype`; `onto` must be nobody else's. Sums are f32.
pub(in crate::decoder) fn product(
    x: &Tensor,
    y: &Tensor,
    scale: f64,
    onto: Option<Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let options = still_compute::cuda::Gemm { alpha: scale, accumulate: onto, dtype };
        return still_compute::cuda::gemm(x, y, options);
    }
    let product = (x.contiguous()?.matmul(&y.contiguous()?)?.to_dtype(dtype)? * scale)?;
    match onto {
        Some(onto) => product + onto,
        None => Ok(product),
    }
}
