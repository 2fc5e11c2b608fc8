//! The ops on devices other than the CPU, made of the tensor library's own ops.
//!
//! They run on the CPU too, where tests hold them against the fused forms; nothing here waits for the device.

mod composed;
mod heads;
mod linear;
mod mlp;
mod norm;
#[cfg(test)]
mod tests;

pub(super) use heads::split_heads;
pub(super) use linear::{frozen_linear, low_rank_linear, wide_linear};
pub(super) use mlp::mlp;
pub(super) use norm::rms_norm;
