//! What a call has besides its input and output: what it may be asked to tell, and the memory that it works in.

use std::ops::Range;

use super::head_input::HeadInput;
use super::head_state::HeadState;
use super::query_rows::Buffers;
use super::retirement::Retirement;
use still_compute::Real;

/// Tokens of a segment from which its query heads are worth running on several threads.
pub(super) const PARALLEL_TOKENS: usize = 16;

/// What a call may be asked to tell besides its output.
#[derive(Debug, Default)]
pub(crate) struct Record<'a, T> {
    /// `Selection::absorbed_at` by absolute position.
    pub absorbed_at: Option<&'a mut [u32]>,
    /// Router score by token of the call; of those still in the window, by the tokens so far.
    pub scores: Option<&'a mut [T]>,
}

impl<T: Real> Record<'_, T> {
    /// Takes down the scores of `positions`, all of the window, in a call whose first token was at `first`.
    pub fn take_scores(
        &mut self,
        positions: Range<usize>,
        first: usize,
        state: &HeadState<T>,
        input: &HeadInput<'_, T>,
    ) {
        let Some(scores) = self.scores.as_deref_mut() else { return };
        for position in positions.start.max(first)..positions.end {
            scores[position - first] = state.score(position, input);
        }
    }
}

/// Memory that segments are worked in. A thread keeps one for all its heads: it then stays in that thread's cache.
#[derive(Clone, Debug)]
pub(crate) struct Scratch<T> {
    /// One for all query heads, or one for each.
    pub(super) buffers: Vec<Buffers<T>>,
    /// Widened rows: K and V of the previous chunk, the current one and the salient tokens.
    pub(super) rows: [Vec<T>; 6],
    /// What the query heads add to scores, by head: see [`super::query_rows::query_rows`].
    pub(super) scores: Vec<T>,
    pub(super) retirement: Retirement<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            buffers: Vec::new(),
            rows: Default::default(),
            scores: Vec::new(),
            retirement: Retirement::default(),
        }
    }
}
