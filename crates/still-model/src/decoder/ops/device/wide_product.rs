//! A product of bf16 matrices that is not rounded to bf16: candle's is.

use candle_core::backend::BackendStorage;
use candle_core::cuda::CudaStorageSlice;
use candle_core::cuda::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::cuda::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp2, Error, Layout, Result, Shape, Tensor, bail,
};

/// `x` `[rows, E]` times `weight` `[out, E]` transposed: bf16 on CUDA to f32, `[rows, out]`. No gradient.
///
/// # Errors
/// Shapes that do not fit, another dtype or device.
pub(super) fn wide_product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.detach().contiguous()?.apply_op2_no_bwd(&weight.detach().contiguous()?, &WideProduct)
}

struct WideProduct;

impl CustomOp2 for WideProduct {
    fn name(&self) -> &'static str {
        "wide_product"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("wide_product: no CPU kernel")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (rows, inner) = x_layout.shape().dims2()?;
        let (out, width) = weight_layout.shape().dims2()?;
        let (CudaStorageSlice::BF16(x_values), CudaStorageSlice::BF16(weight_values)) =
            (&x.slice, &weight.slice)
        else {
            bail!("wide_product: expected bf16, got {:?} and {:?}", x.dtype(), weight.dtype())
        };
        let (Some((x_start, x_end)), Some((weight_start, weight_end))) =
            (x_layout.contiguous_offsets(), weight_layout.contiguous_offsets())
        else {
            bail!("wide_product: expected contiguous matrices")
        };
        if width != inner {
            bail!("wide_product: {:?} and {:?}", x_layout.shape(), weight_layout.shape())
        }
        let int = |size: usize| i32::try_from(size).map_err(Error::wrap);
        let (m, n, k) = (int(out)?, int(rows)?, int(inner)?);
        let device: &CudaDevice = x.device();
        // SAFETY: the product below fills it.
        let mut y = unsafe { device.alloc::<f32>(rows * out)? };
        let stream = device.cuda_stream();
        let (x_values, weight_values) =
            (x_values.slice(x_start..x_end), weight_values.slice(weight_start..weight_end));
        {
            let (x_at, _x_used) = x_values.device_ptr(&stream);
            let (weight_at, _weight_used) = weight_values.device_ptr(&stream);
            let (y_at, _y_used) = y.device_ptr_mut(&stream);
            let (one, zero) = (1.0_f32, 0.0_f32);
            let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
            let f32 = sys::cudaDataType_t::CUDA_R_32F;
            let blas = device.cublas_handle();
            // By columns, as cuBLAS reads them: yᵀ [out, rows] = (weightᵀ)ᵀ xᵀ.
            // SAFETY: the matrices are contiguous, as large as m, n and k say, and live until the stream has passed.
            unsafe {
                gemm_ex(
                    *blas.handle(),
                    sys::cublasOperation_t::CUBLAS_OP_T,
                    sys::cublasOperation_t::CUBLAS_OP_N,
                    m,
                    n,
                    k,
                    (&raw const one).cast(),
                    weight_at as *const _,
                    bf16,
                    k,
                    x_at as *const _,
                    bf16,
                    k,
                    (&raw const zero).cast(),
                    y_at as *mut _,
                    f32,
                    m,
                    sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
                )
                .map_err(Error::wrap)?;
            }
        }
        let storage = CudaStorage { slice: CudaStorageSlice::F32(y), device: device.clone() };
        Ok((storage, Shape::from((rows, out))))
    }
}
