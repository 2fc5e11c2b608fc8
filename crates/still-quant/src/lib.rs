#![doc = include_str!("../README.md")]
//!
//! # Files
//!
//! | file | content |
//! |---|---|
//! | `format` | the formats, by name and size |
//! | `block` | how each spells its values in a file and in a tile |
//! | `tile` | sixteen rows side by side, the layout in memory |
//! | `matrix` | a matrix in one of the formats |
//! | `fragments` | the layout of a matrix for a GPU's tensor cores |
//! | `product` | products: which of the ways that follow |
//! | `integer` | products on the codes in whole numbers, where the CPU multiplies bytes |
//! | `batch` | products on the codes in f32, of a batch of rows |
//! | `many` | f32 products of widened values, of many rows |
//! | `fused` | what is computed along with those |
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod batch;
mod block;
mod format;
mod fragments;
mod fused;
mod integer;
mod many;
mod matrix;
mod product;
mod tile;

pub use format::Format;
pub use fragments::{FragmentFormat, Fragments};
pub use fused::{Fused, Gated, LowRank};
pub use matrix::{PackError, PackedMatrix, PreparedRows};
pub use product::SMALL_BATCH;
pub use tile::LANES;
