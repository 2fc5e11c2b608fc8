//! Products of matrices by cuBLAS: scaled, added to what is there, in a dtype of their own. The tensor library's are neither.

use std::ffi::c_void;

use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::cublas::result::{gemm_ex, gemm_strided_batched_ex};
use candle_core::cuda::cudarc::cublas::sys;
use candle_core::op::BackpropOp;
use candle_core::{DType, Error, Result, Shape, Storage, Tensor, bail};

use super::launch::{Launch, on_cuda};

/// What a product is multiplied by, what it is added to, and its dtype.
#[derive(Clone, Debug)]
pub struct Gemm {
    /// The factor.
    pub alpha: f64,
    /// Of the product's shape and dtype; its memory becomes the result's, so that it must be nobody else's.
    pub accumulate: Option<Tensor>,
    /// f32 or bf16; sums are f32 either way.
    pub dtype: DType,
}

impl Gemm {
    /// The product as it is, in `dtype`.
    pub fn to(dtype: DType) -> Self {
        Self { alpha: 1.0, accumulate: None, dtype }
    }
}

/// `alpha · x y + accumulate`: `x` `[m, k]` and `y` `[k, n]`, or both with a batch dimension before, of one dtype, f32 or bf16. Each is
/// a matrix or the transposed view of one. No graph.
///
/// # Errors
/// Shapes or dtypes that do not fit; tensors that are not on CUDA.
pub fn gemm(x: &Tensor, y: &Tensor, options: Gemm) -> Result<Tensor> {
    let (x, y) = (Factor::new(x)?, Factor::new(y)?);
    let shape = product_shape(&x, &y, &options)?;
    let Gemm { alpha, accumulate, dtype } = options;
    let beta = if accumulate.is_some() { 1.0 } else { 0.0 };
    let result = match accumulate {
        Some(onto) => onto.contiguous()?,
        None => {
            let device = x.tensor.device().as_cuda_device()?;
            // SAFETY: the product fills it.
            let storage = unsafe { device.alloc_uninit(&shape, dtype)? };
            Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
        }
    };
    queue(&x, &y, [alpha as f32, beta], &result)?;
    Ok(result)
}

/// The shape of the product, if the factors and what it is added to fit.
fn product_shape(x: &Factor, y: &Factor, options: &Gemm) -> Result<Shape> {
    let (batch, m, n) = (x.batch, x.rows, y.columns);
    let shape = match x.tensor.rank() {
        3 => Shape::from((batch, m, n)),
        _ => Shape::from((m, n)),
    };
    let onto = options.accumulate.as_ref();
    let fits = onto.is_none_or(|onto| onto.shape() == &shape && onto.dtype() == options.dtype);
    let (x_dtype, y_dtype) = (x.tensor.dtype(), y.tensor.dtype());
    let same_rank = x.tensor.rank() == y.tensor.rank();
    if x.columns != y.rows || batch != y.batch || !same_rank || x_dtype != y_dtype || !fits {
        bail!("gemm: {:?} {x_dtype:?} and {:?} {y_dtype:?}", x.tensor.dims(), y.tensor.dims())
    }
    Ok(shape)
}

/// Queues `result ← alpha · x y + beta · result`.
fn queue(x: &Factor, y: &Factor, [alpha, beta]: [f32; 2], result: &Tensor) -> Result<()> {
    let device = x.tensor.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let int = |size: usize| i32::try_from(size).map_err(Error::wrap);
    let tensors = [&x.tensor, &y.tensor, result];
    let held = tensors.map(Tensor::storage_and_layout);
    let mut launch = Launch::new(&stream)?;
    let mut at = |n: usize| launch.values::<c_void>(on_cuda(&held[n].0)?, held[n].1);
    let (x_at, y_at, result_at) = (at(0)?.cast_const(), at(1)?.cast_const(), at(2)?);
    let [x_kind, y_kind, result_kind] = tensors.map(|tensor| data_type(tensor.dtype()));
    let (x_kind, y_kind, result_kind) = (x_kind?, y_kind?, result_kind?);
    let blas = device.cublas_handle();
    let (handle, compute) = (*blas.handle(), sys::cublasComputeType_t::CUBLAS_COMPUTE_32F);
    let algorithm = sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP;
    let (alpha, beta) = ((&raw const alpha).cast(), (&raw const beta).cast());
    let [m, n, k] = [int(x.rows)?, int(y.columns)?, int(x.columns)?];
    let (x_leading, y_leading) = (int(x.leading)?, int(y.leading)?);
    // By columns, as cuBLAS reads: resultᵀ [n, m] = yᵀ xᵀ.
    // SAFETY: the matrices lie as their leading dimensions and strides say and live until the stream has passed; nothing else
    // of this one stream's reads the result meanwhile.
    let queued = unsafe {
        if x.tensor.rank() == 3 {
            gemm_strided_batched_ex(
                handle,
                y.operation,
                x.operation,
                n,
                m,
                k,
                alpha,
                y_at,
                y_kind,
                y_leading,
                y.stride as i64,
                x_at,
                x_kind,
                x_leading,
                x.stride as i64,
                beta,
                result_at,
                result_kind,
                n,
                i64::from(m) * i64::from(n),
                int(x.batch)?,
                compute,
                algorithm,
            )
        } else {
            gemm_ex(
                handle,
                y.operation,
                x.operation,
                n,
                m,
                k,
                alpha,
                y_at,
                y_kind,
                y_leading,
                x_at,
                x_kind,
                x_leading,
                beta,
                result_at,
                result_kind,
                n,
                compute,
                algorithm,
            )
        }
    };
    queued.map_err(Error::wrap)
}

/// A factor, as cuBLAS is told of it.
struct Factor {
    tensor: Tensor,
    batch: usize,
    rows: usize,
    columns: usize,
    operation: sys::cublasOperation_t,
    /// Values from one row (or, transposed, column) to the next.
    leading: usize,
    /// Values from one matrix to the next.
    stride: usize,
}

impl Factor {
    fn new(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.detach();
        let (batch, rows, columns) = match *tensor.dims() {
            [rows, columns] => (1, rows, columns),
            [batch, rows, columns] => (batch, rows, columns),
            ref other => bail!("gemm: expected matrices, got {other:?}"),
        };
        let (stride, row, column) = match *tensor.stride() {
            [row, column] => (0, row, column),
            [stride, row, column] => (stride, row, column),
            _ => (0, 0, 0),
        };
        let (plain, transposed) =
            (sys::cublasOperation_t::CUBLAS_OP_N, sys::cublasOperation_t::CUBLAS_OP_T);
        let (tensor, operation, leading, stride) = if column == 1 && row >= columns {
            (tensor, plain, row, stride)
        } else if row == 1 && column >= rows {
            (tensor, transposed, column, stride)
        } else {
            (tensor.force_contiguous()?, plain, columns, rows * columns)
        };
        Ok(Self { tensor, batch, rows, columns, operation, leading, stride })
    }
}

/// A dtype as cuBLAS names it.
fn data_type(dtype: DType) -> Result<sys::cudaDataType_t> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
        other => bail!("gemm: expected f32 or bf16, got {other:?}"),
    }
}
