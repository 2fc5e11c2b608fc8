//! Values of arguments: enums by their names, and numbers within ranges.

mod names;
mod ranges;

pub use self::names::one_of;
pub use self::ranges::{BATCH, COUNT, TOKENS, WIDTH, bytes, number, seed, share, whole};
