//! What other shares would give: choosing a budget.

use serde::Serialize;
use still_attention::RowDtype;

use super::allocate::{Choice, allocate};
use super::{CalibrateOptions, fail};
use crate::error::Result;

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
    /// The knee, rounded up to thousandths; `None` if there is none within the dense cache.
    pub recommended: Option<f64>,
    /// By rising share, from the smallest that can be met.
    pub points: Vec<Outcome>,
}

/// What one share gives.
#[derive(Clone, Debug, PartialEq, Serialize)]
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
    /// The budget of each head, in the order of [`Calibration::heads`](super::Calibration::heads).
    #[serde(skip)]
    pub budgets: Vec<usize>,
}

/// Bytes of every head at each candidate, of what has no budget, and of the dense cache, with rows of one format.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    pub rows: RowDtype,
    /// `[head][candidate]`: layers whose keys have wide channels may take more.
    pub by_head: Vec<Vec<usize>>,
    pub kept: usize,
    pub dense: usize,
}

/// Of a head's candidates, the one that holds an attention sink.
fn sink(bytes: &[usize]) -> usize {
    bytes[usize::from(bytes.len() > 2)]
}

/// Bytes that a head takes more if it is whole than with its sink alone.
fn whole_step(bytes: &[usize]) -> usize {
    bytes[bytes.len() - 1].saturating_sub(sink(bytes))
}

impl Sizes {
    /// Of a head whose rows are in the format itself.
    fn whole_head_bytes(&self) -> usize {
        self.by_head.iter().map(|bytes| whole_step(bytes)).min().unwrap_or(0)
    }

    /// The share at which these heads are whole and the others hold their sink; `None` for no heads.
    fn knee(&self, whole: &[usize]) -> Option<f64> {
        let sinks: usize = self.by_head.iter().map(|bytes| sink(bytes)).sum();
        let steps: usize = whole.iter().map(|&head| whole_step(&self.by_head[head])).sum();
        (!whole.is_empty()).then_some((sinks + steps + self.kept) as f64 / self.dense as f64)
    }

    /// # Errors
    /// A share of the dense cache that the smallest budgets exceed.
    pub fn check_least(&self, options: &CalibrateOptions) -> Result<()> {
        let least: usize = self.by_head.iter().map(|bytes| bytes[0]).sum();
        if least <= self.limit(options.cache_fraction) {
            return Ok(());
        }
        let share = (least + self.kept) as f64 / self.dense as f64;
        Err(fail(
            format!(
                "a cache of {:.3} of the dense one at {} tokens is too small: windows and linear states alone take {share:.3}",
                options.cache_fraction, options.at_length,
            ),
            "raise --cache-fraction (in a recipe: calibration.cache_fraction), or calibrate for a longer context with --at-length",
        ))
    }

    /// Most bytes of all budgets at a share of the dense cache.
    pub fn limit(&self, share: f64) -> usize {
        ((share * self.dense as f64) as usize).saturating_sub(self.kept)
    }
}

/// Allocations at every share and every format's knee, for every format; `sizes` counts with one.
pub(super) fn outlook(
    choices: &[Choice],
    candidates: &[usize],
    retrieval_threshold: f64,
    sizes: impl Fn(RowDtype) -> Sizes,
) -> Vec<Outlook> {
    let heads = choices.iter().enumerate();
    let retrieving = heads.filter(|(_, head)| head.retrieval >= retrieval_threshold);
    let retrieving: Vec<usize> = retrieving.map(|(n, _)| n).collect();
    let sizes = ROWS.map(sizes);
    let knees = sizes.each_ref().map(|sizes| sizes.knee(&retrieving));
    let mut shares: Vec<f64> =
        SHARES.into_iter().chain(knees.into_iter().filter_map(recommended)).collect();
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    let of_rows = |(sizes, knee): (Sizes, Option<f64>)| Outlook {
        rows: sizes.rows,
        whole_head_bytes: sizes.whole_head_bytes(),
        knee,
        recommended: recommended(knee),
        points: shares
            .iter()
            .filter_map(|&share| outcome(choices, candidates, retrieval_threshold, &sizes, share))
            .collect(),
    };
    sizes.into_iter().zip(knees).map(of_rows).collect()
}

/// In thousandths, rounded up: what is less would not hold them.
fn recommended(knee: Option<f64>) -> Option<f64> {
    knee.map(|knee| (1e3 * knee).ceil() / 1e3).filter(|&share| share <= 1.0)
}

fn outcome(
    choices: &[Choice],
    candidates: &[usize],
    retrieval_threshold: f64,
    sizes: &Sizes,
    share: f64,
) -> Option<Outcome> {
    let taken = allocate(choices, &sizes.by_head, sizes.limit(share), retrieval_threshold)?;
    let heads = || choices.iter().zip(&taken);
    let whole = candidates.len() - 1;
    let bytes = sizes.by_head.iter().zip(&taken).map(|(bytes, taken)| bytes[taken.candidate]);
    Some(Outcome {
        cache_fraction: share,
        cache_bytes: bytes.sum::<usize>() + sizes.kept,
        whole: heads().filter(|(_, taken)| taken.candidate == whole).count(),
        retrieving: heads().filter(|(_, taken)| taken.retrieves).count(),
        loss: heads().map(|(head, taken)| head.losses[taken.candidate]).sum(),
        budgets: taken.iter().map(|taken| candidates[taken.candidate]).collect(),
    })
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
            Sizes { rows, by_head: vec![by_candidate; 4], kept: 500, dense: 80_000 }
        };
        let candidates = [0, 1, 8, 64];
        let found = outlook(&choices, &candidates, 0.1, sizes);
        assert!(found.iter().map(|found| found.rows).eq(ROWS));
        for Outlook { rows, whole_head_bytes, knee, recommended, points } in found {
            assert_eq!(whole_head_bytes, 63 * rows.row_bytes(64));
            let knee = knee.unwrap();
            let whole = |share| {
                let limit = sizes(rows).limit(share);
                let taken = allocate(&choices, &sizes(rows).by_head, limit, 0.1).unwrap();
                taken.iter().filter(|taken| taken.retrieves).count()
            };
            assert_eq!((whole(knee + 1e-6), whole(knee - 1e-3)), (2, 1), "{rows}");
            // What is recommended is looked at, and is the first share that is enough.
            let recommended = recommended.unwrap();
            assert!(recommended >= knee && recommended < knee + 1e-3, "{recommended} {knee}");
            let enough = points.iter().find(|point| point.retrieving == 2).unwrap();
            assert_eq!(enough.cache_fraction, recommended, "{rows}");
            let whole = enough.budgets.iter().filter(|&&budget| budget == 64).count();
            assert_eq!((whole, enough.budgets.len()), (enough.whole, 4));
            for pair in points.windows(2) {
                assert!(pair[0].retrieving <= pair[1].retrieving, "{rows}");
                assert!(pair[1].cache_bytes as f64 <= pair[1].cache_fraction * 80_000.0);
            }
        }
        let none = outlook(&[head(0.0)], &candidates, 0.1, sizes);
        assert_eq!((none[0].knee, none[0].recommended), (None, None));
    }
}
