#![doc = include_str!("../README.md")]

mod block;
mod format;
mod matrix;
mod product;
mod tile;

pub use format::Format;
pub use matrix::{PackError, PackedMatrix};
pub use product::SMALL_BATCH;
pub use tile::LANES;
