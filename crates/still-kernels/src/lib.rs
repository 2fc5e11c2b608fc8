//! CUDA kernels of the STILL hybrid attention operator, and the functions that queue them.
//!
//! Without the feature `cuda` the crate is empty and needs no CUDA. The kernels are `src/cuda/*.cu`, their C interfaces are
//! `src/cuda/still.h` and, for what a decoder does beside attention, `src/cuda/decoder.h`, which say what every function reads
//! and writes.

#[cfg(feature = "cuda")]
pub mod decoder;
#[cfg(feature = "cuda")]
mod error;
#[cfg(feature = "cuda")]
mod ffi;

#[cfg(feature = "cuda")]
pub use error::{KernelError, check};
#[cfg(feature = "cuda")]
pub use ffi::*;
