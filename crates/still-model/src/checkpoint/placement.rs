//! Which form matrices take on a device.

use std::fmt;
use std::str::FromStr;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device};
use still_quant::{Format, FragmentFormat, Fragments, PackedMatrix};

use super::Weights;
use crate::decoder::{QuantizedMatrix, Weight};
use crate::error::{ModelError, Result};

/// How a model's matrices are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// As their file has them, where the device has products with that; otherwise in the dtype of activations.
    #[default]
    File,
    /// In the dtype of activations.
    Dense,
    /// Quantized to GGUF's Q8_0: 8 bits, a scale for each 32 values.
    Q8_0,
    /// Quantized to floats of 8 bits (e4m3), a scale for each row; on CUDA.
    Fp8,
}

impl WeightFormat {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::File, Self::Dense, Self::Q8_0, Self::Fp8];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Dense => "dense",
            Self::Q8_0 => "q8_0",
            Self::Fp8 => "fp8",
        }
    }

    /// A matrix in this form on a device where activations are of `dtype`.
    pub(super) fn place(
        self,
        weights: &Weights,
        name: &str,
        shape: [usize; 2],
        device: &Device,
        dtype: DType,
    ) -> Result<Weight> {
        if device.is_cpu() {
            return self.place_on_cpu(weights, name, shape);
        }
        // Packing 16-bit values would only be undone.
        let packed = match self {
            Self::File | Self::Q8_0 if weights.is_in_blocks(name) => {
                Some(weights.matrix(name, shape)?)
            }
            _ => None,
        };
        let fragments = match &packed {
            Some(Weight::Packed(matrix)) => match (self, matrix.format()) {
                (Self::File, _) | (Self::Q8_0, Format::Q8_0) => Fragments::of(matrix),
                _ => None,
            },
            _ => None,
        };
        if let Some(fragments) = fragments {
            return Ok(Weight::Quantized(QuantizedMatrix::new(fragments, device, dtype)?));
        }
        let format = match self {
            Self::File | Self::Dense => {
                return Ok(Weight::Dense(weights.get(name, &shape, dtype, device)?));
            }
            Self::Q8_0 => FragmentFormat::Q8_0,
            Self::Fp8 => FragmentFormat::E4m3,
        };
        let values = weights.get(name, &shape, DType::F32, device)?;
        Ok(Weight::Quantized(QuantizedMatrix::quantize(&values, format, dtype)?))
    }

    fn place_on_cpu(self, weights: &Weights, name: &str, shape: [usize; 2]) -> Result<Weight> {
        let dense = || weights.get(name, &shape, DType::F32, &Device::Cpu);
        match self {
            Self::File => weights.matrix(name, shape),
            Self::Dense => Ok(Weight::Dense(dense()?)),
            Self::Q8_0 if weights.is_in_blocks(name) => match weights.matrix(name, shape)? {
                Weight::Packed(matrix) if matrix.format() == Format::Q8_0 => {
                    Ok(Weight::Packed(matrix))
                }
                _ => q8_0_on_cpu(&dense()?),
            },
            Self::Q8_0 => q8_0_on_cpu(&dense()?),
            Self::Fp8 => Err(ModelError::Unsupported {
                what: "weights in fp8 on the CPU".into(),
                found_in: None,
                hint: "use q8_0, which has as many bits, or --device cuda".into(),
            }),
        }
    }
}

/// Rows that are no whole blocks stay as they are.
fn q8_0_on_cpu(values: &candle_core::Tensor) -> Result<Weight> {
    let (rows, columns) = values.dims2()?;
    if !columns.is_multiple_of(Format::Q8_0.block_values()) {
        return Ok(Weight::Dense(values.clone()));
    }
    let quantized = QTensor::quantize(values, GgmlDType::Q8_0)?;
    let packed = PackedMatrix::new(Format::Q8_0, rows, columns, &quantized.data()?)
        .map_err(candle_core::Error::wrap)?;
    Ok(Weight::Packed(packed))
}

impl FromStr for WeightFormat {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            ModelError::NotFound {
                what: format!("no form of weights is called {name:?}"),
                hint: format!("use one of {}", Self::ALL.map(Self::name).join(", ")),
            }
        })
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
