//! Times products of a few rows with matrices of Llama-3.1-8B's shapes on a GPU, by the format they are stored in:
//! `cargo run --release --features still-cli/cuda -p still-model --example time_quantized`.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use still_compute::cuda::CapturedGraph;
use still_model::decoder::ops::frozen_linear;
use still_model::{QuantizedMatrix, Weight, device};
use still_quant::FragmentFormat;

const SHAPES: [(&str, usize, usize); 4] = [
    ("o", 4096, 4096),
    ("down", 4096, 14_336),
    ("gate", 14_336, 4096),
    ("vocabulary", 128_256, 4096),
];

/// Bytes of matrices that are gone through in turn: more than the second-level cache has.
const BYTES: usize = 1 << 29;

/// Microseconds of one product with each of several matrices.
fn time(device: &Device, weights: &[Weight], x: &Tensor) -> Result<f64> {
    let mut graph = CapturedGraph::capture(device.as_cuda_device()?, || {
        weights.iter().try_for_each(|weight| frozen_linear(x, weight, None).map(drop))
    })?;
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        device.synchronize()?;
        let started = Instant::now();
        graph.launch()?;
        device.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best * 1e6 / weights.len() as f64)
}

fn main() -> Result<()> {
    let device = device("cuda").map_err(candle_core::Error::wrap)?;
    println!("| matrix | rows of x | bf16 µs | GB/s | q8_0 µs | GB/s | fp8 µs | GB/s |");
    println!("|---|---|---|---|---|---|---|---|");
    for (name, out, inner) in SHAPES {
        let count = BYTES.div_ceil(2 * out * inner).max(2);
        let dense = (0..count)
            .map(|_| Tensor::randn(0.0_f32, 0.02, (out, inner), &device)?.to_dtype(DType::BF16))
            .collect::<Result<Vec<_>>>()?;
        let quantized = |format| -> Result<Vec<Weight>> {
            let of = |values| QuantizedMatrix::quantize(values, format, DType::BF16);
            dense.iter().map(|values| Ok(Weight::Quantized(of(values)?))).collect()
        };
        let kinds = [
            dense.iter().map(|values| Weight::Dense(values.clone())).collect(),
            quantized(FragmentFormat::Q8_0)?,
            quantized(FragmentFormat::E4m3)?,
        ];
        for rows in [1, 2, 4, 8] {
            let x = Tensor::randn(0.0_f32, 1.0, (rows, inner), &device)?.to_dtype(DType::BF16)?;
            print!("| {name} | {rows} |");
            for weights in &kinds {
                let us = time(&device, weights, &x)?;
                print!(" {us:.1} | {:.0} |", weights[0].size_bytes() as f64 / us / 1e3);
            }
            println!();
        }
    }
    Ok(())
}
