#![doc = include_str!("../README.md")]
//!
//! # Files
//!
//! | file | content |
//! |---|---|
//! | `real` | the float types of CPU kernels |
//! | `vector` | elementwise loops, compiled for several instruction sets and chosen at run time |
//! | `rows` | loops of a decoder layer and of sampling |
//! | `losses` | losses of rows, their gradients, the softmax of a row |
//! | `matmul` | matrix products over strided views; `Tiles`, of many f32 rows on a CPU with AMX |
//! | `amx` | whether a CPU's matrix unit is there |
//! | `uninit` | vectors whose memory is not zeroed before it is written |
//! | `pages` | values that are read again and again, in large pages |
//! | `threads` | phases of work that all threads go through together |
//! | `random` | seeded random numbers |
//! | `tensor` | a tensor's values as a slice |
//! | `gradients` | gradients of learned tensors in one vector |
//! | `pull_back` | the start of a backward pass from a known gradient |
//! | `cuda` | launches, cuBLAS, captured graphs |
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod amx;
#[cfg(feature = "cuda")]
pub mod cuda;
mod gradients;
pub mod losses;
pub mod matmul;
pub mod pages;
mod pull_back;
pub mod random;
mod real;
pub mod rows;
pub mod tensor;
pub mod threads;
mod uninit;
pub mod vector;

pub use gradients::{Gradients, Run, Spans};
pub use pull_back::pull_back;
pub use real::Real;
pub use uninit::new_vec;
