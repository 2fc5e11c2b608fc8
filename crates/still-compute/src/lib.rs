#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

#[cfg(feature = "cuda")]
pub mod cuda;
mod gradients;
pub mod matmul;
mod pull_back;
pub mod random;
mod real;
pub mod tensor;
pub mod threads;
pub mod vector;

pub use gradients::{Gradients, Run, Spans};
pub use pull_back::pull_back;
pub use real::Real;
