//! CUDA: launches of our kernels, matrix products by cuBLAS, captured graphs, copies between host and device.

mod gemm;
mod graph;
mod host;
mod launch;

pub use gemm::{Gemm, gemm};
pub use graph::{CapturedGraph, can_capture, no_capture};
pub use host::{PinnedCopy, overwrite};
pub use launch::{Launch, kind, on_cuda, queue, queue_any};
