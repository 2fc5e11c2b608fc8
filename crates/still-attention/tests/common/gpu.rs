//! The GPU of tests that need one.

use candle_core::Device;

#[allow(unused_imports, reason = "each test binary uses a part")]
pub use super::device::{Report, gradients, placed, poison, round, run, sequence};

/// The GPU; a test that asks for one and finds none has failed.
pub fn gpu() -> Device {
    Device::new_cuda(0).unwrap_or_else(|error| panic!("these tests need a CUDA GPU: {error}"))
}
