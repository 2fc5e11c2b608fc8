//! CUDA: launches of our kernels, matrix products by cuBLAS, captured graphs.

mod gemm;
mod graph;
mod launch;

pub use gemm::{Gemm, gemm};
pub use graph::{CapturedGraph, can_capture, no_capture};
pub use launch::{Launch, kind, on_cuda, queue, queue_any};
