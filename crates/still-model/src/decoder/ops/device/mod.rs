//! The ops on devices other than the CPU, made of the tensor library's own ops.
//!
//! On CUDA some are kernels of our own. The others run on the CPU too, where tests hold them against the fused forms; nothing
//! here waits for the device.
//!
//! | file | content |
//! |---|---|
//! | `linear` | frozen and low-rank products |
//! | `gated`, `activation` | the gated half of an MLP, and its activation |
//! | `norm` | RMSNorm and its gradient |
//! | `heads` | rows to heads, and rotation |
//! | `composed` | a result of other ops with a gradient of its own |
//! | `kernels` | the decoder's CUDA kernels as functions of tensors |
//! | `tests` | comparisons with the CPU's fused forms |

pub(in crate::decoder) mod activation;
mod composed;
mod gated;
mod heads;
#[cfg(feature = "cuda")]
mod kernels;
mod linear;
pub(in crate::decoder) mod norm;
#[cfg(test)]
mod tests;

pub(super) use gated::gated;
pub(in crate::decoder) use heads::rotate;
pub(super) use heads::split_heads;
pub(in crate::decoder) use linear::rows;
pub(super) use linear::{frozen_linear, low_rank_linear, wide_linear};
pub(super) use norm::rms_norm;
