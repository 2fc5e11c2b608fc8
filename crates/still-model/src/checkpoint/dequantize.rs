//! 8-bit weights of safetensors files, widened to f32: each value times the scale of its part of the matrix.

use rayon::prelude::*;

use super::quantization::{Element, Quantization, Strategy};
use super::safetensors_file::Stored;
use crate::error::Result;

/// The value of every byte.
fn values_of(element: Element) -> [f32; 256] {
    std::array::from_fn(|byte| match element {
        Element::E4m3 => e4m3(byte as u8),
        Element::I8 => f32::from(byte as u8 as i8),
    })
}

/// The value of an E4M3 float: bias 7, subnormals at exponent 0, NaN where all of exponent and mantissa are set.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2.0_f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The values of a quantized matrix `[rows, columns]`, row by row.
///
/// # Errors
/// A tensor that is no matrix, scales of another shape than the configuration says or that are no numbers, values that are
/// none.
pub(super) fn dequantize(
    matrix: &Stored<'_>,
    element: Element,
    scales: &Stored<'_>,
    quantization: &Quantization,
) -> Result<Vec<f32>> {
    let (&[rows, columns], false) = (matrix.shape, matrix.bytes.is_empty()) else {
        return Err(matrix.corrupt(format!("is quantized and has shape {:?}", matrix.shape)));
    };
    let fits = |strategy: &&Strategy| strategy.fits([rows, columns], scales.shape);
    let Some(strategy) = quantization.strategies.iter().find(fits) else {
        return Err(scales.corrupt(format!(
            "has shape {:?}, which are not the scales of {:?} ({})",
            scales.shape,
            matrix.shape,
            quantization.strategies.iter().map(|s| s.named()).collect::<Vec<_>>().join(" or ")
        )));
    };
    let [block_rows, block_columns] = strategy.block([rows, columns]);
    let scale = scales.values()?;
    if let Some(wrong) = scale.iter().find(|scale| !(scale.is_finite() && **scale >= 0.0)) {
        return Err(scales.corrupt(format!("has a scale of {wrong}")));
    }
    let values = values_of(element);
    let across = columns.div_ceil(block_columns);
    let mut out = vec![0.0_f32; rows * columns];
    out.par_chunks_mut(columns).zip(matrix.bytes.par_chunks(columns)).enumerate().for_each(
        |(row, (out, bytes))| {
            let scale = &scale[row / block_rows * across..][..across];
            for ((out, bytes), scale) in
                out.chunks_mut(block_columns).zip(bytes.chunks(block_columns)).zip(scale)
            {
                for (out, &byte) in out.iter_mut().zip(bytes) {
                    *out = values[usize::from(byte)] * scale;
                }
            }
        },
    );
    match out.par_iter().any(|x| !x.is_finite()) {
        true => Err(matrix.corrupt("holds values that are no numbers once they are scaled")),
        false => Ok(out),
    }
}

impl Strategy {
    /// Rows and columns that share a scale.
    fn block(self, [rows, columns]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Tensor => [rows, columns],
            Self::Channel => [1, columns],
            Self::Block(block) => block,
        }
    }

    /// Whether scales of this shape are those of a matrix.
    fn fits(self, [rows, columns]: [usize; 2], scales: &[usize]) -> bool {
        match self {
            Self::Tensor => matches!(scales, [] | [1] | [1, 1]),
            Self::Channel => scales == [rows] || scales == [rows, 1],
            Self::Block([r, c]) => scales == [rows.div_ceil(r), columns.div_ceil(c)],
        }
    }

    fn named(self) -> String {
        match self {
            Self::Tensor => "one for the tensor".into(),
            Self::Channel => "one a row".into(),
            Self::Block([rows, columns]) => format!("one for {rows} by {columns} values"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::{DType, Device, Tensor};
    use safetensors::Dtype;

    use super::*;

    #[test]
    fn every_byte_is_what_the_tensor_library_says() {
        let bytes: Vec<u8> = (0..=255).collect();
        let floats = Tensor::from_raw_buffer(&bytes, DType::F8E4M3, &[256], &Device::Cpu).unwrap();
        let floats = floats.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        let (mut numbers, values) = (0, values_of(Element::E4m3));
        for (byte, (got, expected)) in values.iter().zip(&floats).enumerate() {
            if expected.is_nan() {
                assert!(got.is_nan(), "{byte:#x}: {got}");
            } else {
                assert_eq!(got.to_bits(), expected.to_bits(), "{byte:#x}: {got}, {expected}");
                numbers += 1;
            }
        }
        assert_eq!((numbers, values[0x7e], values[1]), (254, 448.0, 2.0_f32.powi(-9)));
        let integers = values_of(Element::I8);
        assert_eq!((integers[0x7f], integers[0x80], integers[0xff]), (127.0, -128.0, -1.0));
    }

    /// A stored tensor of these bytes.
    fn stored<'a>(name: &'a str, dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> Stored<'a> {
        Stored { name, path: Path::new("model.safetensors"), dtype, shape, bytes }
    }

    fn quantization(element: Element, strategy: Strategy) -> Quantization {
        Quantization {
            elements: vec![element],
            strategies: vec![strategy],
            scale_suffixes: &["_scale"],
        }
    }

    #[test]
    fn every_layout_is_the_plain_loops() {
        for (element, dtype) in [(Element::E4m3, Dtype::F8_E4M3), (Element::I8, Dtype::I8)] {
            for ([rows, columns], strategy, shape) in [
                ([5, 7], Strategy::Tensor, vec![]),
                ([5, 7], Strategy::Tensor, vec![1]),
                ([5, 7], Strategy::Channel, vec![5, 1]),
                ([5, 7], Strategy::Channel, vec![5]),
                // Blocks at the far ends are smaller, or all there is.
                ([300, 130], Strategy::Block([128, 128]), vec![3, 2]),
                ([128, 256], Strategy::Block([128, 128]), vec![1, 2]),
                ([64, 65], Strategy::Block([128, 128]), vec![1, 1]),
                ([9, 10], Strategy::Block([2, 3]), vec![5, 4]),
            ] {
                // Every byte but the NaNs.
                let bytes: Vec<u8> = (0..rows * columns)
                    .map(|i| ((i * 37 + i / 251) % 256) as u8)
                    .map(|byte| if byte & 0x7f == 0x7f { 1 } else { byte })
                    .collect();
                let scales: Vec<f32> = (0..shape.iter().product::<usize>().max(1))
                    .map(|i| 0.25 + i as f32 / 16.0)
                    .collect();
                let scale_bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
                let matrix_shape = [rows, columns];
                let matrix = stored("w", dtype, &matrix_shape, &bytes);
                let got = dequantize(
                    &matrix,
                    element,
                    &stored("w_scale", Dtype::F32, &shape, &scale_bytes),
                    &quantization(element, strategy),
                )
                .unwrap();
                for row in 0..rows {
                    for column in 0..columns {
                        let scale = match strategy {
                            Strategy::Tensor => scales[0],
                            Strategy::Channel => scales[row],
                            Strategy::Block([r, c]) => {
                                scales[row / r * columns.div_ceil(c) + column / c]
                            }
                        };
                        let byte = bytes[row * columns + column];
                        let value = match element {
                            Element::E4m3 => e4m3(byte),
                            Element::I8 => f32::from(byte as i8),
                        };
                        assert_eq!(got[row * columns + column], value * scale, "{strategy:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn scales_that_do_not_fit_are_named() {
        let bytes = [1_u8; 35];
        let error = |element, strategy, shape: &[usize], scales: &[f32], bytes: &[u8]| {
            let scale_bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
            dequantize(
                &stored("w", Dtype::F8_E4M3, &[5, 7], bytes),
                element,
                &stored("w_scale", Dtype::F32, shape, &scale_bytes),
                &quantization(element, strategy),
            )
            .unwrap_err()
            .to_string()
        };
        for (strategy, shape, count) in [
            (Strategy::Channel, vec![7, 1], 7),
            (Strategy::Tensor, vec![5, 1], 5),
            (Strategy::Block([2, 2]), vec![2, 3], 6),
        ] {
            let error = error(Element::E4m3, strategy, &shape, &vec![1.0; count], &bytes);
            assert!(error.contains("w_scale has shape") && error.contains("[5, 7]"), "{error}");
        }
        for scale in [f32::NAN, f32::INFINITY, -1.0] {
            let error = error(Element::E4m3, Strategy::Tensor, &[], &[scale], &bytes);
            assert!(error.contains("w_scale has a scale of"), "{error}");
        }
        let error = error(Element::E4m3, Strategy::Tensor, &[], &[1.0], &[0x7f; 35]);
        assert!(error.contains("tensor w holds values"), "{error}");
    }
}
