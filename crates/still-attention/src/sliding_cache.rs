//! The memory of a layer that attends to a window of the last tokens: as many rows as the window has, used again and again.

use std::sync::Mutex;

use candle_core::{DeviceLocation, Tensor};
use rayon::prelude::*;

use crate::arguments::advance_values;
use crate::attention_state::{cannot_truncate, lock, without_gate};
use crate::config::{check_logit_scale, logit_scale};
use crate::cpu::key_store::KeyStore;
use crate::cpu::rows::RowStore;
use crate::dense::{BLOCK, attend_one, query_block};
use crate::{
    AttentionError, AttentionKind, AttentionRows, AttentionState, HeadGeometry, HeadRows,
    HeadScratch, HostState, Result, RowDtype, SavedState, StateBytes,
};
use still_compute::vector::vectorize;

/// Keys and values of the last tokens of a batch of sequences, in the host's memory: one layer.
#[derive(Debug)]
pub struct SlidingKvCache {
    geometry: HeadGeometry,
    batch: usize,
    window: usize,
    dtype: RowDtype,
    logit_scale: f32,
    /// `[batch, K]`; each is fed by one thread at a time.
    rings: Vec<Mutex<Ring>>,
}

/// Rows of one KV head of one sequence: that of position `p` is row `p mod window`.
#[derive(Clone, Debug)]
struct Ring {
    keys: KeyStore<f32>,
    values: RowStore<f32>,
    window: usize,
    /// Tokens fed so far.
    position: usize,
}

impl Ring {
    /// Feeds one token, whose rows take the place of those that leave the window.
    fn push(&mut self, k: &[f32], v: &[f32]) {
        if self.keys.len() < self.window {
            self.keys.push(k);
            self.values.push(v);
        } else {
            self.keys.set(self.position % self.window, k);
            self.values.set(self.position % self.window, v);
        }
        self.position += 1;
    }

    /// Feeds whole rows; returns what they attend to, as it is stored: rows of the window before them, then their own, as `Kᵀ`
    /// and `V`.
    fn extend(&mut self, k: &[f32], v: &[f32], dtype: RowDtype) -> Seen {
        let width = self.keys.width();
        let past = self.position.min(self.window - 1);
        let (mut old_k, mut old_v) = (Vec::new(), Vec::new());
        for position in self.position - past..self.position {
            self.keys.append_row(position % self.window, &mut old_k);
            self.values.append_row(position % self.window, &mut old_v);
        }
        let (mut keys, mut values) = (KeyStore::new(width, dtype), RowStore::new(width, dtype));
        for k in [&old_k, k] {
            keys.extend(k);
        }
        for v in [&old_v, v] {
            values.extend(v);
        }
        for (k, v) in k.chunks_exact(width).zip(v.chunks_exact(width)) {
            self.push(k, v);
        }
        let (mut seen, rows) = (Seen { past, ..Seen::default() }, keys.len());
        keys.transposed(0..rows, &mut seen.keys);
        let mut scratch = Vec::new();
        seen.values = values.read(0..rows, &mut scratch).to_vec();
        seen
    }
}

/// What the queries of a call see, in f32.
#[derive(Default)]
struct Seen {
    /// Rows from before the call.
    past: usize,
    /// `[D, rows]`
    keys: Vec<f32>,
    /// `[rows, D]`
    values: Vec<f32>,
}

impl Clone for SlidingKvCache {
    fn clone(&self) -> Self {
        let rings = self.rings.iter().map(|ring| Mutex::new(lock(ring).clone())).collect();
        Self { rings, ..*self }
    }
}

impl SlidingKvCache {
    /// An empty cache of `batch` sequences whose tokens attend to `window` tokens, their own among them; rows are stored as
    /// `dtype`.
    ///
    /// # Errors
    /// A window of 0.
    pub fn new(
        geometry: HeadGeometry,
        window: usize,
        batch: usize,
        dtype: RowDtype,
    ) -> Result<Self> {
        if window == 0 {
            return Err(AttentionError::Config("attention to a window of 0 tokens".into()));
        }
        let d = geometry.head_dim;
        let (keys, values) = (KeyStore::new(d, dtype), RowStore::new(d, dtype));
        let ring = Ring { keys, values, window, position: 0 };
        let heads = batch * geometry.num_key_value_heads;
        let rings = (0..heads).map(|_| Mutex::new(ring.clone())).collect();
        let logit_scale = logit_scale(None, d) as f32;
        Ok(Self { geometry, batch, window, dtype, logit_scale, rings })
    }

    /// The same with logits that are `q·k` times `scale`; `1/√D` if absent.
    ///
    /// # Errors
    /// A scale that is no positive number.
    pub fn with_logit_scale(self, scale: Option<f64>) -> Result<Self> {
        check_logit_scale(scale)?;
        Ok(Self { logit_scale: logit_scale(scale, self.geometry.head_dim) as f32, ..self })
    }

    /// [`AttentionState::advance`] on slices whose sizes it has checked; rows of `out` beyond `lengths` are left alone.
    fn advance_values(&self, [q, k, v]: [&[f32]; 3], lengths: &[usize], out: &mut [f32]) {
        let HeadGeometry { num_heads, num_key_value_heads: kv_heads, head_dim: d } = self.geometry;
        let tokens = q.len() / (self.batch * num_heads * d).max(1);
        let seen: Vec<Seen> = self
            .rings
            .par_iter()
            .enumerate()
            .map(|(i, ring)| {
                let rows = i * tokens * d..(i * tokens + lengths[i / kv_heads]) * d;
                lock(ring).extend(&k[rows.clone()], &v[rows], self.dtype)
            })
            .collect();
        out.par_chunks_mut((tokens * d).max(1)).enumerate().for_each(|(task, out)| {
            let (sequence, head) = (task / num_heads, task % num_heads);
            let Seen { past, keys, values } =
                &seen[sequence * kv_heads + head * kv_heads / num_heads];
            let q = &q[task * tokens * d..(task + 1) * tokens * d];
            let out = &mut out[..lengths[sequence] * d];
            out.par_chunks_mut(BLOCK * d).enumerate().for_each(|(block, out)| {
                let (q, first) = (&q[block * BLOCK * d..], past + block * BLOCK);
                vectorize(
                    #[inline(always)]
                    || {
                        query_block(
                            q,
                            keys,
                            values,
                            (first, self.window),
                            (d, self.logit_scale),
                            out,
                        )
                    },
                );
            });
        });
    }
}

impl AttentionState for SlidingKvCache {
    fn advance(&mut self, rows: AttentionRows<'_>, lengths: Option<&[usize]>) -> Result<Tensor> {
        without_gate(&rows)?;
        let AttentionRows { q, k, v, .. } = rows;
        let (op, geometry, batch) = ("SlidingKvCache::advance", self.geometry, self.batch);
        advance_values(op, [q, k, v], geometry, batch, lengths, |qkv, lengths, out| {
            self.advance_values(qkv, lengths, out);
        })
    }

    fn kind(&self) -> AttentionKind {
        AttentionKind::Sliding { window: self.window }
    }

    fn location(&self) -> DeviceLocation {
        DeviceLocation::Cpu
    }

    fn position(&self, sequence: usize) -> usize {
        lock(&self.rings[sequence * self.geometry.num_key_value_heads]).position
    }

    fn size_bytes(&self) -> usize {
        self.bytes_by_part().map_or(0, |bytes| bytes.total())
    }

    fn bytes_by_part(&self) -> Option<StateBytes> {
        let size = |ring: &Mutex<Ring>| {
            let ring = lock(ring);
            let ([keys, of_keys], [values, of_values]) =
                (ring.keys.size_bytes(), ring.values.size_bytes());
            StateBytes {
                window_rows: keys + values,
                row_scales: of_keys + of_values,
                ..StateBytes::default()
            }
        };
        Some(self.rings.iter().map(size).sum())
    }

    /// Rows that have left the window are gone: only before any has, can it go back, or to nothing.
    fn check_truncate(&self, sequence: usize, tokens: usize) -> Result<()> {
        match self.position(sequence) {
            position if tokens > position => {
                Err(cannot_truncate(tokens, &format!("it has {position}")))
            }
            position if tokens < position && tokens > 0 && position > self.window => {
                let window = self.window;
                let why =
                    format!("of {position}, a sliding window has kept the last {window} alone");
                Err(cannot_truncate(tokens, &why))
            }
            _ => Ok(()),
        }
    }

    fn truncate(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        self.check_truncate(sequence, tokens)?;
        let heads = self.geometry.num_key_value_heads;
        for ring in &self.rings[sequence * heads..(sequence + 1) * heads] {
            let mut ring = lock(ring);
            if tokens < ring.position {
                ring.keys.truncate(tokens);
                ring.values.truncate(tokens);
                ring.position = tokens;
            }
        }
        Ok(())
    }

    fn save(&self) -> Result<SavedState> {
        let mut saved = SavedState::default();
        for (part, ring) in self.rings.iter().enumerate() {
            let ring = lock(ring);
            ring.keys.save(&mut saved, part, "k")?;
            ring.values.save(&mut saved, part, "v")?;
            saved.put_count(part, "position", ring.position)?;
        }
        Ok(saved)
    }

    fn restore(&mut self, mut saved: SavedState) -> Result<()> {
        for (part, ring) in self.rings.iter().enumerate() {
            let mut ring = lock(ring);
            ring.position = saved.take_count(part, "position")?;
            let rows = Some(ring.position.min(self.window));
            ring.keys.restore(&mut saved, part, "k", rows)?;
            ring.values.restore(&mut saved, part, "v", rows)?;
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

impl HostState for SlidingKvCache {
    fn parts(&self) -> usize {
        self.rings.len()
    }

    fn decode(&self, part: usize, rows: HeadRows<'_>, scratch: &mut HeadScratch, out: &mut [f32]) {
        let mut ring = lock(&self.rings[part]);
        ring.push(rows.k, rows.v);
        // The order of rows means nothing: their positions are in the keys.
        let (keys, values) = (&ring.keys, &ring.values);
        attend_one(keys, values, (rows.q, self.logit_scale), scratch, out);
    }
}
