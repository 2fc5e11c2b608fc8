#![doc = include_str!("../README.md")]

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
