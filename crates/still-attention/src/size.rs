//! Bytes of a state: by what they hold, and known beforehand.

use std::iter::Sum;
use std::ops::{Add, Mul};

use serde::Serialize;

use crate::config::RowDtype;
use crate::cpu::key_store::TILE;

/// Bytes of a state by what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StateBytes {
    /// Values of K and V rows of a window: a hybrid head's last chunks, or the window of sliding attention.
    pub window_rows: usize,
    /// Values of K and V rows that are kept for good: of salient tokens, or of all tokens of a dense cache.
    pub kept_rows: usize,
    /// Scales and offsets of rows in few bits.
    pub row_scales: usize,
    /// Router scores of the window's tokens; under a cap, scores and positions of salient tokens.
    pub scores: usize,
    /// Linear states: `S`, `z` and `n`.
    pub linear_states: usize,
}

impl StateBytes {
    /// All of them.
    pub fn total(&self) -> usize {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Each with its name in words.
    pub fn parts(&self) -> [(&'static str, usize); 5] {
        let Self { window_rows, kept_rows, row_scales, scores, linear_states } = *self;
        [
            ("windows", window_rows),
            ("kept rows", kept_rows),
            ("row scales", row_scales),
            ("scores", scores),
            ("linear states", linear_states),
        ]
    }
}

impl Add for StateBytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            window_rows: self.window_rows + other.window_rows,
            kept_rows: self.kept_rows + other.kept_rows,
            row_scales: self.row_scales + other.row_scales,
            scores: self.scores + other.scores,
            linear_states: self.linear_states + other.linear_states,
        }
    }
}

impl Mul<usize> for StateBytes {
    type Output = Self;

    fn mul(self, heads: usize) -> Self {
        Self {
            window_rows: self.window_rows * heads,
            kept_rows: self.kept_rows * heads,
            row_scales: self.row_scales * heads,
            scores: self.scores * heads,
            linear_states: self.linear_states * heads,
        }
    }
}

impl Sum for StateBytes {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// What decides the size of one selection head's state on a CPU, its budget aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadSize {
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Columns of the feature map's matrix; 0 without a linear branch.
    pub feature_dim: usize,
    /// Most salient tokens.
    pub cap: Option<usize>,
    /// How exact rows are stored.
    pub rows: RowDtype,
}

impl HeadSize {
    /// Bytes after `tokens` tokens with `budget` salient tokens of each retired chunk, as
    /// [`AttentionState::size_bytes`](crate::AttentionState::size_bytes) counts them.
    pub fn bytes(&self, budget: usize, tokens: usize) -> usize {
        self.bytes_by_part(budget, tokens).total()
    }

    /// The same by what they hold.
    pub fn bytes_by_part(&self, budget: usize, tokens: usize) -> StateBytes {
        let Self { chunk, head_dim, feature_dim, cap, rows } = *self;
        // After the first token of chunk c, chunks 0 … c − 2 are retired.
        let retired = (tokens.saturating_sub(1) / chunk).saturating_sub(1);
        let salient = cap.map_or(retired * budget, |cap| cap.min(retired * budget));
        let absorbed = retired * chunk - salient;
        let slots = ring_rows(tokens, 2 * chunk);
        let [window_rows, window_scales] = store_bytes(slots, head_dim, rows.window());
        let [kept_rows, kept_scales] = store_bytes(salient, head_dim, rows);
        let ranks = cap.map_or(0, |_| salient * size_of::<(f32, u32)>());
        let state = (2 * feature_dim * head_dim + 2 * feature_dim) * size_of::<f32>();
        let count = size_of::<usize>();
        StateBytes {
            window_rows,
            kept_rows,
            row_scales: window_scales + kept_scales,
            scores: slots * size_of::<f32>() + ranks,
            linear_states: count + if absorbed == 0 { 0 } else { state },
        }
    }

    /// Bytes of a head that keeps its attention to a window of the last `window` tokens, as
    /// [`SlidingKvCache`](crate::SlidingKvCache) counts them.
    pub fn sliding_bytes(&self, window: usize, tokens: usize) -> usize {
        self.sliding_bytes_by_part(window, tokens).total()
    }

    /// The same by what they hold.
    pub fn sliding_bytes_by_part(&self, window: usize, tokens: usize) -> StateBytes {
        let [window_rows, row_scales] = store_bytes(tokens.min(window), self.head_dim, self.rows);
        StateBytes { window_rows, row_scales, ..StateBytes::default() }
    }

    /// Bytes of the same head's dense cache with 16-bit rows.
    pub fn dense_bytes(&self, tokens: usize) -> usize {
        2 * tokens * RowDtype::Bf16.row_bytes(self.head_dim)
    }
}

/// Rows that a ring of `slots` has after so many tokens: it grows by a tile at a time until every slot is there.
pub(crate) fn ring_rows(tokens: usize, slots: usize) -> usize {
    tokens.next_multiple_of(TILE).min(slots)
}

/// Bytes of so many rows of keys and of values, and of their scales: keys lie in tiles of 16 rows, 4-bit codes in lines of 16.
fn store_bytes(count: usize, head_dim: usize, rows: RowDtype) -> [usize; 2] {
    let keys = count.next_multiple_of(TILE);
    let values = match rows {
        RowDtype::Int4 => (keys * head_dim + count * head_dim.next_multiple_of(TILE)) / 2,
        _ => (keys + count) * (rows.row_bytes(head_dim) - rows.scale_bytes(head_dim)),
    };
    [values, (keys + count) * rows.scale_bytes(head_dim)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A head of SmolLM2.
    const SIZE: HeadSize =
        HeadSize { chunk: 64, head_dim: 64, feature_dim: 64, cap: None, rows: RowDtype::Bf16 };

    #[test]
    fn short_contexts_take_little_more_than_a_dense_cache() {
        let state = (2 * 64 * 64 + 2 * 64) * 4;
        for tokens in 1..=8192 {
            let dense = SIZE.dense_bytes(tokens);
            for budget in [0, 1, 2, 4] {
                let got = SIZE.bytes(budget, tokens);
                // Below, one linear state, and tiles that are not full.
                let most = if tokens < 256 { dense + state + 4096 } else { dense * 11 / 10 };
                assert!(got <= most, "{budget} of 64, {tokens} tokens: {got}, dense {dense}");
            }
            // Of a whole head, the ring's slots that no token is in.
            let whole = SIZE.bytes(64, tokens);
            assert!(whole <= dense + 64 * 256 + 128 * 4 + 8, "{tokens} tokens: {whole}");
            // Ten whole heads of ninety.
            let mixed = 10 * whole + 80 * SIZE.bytes(1, tokens);
            assert!(tokens < 256 || mixed <= 90 * dense * 11 / 10, "{tokens} tokens: {mixed}");
        }
    }

    #[test]
    fn ten_whole_heads_of_ninety_take_a_tenth_in_int8() {
        let share = |rows| {
            let size = HeadSize { rows, ..SIZE };
            let bytes = 10 * size.bytes(64, 8192) + 80 * size.bytes(1, 8192);
            100.0 * bytes as f64 / (90 * size.dense_bytes(8192)) as f64
        };
        for (rows, percent) in
            [(RowDtype::Bf16, 15.31), (RowDtype::Int8, 9.54), (RowDtype::Int4, 6.85)]
        {
            assert!((share(rows) - percent).abs() < 0.01, "{rows}: {} %", share(rows));
        }
    }
}
