//! Products with packed matrices of SmolLM2-135M's shapes: one and four rows of activations (decoding), 32 (decoding for
//! many clients), 64 and 256 (prefill).
//!
//! `cargo bench -p still-quant`. Throughput is in values of the matrix (one or four rows), or in multiplications.

use std::hint::black_box;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use still_quant::{Format, PackedMatrix};

fn matrix(format: Format, dtype: GgmlDType, rows: usize, columns: usize) -> PackedMatrix {
    let values: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 0.618).sin()).collect();
    let dense = Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
    let stored = QTensor::quantize(&dense, dtype).unwrap();
    PackedMatrix::new(format, rows, columns, &stored.data().unwrap()).unwrap()
}

fn products(criterion: &mut Criterion) {
    let formats = [
        (Format::Q4_1, GgmlDType::Q4_1),
        (Format::Q4_0, GgmlDType::Q4_0),
        (Format::Q8_0, GgmlDType::Q8_0),
        (Format::Q4K, GgmlDType::Q4K),
        (Format::Q6K, GgmlDType::Q6K),
        (Format::Bf16, GgmlDType::BF16),
        (Format::F16, GgmlDType::F16),
    ];
    for (format, dtype) in formats {
        let mut group = criterion.benchmark_group(format!("{format:?}"));
        group.sample_size(20);
        for (rows, columns) in [(49_152, 512), (1536, 512), (512, 1536)] {
            let matrix = matrix(format, dtype, rows, columns);
            for n in [1, 4, 32, 64, 256] {
                if n > 32 && rows > 10_000 {
                    continue;
                }
                let x: Vec<f32> = (0..n * columns).map(|i| (i as f32 * 0.37).cos()).collect();
                let mut y = vec![0.0; n * rows];
                let values = rows * columns * if n > 8 { n } else { 1 };
                group.throughput(Throughput::Elements(values as u64));
                let id = BenchmarkId::from_parameter(format!("{rows}x{columns} x{n}"));
                group.bench_function(id, |bencher| {
                    bencher.iter(|| matrix.multiply(0..rows, black_box(&x), &mut y));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
