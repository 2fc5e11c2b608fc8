//! The state of one sequence and selection head. Chunks retire into it in [`super::retirement`].

use super::forward::HeadInput;
use super::key_store::KeyStore;
use super::retirement::Retirement;
use super::rows::RowStore;
use crate::config::{Router, RowDtype};
use crate::selection::Selection;
use still_compute::Real;

/// The declared layout: everything one selection head remembers of one sequence.
///
/// | part | size |
/// |---|---|
/// | window ring of K and V rows, slot `position mod 2C` | `2 · 2C · D` row values |
/// | router scores of the ring's tokens, or what they are made of so far ([`HeadState::score`]) | `2C` floats |
/// | salient K and V rows, in no particular order | `2 · m · D` row values |
/// | score and position of each salient row | `m` floats and u32 |
/// | linear state `S` `[2F, D]`, `z` `[2F]` (absent until something is absorbed), `n` | floats |
/// | while decoding, the linear state after the next retirement, as far as it has been prepared | the same |
#[derive(Clone, Debug)]
pub(crate) struct HeadState<T> {
    pub position: usize,
    pub ring_k: KeyStore<T>,
    pub ring_v: RowStore<T>,
    pub ring_score: Vec<T>,
    pub salient_k: KeyStore<T>,
    pub salient_v: RowStore<T>,
    pub salient: Vec<(T, u32)>,
    pub s: Vec<T>,
    pub z: Vec<T>,
    pub count: usize,
    pub next: Retirement<T>,
}

/// How a retiring chunk is split.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Routing<'a> {
    /// By the router's scores.
    Scores { budget: usize, cap: Option<usize> },
    /// As given: `absorbed_at` of every token (see [`Selection`]).
    Given(&'a [u32]),
}

impl<T: Real> HeadState<T> {
    pub fn new(chunk: usize, head_dim: usize, rows: RowDtype) -> Self {
        Self {
            position: 0,
            ring_k: KeyStore::zeros(head_dim, 2 * chunk, rows.window()),
            ring_v: RowStore::zeros(head_dim, 2 * chunk, rows.window()),
            ring_score: vec![T::zero(); 2 * chunk],
            salient_k: KeyStore::new(head_dim, rows),
            salient_v: RowStore::new(head_dim, rows),
            salient: Vec::new(),
            s: Vec::new(),
            z: Vec::new(),
            count: 0,
            next: Retirement::default(),
        }
    }

    pub fn size_bytes(&self) -> usize {
        let keys = [&self.ring_k, &self.salient_k].map(KeyStore::size_bytes);
        let values = [&self.ring_v, &self.salient_v].map(RowStore::size_bytes);
        let floats = self.ring_score.len() + self.s.len() + self.z.len();
        keys.iter().chain(&values).sum::<usize>()
            + floats * size_of::<T>()
            + self.salient.len() * size_of::<(T, u32)>()
            + self.next.size_bytes()
            + size_of_val(&self.count)
    }

    /// Router score of a token of the window, by the tokens so far.
    ///
    /// Where later tokens have a say, the ring holds the sum of what they gave, and this is their mean (0 of none). Where
    /// the state has, this is 0 until the token's chunk retires.
    pub fn score(&self, position: usize, input: &HeadInput<'_, T>) -> T {
        let stored = self.ring_score[position % (2 * input.chunk)];
        if input.router != Router::ReceivedAttention {
            return stored;
        }
        let seen_until = self.position.min((position / input.chunk + 2) * input.chunk);
        let queries = seen_until.saturating_sub(position + 1) * input.q.len();
        stored / T::of(queries.max(1) as f64)
    }
}

/// A row of [`Selection::absorbed_at`] to be filled when chunks retire.
pub(crate) fn unabsorbed(tokens: usize) -> Vec<u32> {
    vec![Selection::NEVER; tokens]
}
