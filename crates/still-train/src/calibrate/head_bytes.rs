//! Bytes of a student's heads, by layer: what a row takes depends on how large the channels of a layer's keys are.

use still_attention::{HeadSize, RowDtype, StateBytes, StillConfig};
use still_model::ModelConfig;

use super::HeadReport;
use super::outlook::Sizes;

/// Counts bytes after `at_length` tokens.
#[derive(Clone, Copy)]
pub(super) struct HeadBytes<'a> {
    config: &'a StillConfig,
    model: &'a ModelConfig,
    candidates: &'a [usize],
    at_length: usize,
}

impl<'a> HeadBytes<'a> {
    pub fn new(
        config: &'a StillConfig,
        model: &'a ModelConfig,
        candidates: &'a [usize],
        at_length: usize,
    ) -> Self {
        Self { config, model, candidates, at_length }
    }

    fn size(&self, rows: RowDtype) -> HeadSize {
        let config = self.config;
        HeadSize {
            chunk: config.chunk,
            head_dim: self.model.head_dim,
            feature_dim: if config.branches.linear { config.feature_dim } else { 0 },
            cap: config.cap,
            rows,
        }
    }

    fn in_layer(&self, layer: usize, rows: RowDtype) -> HeadSize {
        self.size(self.config.stored_rows(layer, rows))
    }

    /// The layers that attend to a sliding window.
    fn windows(&self, rows: RowDtype) -> StateBytes {
        let (model, size) = (self.model, self.size(rows));
        let windows = (0..model.num_hidden_layers).filter_map(|layer| model.sliding_window(layer));
        let layer = |window| size.sliding_bytes_by_part(window, self.at_length);
        windows.map(|window| layer(window) * model.num_key_value_heads).sum()
    }

    /// The dense cache, 16-bit rows.
    pub fn dense(&self) -> usize {
        let heads = self.config.budgets.iter().map(Vec::len).sum::<usize>();
        let rows = RowDtype::Bf16;
        heads * self.size(rows).dense_bytes(self.at_length) + self.windows(rows).total()
    }

    /// Every head at each candidate.
    pub fn sizes(&self, rows: RowDtype) -> Sizes {
        let layer = |(layer, budgets): (usize, &Vec<usize>)| {
            let size = self.in_layer(layer, rows);
            let bytes = self.candidates.iter().map(|&budget| size.bytes(budget, self.at_length));
            vec![bytes.collect(); budgets.len()]
        };
        Sizes {
            rows,
            by_head: self.config.budgets.iter().enumerate().flat_map(layer).collect(),
            // Layers that keep their attention to a window are in both caches.
            kept: self.windows(rows).total(),
            dense: self.dense(),
        }
    }

    /// All that heads with these budgets and the windows hold.
    pub fn held(&self, heads: &[HeadReport], rows: RowDtype) -> StateBytes {
        let of = |head: &HeadReport| {
            self.in_layer(head.layer, rows).bytes_by_part(head.budget, self.at_length)
        };
        heads.iter().map(of).sum::<StateBytes>() + self.windows(rows)
    }

    /// The largest budget, the same for every head, that takes at most so many bytes.
    pub fn uniform_budget(&self, rows: RowDtype, bytes: usize) -> Option<usize> {
        let layers = self.config.budgets.iter().enumerate();
        let all = |budget: usize| -> usize {
            let of = |(layer, heads): (usize, &Vec<usize>)| {
                heads.len() * self.in_layer(layer, rows).bytes(budget, self.at_length)
            };
            layers.clone().map(of).sum::<usize>() + self.windows(rows).total()
        };
        (0..=self.config.chunk).rev().find(|&budget| all(budget) <= bytes)
    }
}
