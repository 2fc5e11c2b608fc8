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
//! | `product` | products: of up to 64 rows on the codes, of more on upcast values |
//! | `batch` | products on the codes whose rows do not depend on the batch |
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod batch;
mod block;
mod format;
mod fragments;
mod matrix;
mod product;
mod tile;

pub use format::Format;
pub use fragments::{FragmentFormat, Fragments};
pub use matrix::{PackError, PackedMatrix};
pub use product::SMALL_BATCH;
pub use tile::LANES;
