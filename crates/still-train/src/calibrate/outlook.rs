//! What other shares would give: choosing a budget.

use serde::Serialize;
use still_attention::RowDtype;

use super::allocate::{Choice, allocate};

/// Shares of the dense cache that are looked at.
const SHARES: [f64; 12] = [0.05, 0.06, 0.07, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5];
/// Rows that are looked at.
const ROWS: [RowDtype; 3] = [RowDtype::Bf16, RowDtype::Int8, RowDtype::Int4];

/// What shares of the dense cache give with rows of one format.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outlook {
    /// How rows are stored.
    pub rows: RowDtype,
    /// Bytes that a head takes more if it is whole than with the smallest budget that holds its sink.
    pub whole_head_bytes: usize,
    /// The smallest share at which every head that retrieves is whole and every other holds its sink; `None` if no head retrieves.
    pub knee: Option<f64>,
    /// By rising share, from the smallest that can be met.
    pub points: Vec<Outcome>,
}

/// What one share gives.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// Of the dense cache with 16-bit rows.
    pub cache_fraction: f64,
    /// What is taken of it.
    pub cache_bytes: usize,
    /// Heads that are whole.
    pub whole: usize,
    /// Those among them that are because they retrieve.
    pub retrieving: usize,
    /// Estimated, nats a token, over all heads. What narrow rows lose is not in it.
    pub loss: f64,
}

/// Bytes of every head at each candidate, of what has no budget, and of the dense cache, with rows of one format.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    pub rows: RowDtype,
    pub by_candidate: Vec<usize>,
    pub kept: usize,
    pub dense: usize,
}

impl Sizes {
    /// Most bytes of all budgets at a share of the dense cache.
    pub fn limit(&self, share: f64) -> usize {
        ((share * self.dense as f64) as usize).saturating_sub(self.kept)
    }
}

/// Allocations at every share, for every format; `sizes` counts with one.
pub(super) fn outlook(
    choices: &[Choice],
    retrieval_threshold: f64,
    sizes: impl Fn(RowDtype) -> Sizes,
) -> Vec<Outlook> {
    ROWS.map(|rows| of_rows(choices, retrieval_threshold, &sizes(rows))).into()
}

fn of_rows(choices: &[Choice], retrieval_threshold: f64, sizes: &Sizes) -> Outlook {
    let bytes = &sizes.by_candidate;
    let (whole, sink) = (bytes.len() - 1, usize::from(bytes.len() > 2));
    let whole_head_bytes = bytes[whole].saturating_sub(bytes[sink]);
    let retrieving = choices.iter().filter(|head| head.retrieval >= retrieval_threshold).count();
    let all = choices.len() * bytes[sink] + retrieving * whole_head_bytes + sizes.kept;
    let outcome = |share: f64| {
        let taken = allocate(choices, bytes, sizes.limit(share), retrieval_threshold)?;
        let heads = || choices.iter().zip(&taken);
        Some(Outcome {
            cache_fraction: share,
            cache_bytes: heads().map(|(_, taken)| bytes[taken.candidate]).sum::<usize>()
                + sizes.kept,
            whole: heads().filter(|(_, taken)| taken.candidate == whole).count(),
            retrieving: heads().filter(|(_, taken)| taken.retrieves).count(),
            loss: heads().map(|(head, taken)| head.losses[taken.candidate]).sum(),
        })
    };
    Outlook {
        rows: sizes.rows,
        whole_head_bytes,
        knee: (retrieving > 0).then_some(all as f64 / sizes.dense as f64),
        points: SHARES.into_iter().filter_map(outcome).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_knee_is_the_smallest_share_with_every_retrieving_head_whole() {
        let head = |retrieval| Choice { retrieval, losses: vec![3.0, 2.0, 1.0, 0.0] };
        let choices = [head(0.9), head(0.0), head(0.2), head(0.05)];
        let sizes = |rows: RowDtype| {
            let row = rows.row_bytes(64);
            let by_candidate = [0, 1, 8, 64].map(|kept| 1000 + kept * row).to_vec();
            Sizes { rows, by_candidate, kept: 500, dense: 80_000 }
        };
        let found = outlook(&choices, 0.1, sizes);
        assert!(found.iter().map(|found| found.rows).eq(ROWS));
        for Outlook { rows, whole_head_bytes, knee, points } in found {
            assert_eq!(whole_head_bytes, 63 * rows.row_bytes(64));
            let knee = knee.unwrap();
            let whole = |share| {
                let limit = sizes(rows).limit(share);
                let taken = allocate(&choices, &sizes(rows).by_candidate, limit, 0.1).unwrap();
                taken.iter().filter(|taken| taken.retrieves).count()
            };
            assert_eq!((whole(knee + 1e-6), whole(knee - 1e-3)), (2, 1), "{rows}");
            for pair in points.windows(2) {
                assert!(pair[0].retrieving <= pair[1].retrieving, "{rows}");
                assert!(pair[1].cache_bytes as f64 <= pair[1].cache_fraction * 80_000.0);
            }
        }
        assert_eq!(outlook(&[head(0.0)], 0.1, sizes)[0].knee, None);
    }
}
