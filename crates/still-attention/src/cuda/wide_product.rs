//! A product of bf16 matrices that is not rounded to bf16: candle's is.

use candle_core::backend::BackendStorage;
use candle_core::cuda::CudaStorageSlice;
use candle_core::cuda::cudarc::cublas::{result::gemm_strided_batched_ex, sys};
use candle_core::cuda::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp2, Error, Layout, Result, Shape, Tensor, bail,
};

/// `x` `[N, rows, width]` times `y` `[N, out, width]` transposed: bf16 on CUDA to f32, `[N, rows, out]`. The matrices of `y` need not
/// be adjacent. No gradient.
///
/// # Errors
/// Shapes that do not fit, another dtype or device.
pub fn wide_product(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (_, _, width) = y.dims3()?;
    let adjacent = |stride: &[usize]| stride[2] == 1 && stride[1] == width;
    let y = if adjacent(y.stride()) { y.detach() } else { y.detach().force_contiguous()? };
    x.detach().contiguous()?.apply_op2_no_bwd(&y, &WideProduct)
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
        y: &CudaStorage,
        y_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (batch, rows, inner) = x_layout.shape().dims3()?;
        let (others, out, width) = y_layout.shape().dims3()?;
        let (CudaStorageSlice::BF16(x_values), CudaStorageSlice::BF16(y_values)) =
            (&x.slice, &y.slice)
        else {
            bail!("wide_product: expected bf16, got {:?} and {:?}", x.dtype(), y.dtype())
        };
        if (width, others) != (inner, batch) {
            bail!("wide_product: {:?} and {:?}", x_layout.shape(), y_layout.shape())
        }
        let int = |size: usize| i32::try_from(size).map_err(Error::wrap);
        let (m, n, k) = (int(out)?, int(rows)?, int(inner)?);
        let device: &CudaDevice = x.device();
        // SAFETY: the product below fills it.
        let mut product = unsafe { device.alloc::<f32>(batch * rows * out)? };
        let stream = device.cuda_stream();
        let x_values = x_values.slice(x_layout.start_offset()..);
        let y_values = y_values.slice(y_layout.start_offset()..);
        {
            let (x_at, _x_used) = x_values.device_ptr(&stream);
            let (y_at, _y_used) = y_values.device_ptr(&stream);
            let (product_at, _product_used) = product.device_ptr_mut(&stream);
            let (one, zero) = (1.0_f32, 0.0_f32);
            let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
            let blas = device.cublas_handle();
            // By columns, as cuBLAS reads them: productᵀ [out, rows] = (yᵀ)ᵀ xᵀ.
            // SAFETY: rows are adjacent in every matrix, which lie as far apart as the strides say and live until the stream
            // has passed.
            unsafe {
                gemm_strided_batched_ex(
                    *blas.handle(),
                    sys::cublasOperation_t::CUBLAS_OP_T,
                    sys::cublasOperation_t::CUBLAS_OP_N,
                    m,
                    n,
                    k,
                    (&raw const one).cast(),
                    y_at as *const _,
                    bf16,
                    k,
                    y_layout.stride()[0] as i64,
                    x_at as *const _,
                    bf16,
                    k,
                    (rows * inner) as i64,
                    (&raw const zero).cast(),
                    product_at as *mut _,
                    sys::cudaDataType_t::CUDA_R_32F,
                    m,
                    (rows * out) as i64,
                    int(batch)?,
                    sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
                )
                .map_err(Error::wrap)?;
            }
        }
        let storage = CudaStorage { slice: CudaStorageSlice::F32(product), device: device.clone() };
        Ok((storage, Shape::from((batch, rows, out))))
    }
}
