//! Products with matrices stored in 16 bits or in GGUF's block formats, without ever widening the whole matrix.
//!
//! On loading, the file's bits are put in another order, 16 rows side by side, and nothing is rounded. A few rows of
//! activations at a time (decoding) are multiplied with codes as they leave that form in registers; many rows (prefill)
//! with stretches of the matrix widened into scratch and a f32 matrix product. Both use the same widened values and f32
//! activations, so that decoding and prefill differ by rounding alone. Vector code is chosen at run time
//! ([`still_compute::vector::vectorize`]).

mod block;
mod format;
mod matrix;
mod product;
mod tile;

pub use format::Format;
pub use matrix::{PackError, PackedMatrix};
pub use product::FEW;
pub use tile::LANES;
