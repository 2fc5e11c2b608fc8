//! Loops of a decoder layer and of sampling, over rows of values: each compiled here for the widest vectors of the CPU at hand.
//!
//! They are functions of slices here, and not closures where a layer is put together, so that `still-model` can be compiled for
//! size. Names that begin with `par` share their rows out to threads, the others stay on the caller's.
//!
//! | file | content |
//! |---|---|
//! | `sums` | sums, scales, products of a few rows with a matrix |
//! | `norm` | root-mean-square norms and their gradient |
//! | `activation` | the gated activation of an MLP and its gradients |
//! | `heads` | rows to heads and back, and rotation |
//! | `low_rank` | low-rank updates of a few rows |
//! | `choice` | the tokens that a draw is among |

mod activation;
mod choice;
mod heads;
pub mod low_rank;
mod norm;
mod sums;

pub use activation::{
    Activation, GELU_CUBE, GELU_SLOPE, activate, par_activate, par_activate_backward, sigmoid,
};
pub use choice::{Choice, any_nan, likeliest};
pub use heads::{Angles, HeadSizes};
pub use sums::{add_bias, dot_tiles, enter_tiles, scale};

/// Rows of a matrix whose products lie together.
pub const TILE: usize = 16;

/// Rows that one thread takes at a time.
const ROWS_PER_TASK: usize = 16;

/// Values that one thread takes at a time where rows do not matter.
const BLOCK: usize = 16_384;

/// Declares [`Rows`] and implements it: none of its functions is generic, so that each is compiled in this crate.
macro_rules! rows {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? = $body:path;)*) => {
        /// Loops over values of one type: f32, or f64, which checks gradients.
        pub trait Rows: Sized {
            $($(#[$doc])* fn $name($($arg: $type),*) $(-> $out)?;)*
        }

        impl Rows for f32 {
            $(fn $name($($arg: $type),*) $(-> $out)? { $body($($arg),*) })*
        }

        impl Rows for f64 {
            $(fn $name($($arg: $type),*) $(-> $out)? { $body($($arg),*) })*
        }
    };
}

rows! {
    /// `y += x`.
    fn add_row(y: &mut [Self], x: &[Self]) = sums::add;
    /// `y += x`.
    fn par_add(y: &mut [Self], x: &[Self]) = sums::par_add;
    /// `y = x / √(mean(x²) + ε) ⊙ weight`, row by row; a row is as long as the weight.
    fn rms_norm(x: &[Self], weight: &[Self], eps: f64, y: &mut [Self]) = norm::rms_norm;
    /// [`Rows::rms_norm`] in a new vector.
    fn par_rms_norm(x: &[Self], weight: &[Self], eps: f64) -> Vec<Self> = norm::par_rms_norm;
    /// Adds the gradient of [`Rows::rms_norm`] to `dx`.
    fn par_rms_norm_backward(
        x: &[Self], weight: &[Self], eps: f64, dy: &[Self], dx: &mut [Self],
    ) = norm::par_backward;
    /// Rotates the heads `[H, D]` of one token by its cosines and sines, channel `i` with channel `i + cos.len()`, into `y`.
    /// Channels from `2 · cos.len()` on stay as they are.
    fn rotate(x: &[Self], d: usize, angles: [&[f32]; 2], y: &mut [Self]) = heads::rotate;
    /// `[B, N, H·D]` → `[B, H, N, D]`, each head rotated if there are angles.
    fn par_split_heads(x: &[Self], sizes: HeadSizes, angles: Option<Angles<'_>>) -> Vec<Self>
        = heads::par_split;
    /// `[B, H, N, D]` → `[B, N, H·D]`, each head rotated back if there are angles.
    fn par_merge_heads(x: &[Self], sizes: HeadSizes, angles: Option<Angles<'_>>) -> Vec<Self>
        = heads::par_merge;
}
