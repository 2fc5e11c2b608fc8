//! Dense causal softmax attention: the teacher's.

use std::sync::{Mutex, MutexGuard};

use candle_core::{DeviceLocation, Tensor};
use rayon::prelude::*;

use crate::arguments::{advance_values, whole_sequences};
use crate::attention_state::{cannot_truncate, lock, without_gate};
use crate::config::{check_logit_scale, logit_scale};
use crate::cpu::key_store::KeyStore;
use crate::cpu::query_rows::take;
use crate::cpu::rows::RowStore;
use crate::{
    AttentionKind, AttentionRows, AttentionState, HeadGeometry, HeadRows, HeadScratch, HostState,
    Result, RowDtype, SavedState, StateBytes,
};
use still_compute::matmul::{Mat, matmul};
use still_compute::vector::{self, vectorize};

/// Query rows answered together.
pub(crate) const BLOCK: usize = 128;

/// Keys whose logits are held at a time: a block's logits stay in the second-level cache.
const KEY_TILE: usize = 256;

/// Dense causal attention of whole sequences, no gradient: `q` `[B, H, N, D]`, `k`, `v` `[B, K, N, D]`
/// → `[B, H, N, D]`. Logits are `q·k` times `logit_scale`, `1/√D` if absent. On the CPU in f32, on CUDA (feature `cuda`) in any
/// float type, without another scale.
///
/// # Errors
/// Shapes that contradict each other; a scale that is no positive number; a dtype, device or scale without a kernel.
pub fn dense_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    logit_scale: Option<f64>,
) -> Result<Tensor> {
    let (batch, _, geometry) = whole_sequences("dense_attention", [q, k, v])?;
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        crate::cuda::check_logit_scale(logit_scale, geometry.head_dim)?;
        return crate::cuda::dense_attention(q, k, v);
    }
    let cache = KvCache::new(geometry, batch, RowDtype::F32);
    cache.with_logit_scale(logit_scale)?.advance(q, k, v, None)
}

/// Keys and values of every token of a batch of sequences: one layer.
#[derive(Debug)]
pub struct KvCache {
    geometry: HeadGeometry,
    batch: usize,
    logit_scale: f32,
    /// `[batch, K]`; each is fed by one thread at a time.
    rows: Vec<Mutex<Pair>>,
}

/// K and V rows.
type Pair = (KeyStore<f32>, RowStore<f32>);

impl Clone for KvCache {
    fn clone(&self) -> Self {
        let rows = self.rows.iter().map(|pair| Mutex::new(lock(pair).clone())).collect();
        Self { rows, ..*self }
    }
}

impl KvCache {
    /// An empty cache of `batch` sequences whose rows are stored as `rows`.
    pub fn new(geometry: HeadGeometry, batch: usize, rows: RowDtype) -> Self {
        let d = geometry.head_dim;
        let pair = || Mutex::new((KeyStore::new(d, rows), RowStore::new(d, rows)));
        let rows = (0..batch * geometry.num_key_value_heads).map(|_| pair()).collect();
        Self { geometry, batch, logit_scale: logit_scale(None, d) as f32, rows }
    }

    /// The same with logits that are `q·k` times `scale`; `1/√D` if absent.
    ///
    /// # Errors
    /// A scale that is no positive number.
    pub fn with_logit_scale(self, scale: Option<f64>) -> Result<Self> {
        check_logit_scale(scale)?;
        Ok(Self { logit_scale: logit_scale(scale, self.geometry.head_dim) as f32, ..self })
    }

    /// Feeds `T` tokens more to each sequence; shapes and `lengths` as in [`crate::HybridState::advance`].
    ///
    /// # Errors
    /// Shapes that contradict the cache; a dtype or device without a kernel.
    pub fn advance(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        let (geometry, batch) = (self.geometry, self.batch);
        advance_values(
            "KvCache::advance",
            [q, k, v],
            geometry,
            batch,
            lengths,
            |qkv, lengths, out| {
                self.advance_values(qkv, lengths, out);
            },
        )
    }

    /// [`KvCache::advance`] on slices whose sizes it has checked; rows of `out` beyond `lengths` are left alone.
    fn advance_values(&self, [q, k, v]: [&[f32]; 3], lengths: &[usize], out: &mut [f32]) {
        let scale = self.logit_scale;
        let HeadGeometry { num_heads, num_key_value_heads: kv_heads, head_dim: d } = self.geometry;
        let tokens = q.len() / (self.batch * num_heads * d).max(1);
        let mut rows: Vec<MutexGuard<'_, Pair>> = self.rows.iter().map(lock).collect();
        for (i, pair) in rows.iter_mut().enumerate() {
            let block = i * tokens * d..(i * tokens + lengths[i / kv_heads]) * d;
            pair.0.extend(&k[block.clone()]);
            pair.1.extend(&v[block]);
        }
        let rows: Vec<&Pair> = rows.iter().map(|pair| &**pair).collect();
        let widened: Vec<(Vec<f32>, Vec<f32>)> = rows
            .par_iter()
            .map(|(k, v)| {
                let (mut wide_k, mut wide_v) = (Vec::new(), Vec::new());
                k.transposed(0..k.len(), &mut wide_k);
                // Borrowed rows stay where they are.
                if !v.is_native() {
                    v.read(0..v.len(), &mut wide_v);
                }
                (wide_k, wide_v)
            })
            .collect();
        out.par_chunks_mut((tokens * d).max(1)).enumerate().for_each(|(task, out)| {
            let (sequence, head) = (task / num_heads, task % num_heads);
            let pair = sequence * kv_heads + head * kv_heads / num_heads;
            let (k_store, v_store) = rows[pair];
            let (k, wide_v) = &widened[pair];
            let mut none = Vec::new();
            let v = if v_store.is_native() {
                v_store.read(0..v_store.len(), &mut none)
            } else {
                wide_v
            };
            let length = lengths[sequence];
            let past = k_store.len() - length;
            let q = &q[task * tokens * d..(task + 1) * tokens * d];
            out[..length * d].par_chunks_mut(BLOCK * d).enumerate().for_each(|(block, out)| {
                let (q, first) = (&q[block * BLOCK * d..], past + block * BLOCK);
                vectorize(
                    #[inline(always)]
                    || query_block(q, k, v, (first, usize::MAX), (d, scale), out),
                );
            });
        });
    }

    /// One of the [`parts`](Self::parts), which no other thread has meanwhile.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn head(&self, part: usize) -> DenseHead<'_> {
        DenseHead { rows: lock(&self.rows[part]), logit_scale: self.logit_scale }
    }
}

impl AttentionState for KvCache {
    fn advance(&mut self, rows: AttentionRows<'_>, lengths: Option<&[usize]>) -> Result<Tensor> {
        without_gate(&rows)?;
        self.advance(rows.q, rows.k, rows.v, lengths)
    }

    fn kind(&self) -> AttentionKind {
        AttentionKind::Dense
    }

    fn location(&self) -> DeviceLocation {
        DeviceLocation::Cpu
    }

    fn position(&self, sequence: usize) -> usize {
        lock(&self.rows[sequence * self.geometry.num_key_value_heads]).0.len()
    }

    fn size_bytes(&self) -> usize {
        self.bytes_by_part().map_or(0, |bytes| bytes.total())
    }

    fn bytes_by_part(&self) -> Option<StateBytes> {
        let size = |pair: &Mutex<Pair>| {
            let pair = lock(pair);
            let ([keys, of_keys], [values, of_values]) = (pair.0.size_bytes(), pair.1.size_bytes());
            StateBytes {
                kept_rows: keys + values,
                row_scales: of_keys + of_values,
                ..StateBytes::default()
            }
        };
        Some(self.rows.iter().map(size).sum())
    }

    fn check_truncate(&self, sequence: usize, tokens: usize) -> Result<()> {
        match self.position(sequence) {
            position if tokens > position => {
                Err(cannot_truncate(tokens, &format!("it has {position}")))
            }
            _ => Ok(()),
        }
    }

    fn truncate(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        self.check_truncate(sequence, tokens)?;
        let heads = self.geometry.num_key_value_heads;
        for pair in &self.rows[sequence * heads..(sequence + 1) * heads] {
            let (k, v) = &mut *lock(pair);
            k.truncate(tokens);
            v.truncate(tokens);
        }
        Ok(())
    }

    fn save(&self) -> Result<SavedState> {
        let mut saved = SavedState::default();
        for (part, pair) in self.rows.iter().enumerate() {
            let (k, v) = &*lock(pair);
            k.save(&mut saved, part, "k")?;
            v.save(&mut saved, part, "v")?;
        }
        Ok(saved)
    }

    fn restore(&mut self, mut saved: SavedState) -> Result<()> {
        let mut tokens = None;
        for (part, pair) in self.rows.iter().enumerate() {
            // Heads of a sequence have equally many.
            let rows = tokens.filter(|_| part % self.geometry.num_key_value_heads > 0);
            let (k, v) = &mut *lock(pair);
            k.restore(&mut saved, part, "k", rows)?;
            v.restore(&mut saved, part, "v", Some(k.len()))?;
            tokens = Some(k.len());
        }
        saved.check_all_taken()
    }

    fn boxed_clone(&self) -> Box<dyn AttentionState> {
        Box::new(self.clone())
    }

    fn on_host(&self) -> Option<&dyn HostState> {
        Some(self)
    }
}

impl HostState for KvCache {
    fn parts(&self) -> usize {
        self.rows.len()
    }

    fn decode(&self, part: usize, rows: HeadRows<'_>, scratch: &mut HeadScratch, out: &mut [f32]) {
        self.head(part).feed(rows.q, rows.k, rows.v, scratch, out);
    }
}

/// K and V rows of one KV head of one sequence.
#[derive(Debug)]
pub struct DenseHead<'a> {
    rows: MutexGuard<'a, Pair>,
    logit_scale: f32,
}

/// Memory of [`DenseHead::feed`].
#[derive(Clone, Debug, Default)]
pub(crate) struct DenseScratch {
    q: Vec<f32>,
    weights: Vec<f32>,
}

impl DenseHead<'_> {
    /// Feeds one token, on this thread: `q` and `out` are `[query heads, D]`, `k` and `v` `[D]`.
    ///
    /// # Panics
    /// If the slices are too short for their layout.
    pub fn feed(
        &mut self,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        scratch: &mut HeadScratch,
        out: &mut [f32],
    ) {
        let (k_store, v_store) = &mut *self.rows;
        k_store.extend(k);
        v_store.extend(v);
        attend_one(k_store, v_store, (q, self.logit_scale), scratch, out);
    }
}

/// Attention of one token's queries, `[query heads, D]`, to all rows that are stored: logits are `q·k` times `scale`.
pub(crate) fn attend_one(
    k_store: &KeyStore<f32>,
    v_store: &RowStore<f32>,
    (q, scale): (&[f32], f32),
    scratch: &mut HeadScratch,
    out: &mut [f32],
) {
    let d = k_store.width();
    let rows = k_store.len();
    let DenseScratch { q: scaled, weights } = &mut scratch.dense;
    scaled.clear();
    scaled.extend(q.iter().map(|x| x * scale));
    let heads = q.len() / d;
    let weights = take(weights, heads * rows);
    out[..heads * d].fill(0.0);
    vectorize(
        #[inline(always)]
        || {
            k_store.dots(0..rows, scaled, weights, rows);
            for weights in weights.chunks_exact_mut(rows) {
                vector::softmax(weights);
            }
            v_store.add_weighted(0..rows, weights, rows, &mut out[..heads * d]);
        },
    );
}

/// Causal softmax attention of a block of queries, the first at position `first`, to `window` tokens, their own among them: keys
/// in tiles, online softmax. `k` is `Kᵀ`, `[D, keys]`; logits are `q·k` times `scale`.
#[inline(always)]
pub(crate) fn query_block(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    (first, window): (usize, usize),
    (d, scale): (usize, f32),
    out: &mut [f32],
) {
    let rows = out.len() / d;
    let keys = first + rows;
    let q: Vec<f32> = q[..rows * d].iter().map(|x| x * scale).collect();
    let mut logits = vec![f32::NAN; rows * KEY_TILE];
    let mut max = vec![f32::NEG_INFINITY; rows];
    let mut sum = vec![0.0_f32; rows];
    out.fill(0.0);
    for start in ((first + 1).saturating_sub(window)..keys).step_by(KEY_TILE) {
        let tile = KEY_TILE.min(keys - start);
        let (k, v) = (Mat::rows(&k[start..], k.len() / d), &v[start * d..(start + tile) * d]);
        matmul((rows, tile, d), &mut logits, KEY_TILE, false, Mat::rows(&q, d), k);
        for i in 0..rows {
            let visible = (first + i + 1).saturating_sub(start).min(tile);
            let left = (first + i + 1).saturating_sub(window).saturating_sub(start).min(visible);
            let row = &mut logits[i * KEY_TILE..i * KEY_TILE + tile];
            let (row, future) = row.split_at_mut(visible);
            let (past, row) = row.split_at_mut(left);
            past.fill(0.0);
            future.fill(0.0);
            if row.is_empty() {
                continue;
            }
            let tile_max = vector::softmax_shift(row);
            if tile_max > max[i] {
                let shrink = (max[i] - tile_max).exp();
                sum[i] *= shrink;
                out[i * d..(i + 1) * d].iter_mut().for_each(|x| *x *= shrink);
                max[i] = tile_max;
            }
            sum[i] += vector::exp_sub_sum(row, max[i]);
        }
        let weights = Mat::rows(&logits, KEY_TILE);
        matmul((rows, d, tile), out, d, true, weights, Mat::rows(v, d));
    }
    for (out, sum) in out.chunks_exact_mut(d).zip(sum) {
        let inverse = 1.0 / sum;
        out.iter_mut().for_each(|x| *x *= inverse);
    }
}
