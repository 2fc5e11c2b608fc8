//! What a device reaches at most, measured: the share of it that a kernel reaches says more than its time.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use still_model::{ModelError, Result};

use super::inputs::random;
use crate::timing::{Times, time};

/// Repetitions of each measurement.
const REPETITIONS: usize = 10;

/// Values that a thread copies at once.
const PART: usize = 1 << 16;

/// Two ceilings of a device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Rows and columns of the square matrices that were multiplied.
    pub product_size: usize,
    /// 10¹² operations a second in a product of matrices of the compute dtype by the tensor library.
    pub product_tflop_per_s: f64,
    /// Bytes that were copied.
    pub copied_bytes: usize,
    /// 10⁹ bytes a second in a copy from memory to memory, read and written ones counted.
    pub copy_gb_per_s: f64,
}

/// Measures both: products of 8,192² matrices and copies of 1 GiB on a GPU, 1,024² and 256 MiB on the CPU.
pub(super) fn ceilings(device: &Device, dtype: DType) -> Result<Ceilings> {
    let (product_size, copied_bytes) =
        if device.is_cpu() { (1024, 1 << 28) } else { (8192, 1 << 30) };
    let side = (product_size, product_size);
    let (a, b) = (random(side, 1.0, 1, device, dtype)?, random(side, 1.0, 2, device, dtype)?);
    let product = time::<ModelError>(device, REPETITIONS, None, || {
        a.matmul(&b)?;
        Ok(())
    })?;
    let copy = copy(device, copied_bytes)?;
    Ok(Ceilings {
        product_size,
        product_tflop_per_s: 2.0 * (product_size as f64).powi(3) / (1e9 * product.median_ms),
        copied_bytes,
        copy_gb_per_s: 2.0 * copied_bytes as f64 / (1e6 * copy.median_ms),
    })
}

fn copy(device: &Device, bytes: usize) -> Result<Times> {
    let values = bytes / DType::F32.size_in_bytes();
    if !device.is_cpu() {
        let from = Tensor::zeros(values, DType::F32, device)?;
        return time::<ModelError>(device, REPETITIONS, None, || {
            from.copy()?;
            Ok(())
        });
    }
    // With all threads, into memory that is there: the tensor library's copy has one thread and new memory.
    let (from, mut to) = (vec![1.0_f32; values], vec![0.0_f32; values]);
    time::<ModelError>(device, REPETITIONS, None, || {
        let parts = to.par_chunks_mut(PART).zip(from.par_chunks(PART));
        parts.for_each(|(to, from)| to.copy_from_slice(from));
        std::hint::black_box(&mut to);
        Ok(())
    })
}
