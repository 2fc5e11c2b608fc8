//! Every format against the tensor library's own reading of it, and products against f64 sums.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use still_quant::{Format, Fused, Gated, LowRank, PackError, PackedMatrix};

const FORMATS: [(Format, GgmlDType); 7] = [
    (Format::Bf16, GgmlDType::BF16),
    (Format::F16, GgmlDType::F16),
    (Format::Q4_0, GgmlDType::Q4_0),
    (Format::Q4_1, GgmlDType::Q4_1),
    (Format::Q8_0, GgmlDType::Q8_0),
    (Format::Q4K, GgmlDType::Q4K),
    (Format::Q6K, GgmlDType::Q6K),
];

/// Repeatable values in −1 … 1.
fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) as f32 * 0.618_034).sin()).collect()
}

/// A matrix quantized by the tensor library, and what it reads back.
fn matrix(
    format: Format,
    dtype: GgmlDType,
    rows: usize,
    columns: usize,
) -> (PackedMatrix, Vec<f32>) {
    let dense = Tensor::from_vec(values(rows * columns, 1), (rows, columns), &Device::Cpu).unwrap();
    let stored = QTensor::quantize(&dense, dtype).unwrap();
    let bytes = stored.data().unwrap().into_owned();
    let expected = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap();
    let matrix = PackedMatrix::new(format, rows, columns, &bytes).unwrap();
    (matrix, expected.to_vec1().unwrap())
}

#[test]
fn widened_values_are_the_tensor_librarys() {
    for (format, dtype) in FORMATS {
        let (matrix, expected) = matrix(format, dtype, 70, 512);
        let mut got = Vec::new();
        matrix.dequantize_into(0..70, &mut got);
        for (i, (a, b)) in got.iter().zip(&expected).enumerate() {
            assert!((a - b).abs() <= 1e-6 * (1.0 + b.abs()), "{format:?} value {i}: {a} and {b}");
        }
        matrix.dequantize_into(33..35, &mut got);
        assert_eq!(got.len(), 2 * 512);
        assert!((got[0] - expected[33 * 512]).abs() <= 1e-6);
    }
}

#[test]
fn products_of_small_and_large_batches_are_sums_of_widened_values() {
    for (format, dtype) in FORMATS {
        let (matrix, wide) = matrix(format, dtype, 70, 512);
        for n in [1, 2, 3, 4, 5, 6, 7, 8, 9, 40, 64, 71] {
            let x = values(n * 512, 2);
            for rows in [0..70, 5..38] {
                let mut y = vec![f32::NAN; n * rows.len()];
                matrix.multiply(rows.clone(), &x, &mut y);
                assert_eq!(matrix.multiply_new(rows.clone(), &x), y);
                for i in 0..n {
                    for (column, row) in rows.clone().enumerate() {
                        let w = &wide[row * 512..(row + 1) * 512];
                        let x = &x[i * 512..(i + 1) * 512];
                        let terms = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
                        let (sum, size) =
                            terms.fold((0.0, 0.0_f64), |(sum, size), t| (sum + t, size + t.abs()));
                        let got = f64::from(y[i * rows.len() + column]);
                        assert!(
                            (got - sum).abs() <= 1e-6 * size.max(1.0),
                            "{format:?}, {n} rows, {i} × {row}: {got} instead of {sum}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let new = |columns, bytes: usize| {
        PackedMatrix::new(Format::Q4_0, 2, columns, &vec![0; bytes]).unwrap_err()
    };
    assert!(matches!(new(48, 54), PackError::Columns { block: 32, .. }));
    assert_eq!(new(64, 71), PackError::Bytes { got: 71, expected: 72 });
}

/// However many chunks of a prompt are read at a time.
#[test]
fn whole_chunks_have_the_same_products_alone_and_together() {
    for (format, dtype) in FORMATS {
        let (matrix, _) = matrix(format, dtype, 80, 768);
        let x = values(192 * 768, 3);
        let products = |x: &[f32]| {
            let mut y = vec![f32::NAN; x.len() / 768 * 80];
            matrix.multiply(0..80, x, &mut y);
            y
        };
        let together = products(&x);
        let parts = x.chunks(128 * 768).flat_map(products).collect::<Vec<_>>();
        assert_eq!(together, parts, "{format:?}");
    }
}

/// What is computed along with products is what the steps one after the other come to.
#[test]
fn what_is_fused_with_products_is_what_follows_them() {
    let (n, rows, columns, rank, scale) = (67, 70, 512, 9, 0.7);
    let activate = |gate: &mut [f32], up: &[f32]| {
        gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = gate.abs() - 3.0 * up);
    };
    let (a, b) = (values(rank * columns, 6), values(rows * rank, 7));
    let (x, onto) = (values(n * columns, 4), values(n * rows, 5));
    for (format, dtype) in FORMATS {
        let (matrix, wide) = matrix(format, dtype, rows, columns);
        let up: Vec<u8> = values(format.row_bytes(columns) * rows, 8)
            .iter()
            .map(|x| (40.0 + 8.0 * x) as u8)
            .collect();
        let up = PackedMatrix::new(format, rows, columns, &up).unwrap();
        let products = matrix.multiply_new(0..rows, &x);

        let fused = Fused { onto: Some(&onto), ..Fused::default() };
        let Some(sums) = matrix.multiply_fused(&x, fused) else {
            println!("{format:?}: this CPU multiplies codes, however many rows there are");
            assert!(matrix.multiply_fused(&x, Fused::default()).is_none());
            continue;
        };
        let expected: Vec<f32> = products.iter().zip(&onto).map(|(y, onto)| y + onto).collect();
        assert_eq!(sums, expected, "{format:?}");

        let gated = Some(Gated { up: &up, activate: &activate });
        let fused = Fused { gated, onto: Some(&onto), ..Fused::default() };
        let mut expected = products;
        activate(&mut expected, &up.multiply_new(0..rows, &x));
        expected.iter_mut().zip(&onto).for_each(|(y, onto)| *y += onto);
        assert_eq!(matrix.multiply_fused(&x, fused).unwrap(), expected, "{format:?}");

        let update = Some(LowRank { a: &a, b: &b, scale });
        let got = matrix.multiply_fused(&x, Fused { update, ..Fused::default() }).unwrap();
        for (i, x) in x.chunks_exact(columns).enumerate() {
            for row in 0..rows {
                let value = |column: usize| {
                    let update = |r: usize| {
                        f64::from(b[row * rank + r]) * f64::from(a[r * columns + column])
                    };
                    let update: f64 = (0..rank).map(update).sum();
                    f64::from(wide[row * columns + column]) + f64::from(scale) * update
                };
                let terms = x.iter().enumerate().map(|(c, &x)| value(c) * f64::from(x));
                let (sum, size) =
                    terms.fold((0.0, 0.0_f64), |(sum, size), t| (sum + t, size + t.abs()));
                let got = f64::from(got[i * rows + row]);
                let close = (got - sum).abs() <= 1e-6 * size.max(1.0);
                assert!(close, "{format:?}, {i} × {row}: {got} instead of {sum}");
            }
        }
        assert!(matrix.multiply_fused(&x[..63 * columns], Fused::default()).is_none());
    }
}
