//! CUDA: launches of our kernels, matrix products by cuBLAS, captured graphs, copies between host and device.

mod gemm;
mod graph;
mod host;
mod launch;
mod pass_scratch;
mod step_memory;

pub use gemm::{Gemm, gemm};
pub use graph::{CapturedGraph, can_capture, no_capture};
pub use host::{PinnedCopy, overwrite};
pub use launch::{Launch, kind, on_cuda, queue, queue_any, queue_into};
pub use pass_scratch::PassScratch;
pub use step_memory::{StepMemory, StepTensor};
