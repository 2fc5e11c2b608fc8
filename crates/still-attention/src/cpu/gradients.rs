//! Where the gradients of one selection head go.

use still_compute::Real;

/// Which gradients are wanted besides those of the feature maps, the gate, `ℓ` and `w`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Of q, k and v: not in attention transfer.
    pub qkv: bool,
}

/// Where the row gradients of one selection head go.
pub(crate) struct RowGrads<'a, T> {
    /// `[query heads, N, D]`, zeros at first; empty if not wanted.
    pub q: &'a mut [T],
    /// `[query heads, N, D]`, zeros at first; empty without a gate.
    pub gate: &'a mut [T],
    /// `[N, D]`: added to, as selection heads may share a KV head; empty if not wanted.
    pub k: &'a mut [T],
    /// As `k`.
    pub v: &'a mut [T],
}

/// Gradients of what one selection head learns.
#[derive(Debug)]
pub(crate) struct WeightGrads<T> {
    /// `∂/∂W_q`, `[query heads, D, F]`.
    pub map_q: Vec<T>,
    /// `∂/∂W_k`, `[D, F]`.
    pub map_k: Vec<T>,
    /// `∂/∂ ln(scale of the linear branch)`, by query head.
    pub log_scale: Vec<T>,
}

/// A slice in `count` equal parts; of an empty one as many empty ones.
pub(super) fn parts<T>(mut values: &mut [T], count: usize) -> Vec<&mut [T]> {
    let size = values.len() / count.max(1);
    (0..count).filter_map(|_| values.split_off_mut(..size)).collect()
}

/// Adds a slice to one of its length.
pub(super) fn add<T: Real>(to: &mut [T], from: &[T]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to += from;
    }
}
