//! CUDA kernels of STILL's hybrid attention: routing, feature maps, prefix states, forward and backward pass, decode step.
//!
//! `src/cuda/still.h` is the interface and says what every pointer is; [`ffi`] is the same in Rust. The kernels are compiled
//! with the feature `cuda` alone. `tests/check.py` compares them with a float64 twin on a machine without Rust.

/// Tokens of a chunk: the kernels know no other length.
pub const CHUNK: usize = 64;

#[cfg(feature = "cuda")]
pub mod ffi;

/// What a launcher returned, if not success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaError(
    /// The `cudaError_t`.
    pub i32,
);

impl std::fmt::Display for CudaError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            1 => f.write_str("no kernel for this shape, dtype or GPU (head_dim is 64, 96 or 128; f32 at 128 needs 225 KiB of shared memory)"),
            209 => f.write_str("the kernels were not compiled for this GPU (sm_80 or newer)"),
            code => write!(f, "CUDA error {code}"),
        }
    }
}

impl std::error::Error for CudaError {}

/// A launcher's code as a result.
pub fn check(code: i32) -> Result<(), CudaError> {
    if code == 0 { Ok(()) } else { Err(CudaError(code)) }
}
