//! The ops on devices other than the CPU, made of the tensor library's own ops.
//!
//! On CUDA some are kernels of our own. The others run on the CPU too, where tests hold them against the fused forms; nothing
//! here waits for the device.
//!
//! | file | content |
//! |---|---|
//! | `activation` | the activation of an MLP's gated half |
//! | `norm` | RMSNorm and its gradient |
//! | `heads` | rows to heads, and rotation |
//! | `kernels` | the decoder's CUDA kernels as functions of tensors |
//! | `tests` | comparisons with the CPU's fused forms |

pub(in crate::decoder) mod activation;
mod heads;
#[cfg(feature = "cuda")]
pub(super) mod kernels;
pub(in crate::decoder) mod norm;
#[cfg(test)]
mod tests;

pub(in crate::decoder) use heads::rotate;
pub(super) use heads::split_heads;
#[cfg(feature = "cuda")]
pub(in crate::decoder) use kernels::rope_angles;
pub(super) use norm::rms_norm;
