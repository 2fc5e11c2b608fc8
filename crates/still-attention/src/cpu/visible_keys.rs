//! The keys that a segment's queries see, with their values: as they are stored, or upcast.

use std::ops::Range;

use super::key_store::{KeyStore, TILE};
use super::panels::{PanelKeys, Panels, SPAN, pairs_multiply, singles_multiply};
use super::rows::RowStore;
use super::weighted_sum::SMALL_BATCH;
use still_compute::Real;
use still_compute::matmul::{Mat, matmul};

/// Some of the keys that a segment's queries see, with their values.
#[derive(Clone, Debug)]
pub(crate) enum Part<'a, T> {
    /// As they are stored, for a small batch of queries: a product then reads no more than the store has.
    Stored { k: &'a KeyStore<T>, v: &'a RowStore<T>, rows: Range<usize> },
    /// Upcast to the kernel's type, for many: `Kᵀ` `[D, n]` and `V` `[n, D]`.
    Wide { k: &'a [T], v: &'a [T] },
}

impl<'a, T: Real> Part<'a, T> {
    /// `rows` of a pair of stores, upcast into `scratch` if there are many queries.
    pub fn new(
        (k, v): (&'a KeyStore<T>, &'a RowStore<T>),
        rows: Range<usize>,
        queries: usize,
        (wide_k, wide_v): (&'a mut Vec<T>, &'a mut Vec<T>),
    ) -> Self {
        if queries <= SMALL_BATCH {
            Self::Stored { k, v, rows }
        } else {
            Self::Wide { k: k.transposed(rows.clone(), wide_k), v: v.read(rows, wide_v) }
        }
    }

    /// Keys.
    pub fn len(&self, head_dim: usize) -> usize {
        match self {
            Self::Stored { rows, .. } => rows.len(),
            Self::Wide { v, .. } => v.len() / head_dim,
        }
    }

    /// All of it.
    pub fn all(&self, head_dim: usize) -> Range<usize> {
        0..self.len(head_dim)
    }

    /// `q Kᵀ` of `q` `[rows, D]` and the keys of `part` into rows of `stride` values.
    #[inline(always)]
    pub fn logits(
        &self,
        part: Range<usize>,
        q: &[T],
        head_dim: usize,
        to: &mut [T],
        stride: usize,
    ) {
        match self {
            Self::Stored { k, rows, .. } => {
                k.dots(rows.start + part.start..rows.start + part.end, q, to, stride);
            }
            Self::Wide { k, .. } => {
                let (rows, keys) = (q.len() / head_dim, self.len(head_dim));
                let (q, k) = (Mat::rows(q, head_dim), Mat::rows(&k[part.start..], keys));
                matmul((rows, part.len(), head_dim), to, stride, false, q, k);
            }
        }
    }

    /// Adds `weights V` of the keys of `part` to `out` `[rows, D]`; the weights have rows of `stride` values.
    #[inline(always)]
    pub fn attend(
        &self,
        part: Range<usize>,
        weights: &[T],
        stride: usize,
        head_dim: usize,
        out: &mut [T],
    ) {
        match self {
            Self::Stored { v, rows, .. } => {
                let rows = rows.start + part.start..rows.start + part.end;
                v.add_weighted(rows, weights, stride, out);
            }
            Self::Wide { v, .. } => {
                let rows = out.len() / head_dim;
                let v = Mat::rows(&v[part.start * head_dim..], head_dim);
                let weights = Mat::rows(weights, stride);
                matmul((rows, head_dim, part.len()), out, head_dim, true, weights, v);
            }
        }
    }
}

/// The salient keys, with their values.
#[derive(Clone, Debug)]
pub(crate) enum Salient<'a, T> {
    Part {
        part: Part<'a, T>,
        /// Whether queries are rounded to bf16 as the keys are: then every CPU, however many the queries, multiplies the same.
        rounded: bool,
    },
    /// Keys of many f32 queries, where the CPU multiplies them in panels.
    Panels { keys: StoredPanels<'a, T>, rounded: bool },
}

/// Keys that become panels, some at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredPanels<'a, T> {
    k: &'a KeyStore<T>,
    v: &'a RowStore<T>,
    rows: usize,
    /// Of channels in pairs: more products an instruction than those of widened keys.
    paired: bool,
}

/// Memory that some keys become panels in, and their values f32.
#[derive(Clone, Debug)]
pub(crate) struct PanelScratch<T> {
    k: Vec<T>,
    paired: Vec<[u32; TILE]>,
    v: Vec<T>,
}

impl<T> Default for PanelScratch<T> {
    fn default() -> Self {
        Self { k: Vec::new(), paired: Vec::new(), v: Vec::new() }
    }
}

impl<'a, T: Real> StoredPanels<'a, T> {
    /// As many keys at a time as the second cache holds.
    pub fn spans(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.rows).step_by(SPAN).map(move |start| start..self.rows.min(start + SPAN))
    }

    /// The keys of one of the spans.
    pub fn read(self, span: Range<usize>, scratch: &'a mut PanelScratch<T>) -> PanelKeys<'a> {
        let Self { k, v, paired, .. } = self;
        let PanelScratch { k: wide_k, paired: paired_k, v: wide_v } = scratch;
        let panels = match paired {
            true => Panels::Pairs(k.paired(span.clone(), paired_k).expect("rounded keys are bf16")),
            false => Panels::Singles(k.panels(span.clone(), wide_k)),
        };
        let v = T::as_f32s(v.read(span, wide_v)).expect("values are f32, as was asked");
        PanelKeys { k: panels, v, head_dim: k.width() }
    }
}

impl<'a, T: Real> Salient<'a, T> {
    /// The first `rows` rows of a pair of stores; see [`Part::new`].
    pub fn new(
        (k, v): (&'a KeyStore<T>, &'a RowStore<T>),
        rows: usize,
        queries: usize,
        scratch: (&'a mut Vec<T>, &'a mut Vec<T>),
    ) -> Self {
        let rounded = k.is_bf16();
        let many = queries > SMALL_BATCH && k.has_panels();
        let paired = rounded && pairs_multiply();
        if many && (paired || singles_multiply()) {
            Self::Panels { keys: StoredPanels { k, v, rows, paired }, rounded }
        } else {
            Self::Part { part: Part::new((k, v), 0..rows, queries, scratch), rounded }
        }
    }
}

/// What one segment's queries see.
#[derive(Clone, Debug)]
pub(crate) struct Keys<'a, T> {
    pub previous: Part<'a, T>,
    pub current: Part<'a, T>,
    pub salient: Salient<'a, T>,
    pub state: Option<(&'a [T], &'a [T])>,
    pub count: usize,
    /// Tokens of the current chunk that came before this segment.
    pub offset: usize,
}
