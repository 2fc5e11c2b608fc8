//! The state of one sequence and selection head, and the retirement of chunks into it.

use super::forward::HeadInput;
use super::key_store::KeyStore;
use super::linalg::{Mat, matmul};
use super::rows::RowStore;
use crate::config::RowDtype;
use crate::real::Real;
use crate::selection::Selection;
use crate::{router, vector};

/// The declared layout: everything one selection head remembers of one sequence.
///
/// | part | size |
/// |---|---|
/// | window ring of K and V rows, slot `position mod 2C` | `2 · 2C · D` row values |
/// | router scores of the ring's tokens, or what they are made of so far ([`HeadState::score`]) | `2C` floats |
/// | salient K and V rows, in no particular order | `2 · m · D` row values |
/// | score and position of each salient row | `m` floats and u32 |
/// | linear state `S` `[2F, D]`, `z` `[2F]` (absent until something is absorbed), `n` | floats |
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
        }
    }

    pub fn size_bytes(&self) -> usize {
        let keys = [&self.ring_k, &self.salient_k].map(KeyStore::size_bytes);
        let values = [&self.ring_v, &self.salient_v].map(RowStore::size_bytes);
        let floats = self.ring_score.len() + self.s.len() + self.z.len();
        keys.iter().chain(&values).sum::<usize>()
            + floats * size_of::<T>()
            + self.salient.len() * size_of::<(T, u32)>()
            + size_of_val(&self.count)
    }

    /// Retires chunk `now − 2`: called on arrival of the first token of chunk `now ≥ 2`, before its row is written.
    ///
    /// `absorbed_at`, if wanted, is told of every token that enters the state.
    pub fn retire(
        &mut self,
        now: usize,
        input: &HeadInput<'_, T>,
        absorbed_at: Option<&mut [u32]>,
    ) {
        let chunk = input.chunk;
        let first = (now - 2) * chunk;
        let slot = |position: usize| position % (2 * chunk);
        let mut arrivals: Vec<(T, u32)> = (first..first + chunk)
            .map(|position| (self.score(position, input), position as u32))
            .collect();

        let kept = match input.routing {
            Routing::Scores { budget, .. } => {
                router::rank(&mut arrivals);
                arrivals[budget..].sort_by_key(|&(_, position)| position);
                budget
            }
            Routing::Given(given) => {
                arrivals.sort_by_key(|&(_, position)| given[position as usize] == now as u32);
                arrivals.partition_point(|&(_, position)| given[position as usize] != now as u32)
            }
        };
        let mut row = Vec::with_capacity(input.head_dim);
        for &(score, position) in &arrivals[..kept] {
            row.clear();
            self.ring_k.append_row(slot(position as usize), &mut row);
            self.salient_k.push(&row);
            row.clear();
            self.ring_v.append_row(slot(position as usize), &mut row);
            self.salient_v.push(&row);
            self.salient.push((score, position));
        }

        let mut absorbed = Absorbed::default();
        for &(_, position) in &arrivals[kept..] {
            absorbed.push(&self.ring_k, &self.ring_v, slot(position as usize), position);
        }
        for index in self.demotions(now, input.routing) {
            let (_, position) = self.salient.swap_remove(index);
            absorbed.push(&self.salient_k, &self.salient_v, index, position);
            self.salient_k.swap_remove(index);
            self.salient_v.swap_remove(index);
        }
        if let Some(absorbed_at) = absorbed_at {
            for &position in &absorbed.positions {
                absorbed_at[position as usize] = now as u32;
            }
        }
        if input.branches.linear {
            self.absorb(&absorbed, input);
        }
    }

    /// Router score of a token of the window, by the tokens so far.
    ///
    /// Where later tokens have a say, the ring holds the sum of what they gave, and this is their mean (0 of none).
    pub fn score(&self, position: usize, input: &HeadInput<'_, T>) -> T {
        let stored = self.ring_score[position % (2 * input.chunk)];
        if input.router.scores_final_with_chunk() {
            return stored;
        }
        let seen_until = self.position.min((position / input.chunk + 2) * input.chunk);
        let queries = seen_until.saturating_sub(position + 1) * input.q.len();
        stored / T::of(queries.max(1) as f64)
    }

    /// Indices into the salient rows that leave it now, largest first (so that swap-removal stays valid).
    fn demotions(&self, now: usize, routing: Routing<'_>) -> Vec<usize> {
        let mut leaving: Vec<usize> = match routing {
            Routing::Scores { cap: Some(cap), .. } if self.salient.len() > cap => {
                let mut ranked = self.salient.clone();
                router::rank(&mut ranked);
                let out: Vec<u32> = ranked[cap..].iter().map(|&(_, position)| position).collect();
                (0..self.salient.len()).filter(|&i| out.contains(&self.salient[i].1)).collect()
            }
            Routing::Scores { .. } => Vec::new(),
            Routing::Given(given) => (0..self.salient.len())
                .filter(|&i| given[self.salient[i].1 as usize] == now as u32)
                .collect(),
        };
        leaving.reverse();
        leaving
    }

    /// `S += φ(k) vᵀ`, `z += φ(k)`, `n += 1` for each absorbed row.
    fn absorb(&mut self, absorbed: &Absorbed<T>, input: &HeadInput<'_, T>) {
        let rows = absorbed.positions.len();
        if rows == 0 {
            return;
        }
        let (features, head_dim) = (input.features.width(), input.head_dim);
        if self.s.is_empty() {
            self.s = vec![T::zero(); features * head_dim];
            self.z = vec![T::zero(); features];
        }
        let phi = input.features.of_keys(&absorbed.k, head_dim);
        matmul(
            (features, head_dim, rows),
            &mut self.s,
            head_dim,
            true,
            Mat::rows(&phi, features).t(),
            Mat::rows(&absorbed.v, head_dim),
        );
        phi.chunks_exact(features).for_each(|phi| vector::axpy(&mut self.z, T::one(), phi));
        self.count += rows;
    }
}

/// Rows on their way into the linear state.
#[derive(Debug)]
struct Absorbed<T> {
    positions: Vec<u32>,
    k: Vec<T>,
    v: Vec<T>,
}

impl<T> Default for Absorbed<T> {
    fn default() -> Self {
        Self { positions: Vec::new(), k: Vec::new(), v: Vec::new() }
    }
}

impl<T: Real> Absorbed<T> {
    fn push(&mut self, k: &KeyStore<T>, v: &RowStore<T>, index: usize, position: u32) {
        k.append_row(index, &mut self.k);
        v.append_row(index, &mut self.v);
        self.positions.push(position);
    }
}

/// A row of [`Selection::absorbed_at`] to be filled by [`HeadState::retire`].
pub(crate) fn unabsorbed(tokens: usize) -> Vec<u32> {
    vec![Selection::NEVER; tokens]
}
