//! What every kernel of STILL stands on. Nothing here knows attention, a model or a file.
//!
//! - [`vector`]: elementwise loops, and [`vector::vectorize`], which runs code compiled for the CPU at hand.
//! - [`matmul`]: products of strided matrices.
//! - [`threads`]: work that all threads go through in phases.
//! - [`tensor`]: a tensor's values as a slice; [`pull_back`]: a backward pass from a known gradient.
//! - [`random`]: seeded numbers that are alike on every platform.
//! - `cuda`, with the feature of that name: launches, matrix products by cuBLAS, captured graphs.

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod matmul;
mod pull_back;
pub mod random;
mod real;
pub mod tensor;
pub mod threads;
pub mod vector;

pub use pull_back::pull_back;
pub use real::Real;
