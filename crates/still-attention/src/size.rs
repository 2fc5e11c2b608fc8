//! Bytes of a state, known beforehand.

use crate::config::RowDtype;
use crate::cpu::key_store::TILE;

/// What decides the size of one selection head's state, its budget aside.
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
        let Self { chunk, head_dim, feature_dim, cap, rows } = *self;
        // After the first token of chunk c, chunks 0 … c − 2 are retired.
        let retired = (tokens.saturating_sub(1) / chunk).saturating_sub(1);
        let salient = cap.map_or(retired * budget, |cap| cap.min(retired * budget));
        let absorbed = retired * chunk - salient;
        let store = |count, rows| store_bytes(count, head_dim, rows);
        let exact = store(2 * chunk, rows.window()) + store(salient, rows);
        let state = (2 * feature_dim * head_dim + 2 * feature_dim) * size_of::<f32>();
        exact
            + 2 * chunk * size_of::<f32>()
            + cap.map_or(0, |_| salient * size_of::<(f32, u32)>())
            + if absorbed == 0 { 0 } else { state }
            + size_of::<usize>()
    }

    /// Bytes of a head that keeps its attention to a window of the last `window` tokens, as
    /// [`SlidingKvCache`](crate::SlidingKvCache) counts them.
    pub fn sliding_bytes(&self, window: usize, tokens: usize) -> usize {
        store_bytes(tokens.min(window), self.head_dim, self.rows)
    }

    /// Bytes of the same head's dense cache with 16-bit rows.
    pub fn dense_bytes(&self, tokens: usize) -> usize {
        2 * tokens * RowDtype::Bf16.row_bytes(self.head_dim)
    }
}

/// Bytes of so many rows of keys and of values: keys lie in tiles of 16 rows, 4-bit codes of a value's row in lines of 16 channels.
fn store_bytes(count: usize, head_dim: usize, rows: RowDtype) -> usize {
    let channels = match rows {
        RowDtype::Int4 => head_dim.next_multiple_of(TILE),
        _ => head_dim,
    };
    count.next_multiple_of(TILE) * rows.row_bytes(head_dim) + count * rows.row_bytes(channels)
}
