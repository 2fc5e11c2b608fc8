//! What one selection head is fed in one call.

use smallvec::SmallVec;

use super::feature_map::{map_into, map_rows};
use super::rows::Rows;
use crate::config::{Branches, FeatureMap, Mode, Router};
use still_compute::Real;
use still_compute::matmul::Mat;

/// One item per query head of a group: without an allocation for all usual groups.
pub(crate) type PerHead<A> = SmallVec<[A; 8]>;

/// The feature maps of one selection head, reflections folded in.
#[derive(Clone, Debug)]
pub(crate) struct FeatureMaps<'a, T> {
    pub map: FeatureMap,
    /// `W` of `φ_q`, `[D, F]`, by query head.
    pub q: PerHead<&'a [T]>,
    /// `W` of `φ_k`, `[D, F]`.
    pub k: &'a [T],
    pub feature_dim: usize,
}

impl<T: Real> FeatureMaps<'_, T> {
    /// Channels of `φ`.
    pub fn width(&self) -> usize {
        2 * self.feature_dim
    }

    /// `φ_k` of key rows of `head_dim` values.
    pub fn of_keys(&self, k: &[T], head_dim: usize) -> Vec<T> {
        let rows = k.len() / head_dim;
        map_rows(self.map, Mat::rows(k, head_dim), rows, self.k, self.feature_dim)
    }

    /// [`FeatureMaps::of_keys`] into `phi`, `[rows, 2F]`.
    pub fn of_keys_into(&self, k: &[T], head_dim: usize, phi: &mut [T]) {
        map_into(self.map, Mat::rows(k, head_dim), self.k, self.feature_dim, phi);
    }
}

/// What one selection head is fed in one call; its query heads are counted from 0.
#[derive(Clone, Debug)]
pub(crate) struct HeadInput<'a, T> {
    pub chunk: usize,
    pub head_dim: usize,
    pub layer: usize,
    pub mode: Mode,
    /// What `q·k` is multiplied by in logits.
    pub logit_scale: T,
    /// Index of the selection head (for the random router).
    pub head: usize,
    pub router: Router,
    pub branches: Branches,
    pub routing: Routing<'a>,
    pub q: PerHead<Rows<'a, T>>,
    pub k: Rows<'a, T>,
    pub v: Rows<'a, T>,
    pub gate: Option<PerHead<Rows<'a, T>>>,
    pub features: FeatureMaps<'a, T>,
    /// `exp(ℓ)` per query head with `LinearNorm::Mean`, else the linear branch is summed.
    pub lambda: Option<&'a [T]>,
    /// `1 / sigmoid(w)` per query head with a window factor.
    pub against_window: Option<&'a [T]>,
    /// Whether a segment's query heads are run on several threads: worth it where there are few selection heads.
    pub split_heads: bool,
    /// What the salient keys give of a single token, where that is known: see [`super::pieces`].
    pub beforehand: &'a [T],
}

/// Whether so many selection heads are too few to keep every thread busy.
pub(crate) fn should_split_heads(selection_heads: usize) -> bool {
    let threads = rayon::current_num_threads();
    threads > 1 && selection_heads < 4 * threads
}

impl<T: Real> HeadInput<'_, T> {
    /// Scale of the linear branch of query head `head` over a state of `count` tokens.
    ///
    /// A factor on the exact terms is its inverse on the linear ones: numerator and denominator have both, and the
    /// denominator is still at least 1.
    pub fn linear_scale(&self, head: usize, count: usize) -> T {
        let scale =
            self.lambda.map_or(T::one(), |lambda| lambda[head] / T::of(count.max(1) as f64));
        self.against_window.map_or(scale, |inverse| scale * inverse[head])
    }

    /// Whether the scale of the linear branch is learned.
    pub fn learns_scale(&self) -> bool {
        self.lambda.is_some() || self.against_window.is_some()
    }
}

/// How a retiring chunk is split.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Routing<'a> {
    /// By the router's scores.
    Scores { budget: usize, cap: Option<usize> },
    /// As given: `absorbed_at` of every token (see [`crate::Selection`]).
    Given(&'a [u32]),
}
