//! Products of matrices that can be added to what is there: the tensor library's cannot.

use std::ffi::c_void;

use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::op::BackpropOp;
use candle_core::{DType, Error, Result, Storage, Tensor, bail};
use still_attention::launch::{Launch, on_cuda};

/// `scale · x y`, on top of `onto`, which it replaces: `x` `[m, k]` and `y` `[k, n]` of one dtype, f32 or bf16, each a matrix or
/// the transposed view of one; the result `[m, n]` is of `dtype`. Sums are f32. No graph.
pub(crate) fn product(
    x: &Tensor,
    y: &Tensor,
    scale: f64,
    onto: Option<Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    let ((m, k), (inner, n)) = (x.dims2()?, y.dims2()?);
    let onto_fits = onto.as_ref().is_none_or(|onto| onto.dims() == [m, n] && onto.dtype() == dtype);
    if k != inner || x.dtype() != y.dtype() || !onto_fits {
        bail!("product: {:?} {:?} and {:?} {:?}", x.dims(), x.dtype(), y.dims(), y.dtype())
    }
    let (x, y) = (Operand::new(x)?, Operand::new(y)?);
    let device = x.tensor.device().as_cuda_device()?.clone();
    let beta = if onto.is_some() { 1.0_f32 } else { 0.0 };
    let result = match onto {
        Some(onto) => onto.contiguous()?,
        None => {
            // SAFETY: the product fills it.
            let storage = unsafe { device.alloc_uninit(&(m, n).into(), dtype)? };
            Tensor::from_storage(Storage::Cuda(storage), (m, n), BackpropOp::none(), false)
        }
    };
    let stream = device.cuda_stream();
    let int = |size: usize| i32::try_from(size).map_err(Error::wrap);
    let alpha = scale as f32;
    {
        let tensors = [&x.tensor, &y.tensor, &result];
        let held = tensors.map(Tensor::storage_and_layout);
        let mut launch = Launch::new(&stream)?;
        let mut at = |n: usize| launch.values::<c_void>(on_cuda(&held[n].0)?, held[n].1);
        let (x_at, y_at, result_at) = (at(0)?.cast_const(), at(1)?.cast_const(), at(2)?);
        let [x_kind, y_kind, result_kind] = tensors.map(|tensor| data_type(tensor.dtype()));
        let (x_kind, y_kind, result_kind) = (x_kind?, y_kind?, result_kind?);
        let blas = device.cublas_handle();
        // By columns, as cuBLAS reads: resultᵀ [n, m] = yᵀ xᵀ.
        // SAFETY: the matrices lie as their leading dimensions say and live until the stream has passed; nothing else of this one
        // stream's reads the result meanwhile.
        unsafe {
            gemm_ex(
                *blas.handle(),
                y.operation,
                x.operation,
                int(n)?,
                int(m)?,
                int(k)?,
                (&raw const alpha).cast(),
                y_at,
                y_kind,
                int(y.leading)?,
                x_at,
                x_kind,
                int(x.leading)?,
                (&raw const beta).cast(),
                result_at,
                result_kind,
                int(n)?,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
            .map_err(Error::wrap)?;
        }
    }
    Ok(result)
}

/// A factor, as cuBLAS is told of it.
struct Operand {
    tensor: Tensor,
    operation: sys::cublasOperation_t,
    leading: usize,
}

impl Operand {
    fn new(tensor: &Tensor) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        let plain = |tensor: Tensor, leading| Self {
            tensor,
            operation: sys::cublasOperation_t::CUBLAS_OP_N,
            leading,
        };
        let tensor = tensor.detach();
        Ok(match *tensor.stride() {
            [row, 1] if row >= columns => plain(tensor, row),
            [1, column] if column >= rows => {
                Self { tensor, operation: sys::cublasOperation_t::CUBLAS_OP_T, leading: column }
            }
            _ => plain(tensor.force_contiguous()?, columns),
        })
    }
}

/// A dtype as cuBLAS names it.
fn data_type(dtype: DType) -> Result<sys::cudaDataType_t> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
        other => bail!("product: expected f32 or bf16, got {other:?}"),
    }
}
