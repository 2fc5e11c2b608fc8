//! A matrix whose device multiplies by its codes.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, bail};
use still_quant::{FragmentFormat, Fragments};

/// A frozen matrix `[out, in]` in a block format, laid out for a GPU's tensor cores; cheap to clone.
///
/// Products of a few rows read the codes. For those of more rows, values are written out just before, in the dtype of activations.
#[derive(Clone, Debug)]
pub struct QuantizedMatrix {
    format: FragmentFormat,
    rows: usize,
    columns: usize,
    /// u32, one axis.
    words: Tensor,
    dtype: DType,
}

impl QuantizedMatrix {
    /// Copies a matrix to a device; activations there are of `dtype`, f32 or bf16.
    ///
    /// # Errors
    /// Too little memory there.
    pub fn new(fragments: Fragments, device: &Device, dtype: DType) -> Result<Self> {
        let (format, rows, columns) = (fragments.format(), fragments.rows(), fragments.columns());
        let words = fragments.into_words();
        let count = words.len();
        let matrix =
            Self { format, rows, columns, words: Tensor::from_vec(words, count, device)?, dtype };
        matrix.check()?;
        Ok(matrix)
    }

    /// Quantizes `values` `[out, in]` (f32 or bf16) where they are, to [`FragmentFormat::Q8_0`] or [`FragmentFormat::E4m3`].
    ///
    /// # Errors
    /// Another format; values that are not on CUDA.
    pub fn quantize(values: &Tensor, format: FragmentFormat, dtype: DType) -> Result<Self> {
        let (rows, columns) = values.dims2()?;
        let words = quantize(values, format)?;
        let matrix = Self { format, rows, columns, words, dtype };
        matrix.check()?;
        Ok(matrix)
    }

    /// An error unless the kernels count as many words as there are.
    fn check(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        {
            let (rows, columns) = (self.rows as i32, self.columns as i32);
            // SAFETY: counts, and touches no memory.
            let words = unsafe {
                still_kernels::decoder::still_quantized_words(code(self.format), rows, columns)
            };
            if words != self.words.elem_count() as i64 {
                bail!("{self:?} has {} words, its kernels expect {words}", self.words.elem_count())
            }
        }
        Ok(())
    }

    /// The format.
    pub fn format(&self) -> FragmentFormat {
        self.format
    }

    /// `(out, in)`.
    pub fn dims2(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Where it lives.
    pub fn device(&self) -> &Device {
        self.words.device()
    }

    /// Dtype of the activations that it is multiplied with.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes on the device.
    pub fn size_bytes(&self) -> usize {
        self.words.elem_count() * size_of::<u32>()
    }

    /// The codes, as kernels take them.
    #[cfg(feature = "cuda")]
    pub(crate) fn words(&self) -> &Tensor {
        &self.words
    }

    /// The matrix as the kernels name its format.
    #[cfg(feature = "cuda")]
    pub(crate) fn code(&self) -> i32 {
        code(self.format)
    }

    /// A copy on the host.
    ///
    /// # Errors
    /// An error of the device.
    pub fn to_host(&self) -> Result<Fragments> {
        let words = self.words.to_vec1()?;
        Fragments::from_words(self.format, self.rows, self.columns, words)
            .map_err(candle_core::Error::wrap)
    }

    /// The values of some rows in `dtype`, f32 or bf16.
    ///
    /// # Errors
    /// No such rows; another dtype or device.
    pub fn dequantize(&self, rows: Range<usize>, dtype: DType) -> Result<Tensor> {
        if rows.end > self.rows || rows.is_empty() {
            bail!("rows {rows:?} of {self:?}")
        }
        let (first, count) = (rows.start, rows.len());
        self.values(first, count, None, dtype)
    }

    /// The rows `ids` (u32, one axis), in that order, each below the number of rows.
    ///
    /// # Errors
    /// Another device.
    pub fn select(&self, ids: &Tensor) -> Result<Tensor> {
        self.values(0, ids.dims1()?, Some(ids), self.dtype)
    }
}

#[cfg(not(feature = "cuda"))]
fn quantize(_: &Tensor, format: FragmentFormat) -> Result<Tensor> {
    bail!("{} needs a GPU to be made", format.name())
}

#[cfg(not(feature = "cuda"))]
impl QuantizedMatrix {
    fn values(&self, _: usize, _: usize, _: Option<&Tensor>, _: DType) -> Result<Tensor> {
        bail!("{self:?} has kernels on CUDA alone")
    }

    /// `x Wᵀ`, `[rows, out]` of `dtype`, by the codes; `None` where `x` has more rows than a kernel takes.
    pub(crate) fn product(&self, _: &Tensor, _: DType) -> Result<Option<Tensor>> {
        bail!("{self:?} has kernels on CUDA alone")
    }
}

#[cfg(feature = "cuda")]
use on_cuda::{code, quantize};

#[cfg(feature = "cuda")]
mod on_cuda {
    use std::ptr::{null, null_mut};

    use still_compute::cuda::{kind, queue, queue_any};
    use still_kernels::decoder::{
        self as kernels, Dequantize, Factor, SmallBatchProducts, still_dequantize, still_quantize,
        still_small_batch_products,
    };

    use super::{DType, FragmentFormat, QuantizedMatrix, Result, Tensor, bail};

    /// A format as the kernels name it.
    pub(super) fn code(format: FragmentFormat) -> i32 {
        match format {
            FragmentFormat::Q8_0 => kernels::Q8_0,
            FragmentFormat::Q4_0 => kernels::Q4_0,
            FragmentFormat::Q4_1 => kernels::Q4_1,
            FragmentFormat::Q4K => kernels::Q4_K,
            FragmentFormat::Q6K => kernels::Q6_K,
            FragmentFormat::E4m3 => kernels::E4M3,
        }
    }

    /// The words of a matrix `[rows, columns]`.
    pub(super) fn quantize(values: &Tensor, format: FragmentFormat) -> Result<Tensor> {
        let (rows, columns) = values.dims2()?;
        let values = values.detach().contiguous()?;
        let kind = kind(values.dtype())?;
        let outputs = [(format.words(rows, columns).into(), DType::U32)];
        let (rows, columns) = (rows as i32, columns as i32);
        let [words] = queue("still_quantize", [&values], outputs, |[from], [to], stream| {
            // SAFETY: the values are contiguous, the words as many as the format has.
            unsafe { still_quantize(code(format), kind, rows, columns, from, to, stream) }
        })?;
        Ok(words)
    }

    impl QuantizedMatrix {
        /// Rows from `first` on, or those that `ids` names.
        pub(super) fn values(
            &self,
            first: usize,
            count: usize,
            ids: Option<&Tensor>,
            dtype: DType,
        ) -> Result<Tensor> {
            let mut args = Dequantize {
                format: code(self.format),
                dtype: kind(dtype)?,
                rows: self.rows as i32,
                columns: self.columns as i32,
                first: first as i32,
                count: count as i32,
                matrix: null(),
                ids: null(),
                to: null_mut(),
            };
            let ids = match ids {
                Some(ids) if ids.dtype() != DType::U32 => bail!("ids are {:?}", ids.dtype()),
                ids => ids.map(|ids| ids.detach().contiguous()).transpose()?,
            };
            let inputs: Vec<&Tensor> = std::iter::once(&self.words).chain(ids.as_ref()).collect();
            let outputs = vec![((count, self.columns).into(), dtype)];
            let mut made = queue_any("still_dequantize", &inputs, outputs, |from, to, stream| {
                args.matrix = from[0];
                args.ids = from.get(1).map_or(null(), |ids| ids.cast_const().cast());
                args.to = to[0];
                // SAFETY: the words are as many as the format has, rows and ids inside, and what is made as large.
                unsafe { still_dequantize(&raw const args, stream) }
            })?;
            Ok(made.remove(0))
        }

        /// Rows that a product by the codes takes.
        pub(crate) fn most_rows(dtype: DType) -> usize {
            match dtype {
                // Two planes of bf16 each.
                DType::F32 => kernels::QUANTIZED_ROWS / 2,
                _ => kernels::QUANTIZED_ROWS,
            }
        }

        /// `x Wᵀ`, `[rows, out]` of `dtype`, by the codes; `None` where `x` `[rows, in]` has more rows than a kernel takes.
        pub(crate) fn product(&self, x: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
            let (rows, inner) = x.dims2()?;
            if inner != self.columns || x.dtype() != self.dtype {
                bail!("{self:?} times {:?} {:?}", x.dims(), x.dtype())
            }
            if rows > Self::most_rows(x.dtype()) || !inner.is_multiple_of(8) {
                return Ok(None);
            }
            let (x, out) = (x.detach().contiguous()?, self.rows);
            let mut args = SmallBatchProducts {
                dtype: kind(x.dtype())?,
                weight_dtype: kind(x.dtype())?,
                to_dtype: kind(dtype)?,
                rows: rows as i32,
                inner: inner as i32,
                count: 1,
                gated: 0,
                eps: 0.0,
                x: null(),
                norm: null(),
            };
            let outputs = [((rows, out).into(), dtype)];
            let call = "still_small_batch_products";
            let [y] = queue(call, [&x, &self.words], outputs, |[x, weight], [to], stream| {
                args.x = x;
                let factor = Factor {
                    out: out as i32,
                    rank: 0,
                    format: code(self.format),
                    update_scale: 0.0,
                    weight,
                    bias: null(),
                    add: null(),
                    update: null(),
                    low: null(),
                    to,
                };
                // SAFETY: every tensor is contiguous and as large as decoder.h says.
                unsafe { still_small_batch_products(&raw const args, &raw const factor, stream) }
            })?;
            Ok(Some(y))
        }
    }
}
