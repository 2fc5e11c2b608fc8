#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod block;
mod format;
mod matrix;
mod product;
mod tile;

pub use format::Format;
pub use matrix::{PackError, PackedMatrix};
pub use product::SMALL_BATCH;
pub use tile::LANES;
