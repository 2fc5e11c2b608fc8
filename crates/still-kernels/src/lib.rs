#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

#[cfg(feature = "cuda")]
pub mod decoder;
#[cfg(feature = "cuda")]
pub mod dense;
#[cfg(feature = "cuda")]
mod error;
#[cfg(feature = "cuda")]
mod ffi;

#[cfg(feature = "cuda")]
pub use error::{KernelError, check};
#[cfg(feature = "cuda")]
pub use ffi::*;
