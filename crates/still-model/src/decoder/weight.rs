//! A frozen matrix, in the form that its file had.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use still_compute::Real;
use still_compute::matmul::{Mat, par_matmul, par_matmul_new, par_small_batch};
use still_compute::rows::dot_tiles;
use still_quant::{Format, FragmentFormat, LANES, PackedMatrix, PreparedRows, SMALL_BATCH};

use super::ops::with_values;
use super::quantized::QuantizedMatrix;

/// A frozen matrix `[out, in]`.
#[derive(Clone, Debug)]
pub enum Weight {
    /// f32 (or f64, where gradients are checked); on other devices than the CPU also bf16.
    Dense(Tensor),
    /// 16-bit or block-quantized, widened to f32 as it is used; on the CPU.
    Packed(PackedMatrix),
    /// Block-quantized on a GPU.
    Quantized(QuantizedMatrix),
}

/// One of a decoder's weights: a matrix, or a norm or bias.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Part<'a> {
    Matrix(&'a Weight),
    Vector(&'a Tensor),
}

impl<'a> From<&'a Weight> for Part<'a> {
    fn from(weight: &'a Weight) -> Self {
        Self::Matrix(weight)
    }
}

impl<'a> From<&'a Tensor> for Part<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Vector(tensor)
    }
}

impl Part<'_> {
    /// Its shape.
    ///
    /// # Errors
    /// A matrix that is none.
    pub fn dims(self) -> Result<Vec<usize>> {
        match self {
            Self::Matrix(weight) => weight.dims2().map(|(rows, columns)| vec![rows, columns]),
            Self::Vector(tensor) => Ok(tensor.dims().to_vec()),
        }
    }

    /// Bytes that it takes.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::Matrix(weight) => weight.size_bytes(),
            Self::Vector(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
        }
    }

    /// All values where they are, widened if they are packed.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn to_tensor(self) -> Result<Tensor> {
        match self {
            Self::Matrix(weight) => weight.to_tensor(),
            Self::Vector(tensor) => Ok(tensor.clone()),
        }
    }
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(tensor)
    }
}

impl Weight {
    /// `(out, in)`.
    ///
    /// # Errors
    /// A tensor that is no matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(tensor) => tensor.dims2(),
            Self::Packed(matrix) => Ok((matrix.rows(), matrix.columns())),
            Self::Quantized(matrix) => Ok(matrix.dims2()),
        }
    }

    /// All values as a tensor of the dtype of activations, for a product: of a quantized matrix they are made here.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Quantized(matrix) => matrix.dequantize(0..matrix.dims2().0, matrix.dtype()),
            _ => self.to_tensor(),
        }
    }

    /// [`Weight::dense`] of some rows.
    ///
    /// # Errors
    /// No such rows; a packed matrix.
    pub(crate) fn dense_rows(&self, rows: Range<usize>) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => tensor.narrow(0, rows.start, rows.len()),
            Self::Quantized(matrix) => matrix.dequantize(rows, matrix.dtype()),
            Self::Packed(_) => candle_core::bail!("a packed matrix has products on the CPU alone"),
        }
    }

    /// The name of what its values are stored in: a dtype, or a block format of GGUF.
    pub fn format_name(&self) -> &'static str {
        match self {
            Self::Dense(tensor) => tensor.dtype().as_str(),
            Self::Quantized(matrix) => matrix.format().name(),
            Self::Packed(matrix) => match FragmentFormat::of(matrix.format()) {
                Some(format) => format.name(),
                None if matrix.format() == Format::F16 => "f16",
                None => "bf16",
            },
        }
    }

    /// Where it lives.
    pub fn device(&self) -> &Device {
        match self {
            Self::Dense(tensor) => tensor.device(),
            Self::Packed(_) => &Device::Cpu,
            Self::Quantized(matrix) => matrix.device(),
        }
    }

    /// Bytes that it takes.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Packed(matrix) => matrix.size_bytes(),
            Self::Quantized(matrix) => matrix.size_bytes(),
        }
    }

    /// All values, widened to f32 if they are packed or quantized.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn to_tensor(&self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Packed(matrix) => {
                let mut values = Vec::new();
                matrix.dequantize_into(0..matrix.rows(), &mut values);
                Tensor::from_vec(values, (matrix.rows(), matrix.columns()), &Device::Cpu)
            }
            Self::Quantized(matrix) => matrix.dequantize(0..matrix.dims2().0, DType::F32),
        }
    }

    /// The rows `ids` (u32, one axis), in that order, each below the number of rows.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn select(&self, ids: &Tensor) -> Result<Tensor> {
        let matrix = match self {
            Self::Dense(tensor) => return tensor.index_select(ids, 0),
            Self::Quantized(matrix) => return matrix.select(ids),
            Self::Packed(matrix) => matrix,
        };
        let ids = ids.to_vec1::<u32>()?;
        let mut values = Vec::with_capacity(ids.len() * matrix.columns());
        let mut row = Vec::new();
        for &id in &ids {
            matrix.dequantize_into(id as usize..id as usize + 1, &mut row);
            values.extend_from_slice(&row);
        }
        Tensor::from_vec(values, (ids.len(), matrix.columns()), &Device::Cpu)
    }

    /// Row `row` into `out` `[in]`, in f32; `scratch` is memory that a packed row is unpacked in.
    ///
    /// # Errors
    /// A tensor of another dtype or device.
    ///
    /// # Panics
    /// If there is no such row.
    pub(crate) fn row_into(
        &self,
        row: usize,
        scratch: &mut Vec<f32>,
        out: &mut [f32],
    ) -> Result<()> {
        match self {
            Self::Packed(matrix) => matrix.dequantize_row(row, scratch, out),
            Self::Dense(tensor) => with_values(tensor, |values: &[f32]| {
                out.copy_from_slice(&values[row * out.len()..(row + 1) * out.len()]);
            })?,
            Self::Quantized(_) => return Err(not_on_the_cpu()),
        }
        Ok(())
    }

    /// `y = x Wᵀ` for rows `rows` of the matrix: `x` `[n, in]`, `y` `[n, rows]`, on the CPU.
    ///
    /// # Errors
    /// A packed matrix for another type than f32; a tensor of another dtype or device.
    pub fn multiply_into<T: Real>(&self, rows: Range<usize>, x: &[T], y: &mut [T]) -> Result<()> {
        match self {
            Self::Packed(matrix) => match (T::as_f32s(x), T::as_f32s_mut(y)) {
                (Some(x), Some(y)) => {
                    matrix.multiply(rows, x, y);
                    Ok(())
                }
                _ => candle_core::bail!("a packed matrix multiplies f32, not {:?}", T::DTYPE),
            },
            Self::Dense(tensor) => with_values(tensor, |w| {
                let inner = tensor.dims()[1];
                let w = &w[rows.start * inner..rows.end * inner];
                if x.len() <= SMALL_BATCH * inner {
                    par_small_batch(w, inner, x, y);
                } else {
                    let (n, out) = (x.len() / inner, rows.len());
                    let (x, w) = (Mat::rows(x, inner), Mat::rows(w, inner).t());
                    par_matmul((n, out, inner), y, out, false, x, w);
                }
            }),
            Self::Quantized(_) => Err(not_on_the_cpu()),
        }
    }

    /// Tiles of 16 rows, the last perhaps of fewer.
    ///
    /// # Errors
    /// A tensor that is no matrix.
    pub(crate) fn tiles(&self) -> Result<usize> {
        Ok(self.dims2()?.0.div_ceil(LANES))
    }

    /// [`PackedMatrix::prepare`]; nothing for a dense matrix.
    pub(crate) fn prepare(&self, x: &[f32], rows: &mut PreparedRows) {
        if let Self::Packed(matrix) = self {
            matrix.prepare(x, rows);
        }
    }

    /// [`PackedMatrix::prepares_like`]; dense matrices need nothing.
    pub(crate) fn prepares_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Packed(matrix), Self::Packed(other)) => matrix.prepares_like(other),
            (Self::Packed(_), _) | (_, Self::Packed(_)) => false,
            _ => true,
        }
    }

    /// [`PackedMatrix::multiply_tiles`], for a dense matrix too.
    ///
    /// # Errors
    /// A tensor of another dtype or device.
    pub(crate) fn multiply_tiles(
        &self,
        tiles: Range<usize>,
        x: &[f32],
        rows: &PreparedRows,
        y: &mut [f32],
    ) -> Result<()> {
        let tensor = match self {
            Self::Packed(matrix) => {
                matrix.multiply_tiles(tiles, x, rows, y);
                return Ok(());
            }
            Self::Dense(tensor) => tensor,
            Self::Quantized(_) => return Err(not_on_the_cpu()),
        };
        let (out, inner) = tensor.dims2()?;
        with_values(tensor, |w: &[f32]| {
            let rows = tiles.start * LANES..out.min(tiles.end * LANES);
            dot_tiles(&w[rows.start * inner..rows.end * inner], x, inner, y);
        })
    }

    /// `x Wᵀ` in a new vector: `x` `[n, in]`, the result `[n, out]`.
    ///
    /// # Errors
    /// As [`Weight::multiply_into`].
    pub(super) fn multiply<T: Real>(&self, x: &[T]) -> Result<Vec<T>> {
        let (out, inner) = self.dims2()?;
        let n = x.len() / inner;
        if let (Self::Packed(matrix), Some(x)) = (self, T::as_f32s(x)) {
            return Ok(T::from_f32s(matrix.multiply_new(0..out, x)));
        }
        if let (Self::Dense(tensor), true) = (self, n > SMALL_BATCH) {
            return with_values(tensor, |w| {
                par_matmul_new((n, out, inner), Mat::rows(x, inner), Mat::rows(w, inner).t())
            });
        }
        let mut y = vec![T::zero(); n * out];
        self.multiply_into(0..out, x, &mut y)?;
        Ok(y)
    }

    /// Calls `body` with all values, `[out, in]`.
    ///
    /// # Errors
    /// A tensor of another dtype or device.
    pub(super) fn with_values<T: Real, R>(&self, body: impl FnOnce(&[T]) -> R) -> Result<R> {
        match self {
            Self::Dense(tensor) => with_values(tensor, body),
            Self::Packed(matrix) => {
                let mut values = Vec::new();
                matrix.dequantize_into(0..matrix.rows(), &mut values);
                Ok(body(&T::from_f32s(values)))
            }
            Self::Quantized(_) => Err(not_on_the_cpu()),
        }
    }
}

fn not_on_the_cpu() -> candle_core::Error {
    candle_core::Error::Msg("a matrix that is quantized on a GPU has no products on the CPU".into())
}
