//! The retirement of a chunk: which of its tokens stay exact, and the linear state with the others in it.
//!
//! All of it can be done when the chunk retires, which is what prefill and training do. Between the single tokens of
//! decoding it is prepared: a router's scores are final long before, so that a few rows a step can be mapped and added
//! to a second state, which then takes the place of the first. No step has to do the work of a whole chunk.

use super::head_input::{HeadInput, Routing};
use super::head_state::HeadState;
use super::query_rows::take;
use super::weighted_sum::{SMALL_BATCH, matmul_small_batch};
use crate::router;
use still_compute::Real;
use still_compute::matmul::{Mat, matmul};
use still_compute::vector;

/// Steps from one part of a preparation to the next: heads take turns, so that rows enter a state in products of several.
const TURN: usize = 8;

/// What the retirement of one chunk will do. Positions and rows are of one selection head.
#[derive(Clone, Debug)]
pub(crate) struct Retirement<T> {
    /// The chunk that it is of, once that is decided.
    chunk: Option<usize>,
    /// Score and position of the chunk's tokens, those that become salient first.
    arrivals: Vec<(T, u32)>,
    /// How many of them become salient.
    kept: usize,
    /// Rows of the salient store that leave it, largest first (so that swap-removal stays valid).
    demoted: Vec<usize>,
    /// Everything that enters the state, in this order.
    absorbed: Vec<Absorbed>,
    /// How many of those are in `s` and `z` already.
    done: usize,
    /// The linear state to come, once `done` is positive.
    s: Vec<T>,
    z: Vec<T>,
    /// Salient tokens and arrivals by score, where there is a cap.
    ranked: Vec<(T, u32)>,
}

/// A row on its way into the linear state.
#[derive(Clone, Copy, Debug)]
struct Absorbed {
    position: u32,
    /// Its row in the salient store; in the ring if absent.
    salient: Option<u32>,
}

/// Memory that rows are gathered and mapped in.
#[derive(Clone, Debug)]
pub(crate) struct Gathered<T> {
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub phi: Vec<T>,
    transposed: Vec<T>,
    pub recalled: Vec<T>,
}

impl<T> Default for Gathered<T> {
    fn default() -> Self {
        Self {
            k: Vec::new(),
            v: Vec::new(),
            phi: Vec::new(),
            transposed: Vec::new(),
            recalled: Vec::new(),
        }
    }
}

impl<T> Default for Retirement<T> {
    fn default() -> Self {
        Self {
            chunk: None,
            arrivals: Vec::new(),
            kept: 0,
            demoted: Vec::new(),
            absorbed: Vec::new(),
            done: 0,
            s: Vec::new(),
            z: Vec::new(),
            ranked: Vec::new(),
        }
    }
}

impl<T: Real> Retirement<T> {
    /// Bytes of the state to come.
    pub fn size_bytes(&self) -> usize {
        (self.s.len() + self.z.len()) * size_of::<T>()
    }
}

impl<T: Real> HeadState<T> {
    /// Retires chunk `now − 2`: called on arrival of the first token of chunk `now ≥ 2`, before its row is written.
    ///
    /// `absorbed_at`, if wanted, is told of every token that enters the state.
    pub fn retire(
        &mut self,
        now: usize,
        input: &HeadInput<'_, T>,
        absorbed_at: Option<&mut [u32]>,
        gathered: &mut Gathered<T>,
    ) {
        self.decide(now - 2, input);
        self.absorb(usize::MAX, self.next.done > 0, input, gathered);
        let mut next = std::mem::take(&mut self.next);
        if next.done > 0 {
            std::mem::swap(&mut self.s, &mut next.s);
            std::mem::swap(&mut self.z, &mut next.z);
        }
        if input.branches.linear {
            self.count += next.absorbed.len();
        }
        for &index in &next.demoted {
            self.salient.swap_remove(index);
            self.salient_k.swap_remove(index);
            self.salient_v.swap_remove(index);
        }
        for &(score, position) in &next.arrivals[..next.kept] {
            let row = self.slot(position, input.chunk);
            let Gathered { k, v, .. } = gathered;
            k.clear();
            v.clear();
            self.ring_k.append_row(row, k);
            self.ring_v.append_row(row, v);
            self.salient_k.push(k);
            self.salient_v.push(v);
            self.salient.push((score, position));
        }
        if let Some(absorbed_at) = absorbed_at {
            for row in &next.absorbed {
                absorbed_at[row.position as usize] = now as u32;
            }
        }
        // Its memory serves the next chunk.
        (next.chunk, next.done) = (None, 0);
        self.next = next;
    }

    /// Does a part of what the next retirement will need; called after each token that came alone.
    pub fn prepare(&mut self, input: &HeadInput<'_, T>, gathered: &mut Gathered<T>) {
        let Routing::Scores { .. } = input.routing else { return };
        let (now, offset) = ((self.position - 1) / input.chunk, (self.position - 1) % input.chunk);
        if now == 0 || !input.router.scores_final_with_chunk() {
            return;
        }
        // A part each `period` steps is done before the chunk is over.
        let period = (input.chunk / TURN).max(1);
        let parts = input.chunk / period;
        let turn = 5 * input.layer + input.head;
        if !(offset + turn).is_multiple_of(period) {
            return;
        }
        if self.next.chunk.is_none() {
            self.decide(now - 1, input);
            self.salient_k.reserve(self.next.kept);
            self.salient_v.reserve(self.next.kept);
            self.salient.reserve(self.next.kept);
        }
        let rows = self.next.absorbed.len().div_ceil(parts);
        self.absorb(rows, true, input, gathered);
    }

    /// Decides which tokens of `chunk` and of the salient ones enter the state, unless that was done.
    fn decide(&mut self, chunk: usize, input: &HeadInput<'_, T>) {
        if self.next.chunk == Some(chunk) {
            return;
        }
        let (first, now) = (chunk * input.chunk, (chunk + 2) as u32);
        let mut next = std::mem::take(&mut self.next);
        next.arrivals.clear();
        next.arrivals.extend(
            (first..first + input.chunk)
                .map(|position| (self.score(position, input), position as u32)),
        );
        next.demoted.clear();
        next.absorbed.clear();
        match input.routing {
            Routing::Scores { budget, cap } => {
                router::rank(&mut next.arrivals);
                next.kept = budget;
                if let Some(cap) = cap {
                    next.demote_beyond(cap, &self.salient);
                }
                next.arrivals[next.kept..].sort_unstable_by_key(|&(_, position)| position);
            }
            Routing::Given(given) => {
                let leaves = |position: u32| given[position as usize] == now;
                next.arrivals.sort_by_key(|&(_, position)| leaves(position));
                next.kept = next.arrivals.partition_point(|&(_, position)| !leaves(position));
                let salient = self.salient.iter().enumerate().rev();
                next.demoted.extend(salient.filter(|(_, s)| leaves(s.1)).map(|(index, _)| index));
            }
        }
        let arrivals = next.arrivals[next.kept..].iter();
        next.absorbed.extend(arrivals.map(|&(_, position)| Absorbed { position, salient: None }));
        next.absorbed.extend(next.demoted.iter().map(|&index| Absorbed {
            position: self.salient[index].1,
            salient: Some(index as u32),
        }));
        (next.chunk, next.done) = (Some(chunk), 0);
        self.next = next;
    }

    /// Adds up to `rows` more rows to the state to come or, if not `ahead`, to the state as it is:
    /// `S += φ(k) vᵀ`, `z += φ(k)`.
    fn absorb(
        &mut self,
        rows: usize,
        ahead: bool,
        input: &HeadInput<'_, T>,
        gathered: &mut Gathered<T>,
    ) {
        let from = self.next.done;
        let rows = rows.min(self.next.absorbed.len() - from);
        if rows == 0 || !input.branches.linear {
            return;
        }
        let Gathered { k, v, phi, transposed, .. } = gathered;
        k.clear();
        v.clear();
        for row in &self.next.absorbed[from..from + rows] {
            match row.salient {
                Some(index) => {
                    self.salient_k.append_row(index as usize, k);
                    self.salient_v.append_row(index as usize, v);
                }
                None => {
                    let slot = self.slot(row.position, input.chunk);
                    self.ring_k.append_row(slot, k);
                    self.ring_v.append_row(slot, v);
                }
            }
        }
        let (features, head_dim) = (input.features.width(), input.head_dim);
        let (s, z) = if ahead {
            let next = &mut self.next;
            if from == 0 {
                next.s.clear();
                next.s.extend_from_slice(&self.s);
                next.z.clear();
                next.z.extend_from_slice(&self.z);
            }
            next.done = from + rows;
            (&mut next.s, &mut next.z)
        } else {
            (&mut self.s, &mut self.z)
        };
        s.resize(features * head_dim, T::zero());
        z.resize(features, T::zero());
        let phi = take(phi, rows * features);
        input.features.of_keys_into(k, head_dim, phi);
        if rows > SMALL_BATCH {
            let phi = Mat::rows(phi, features).t();
            matmul((features, head_dim, rows), s, head_dim, true, phi, Mat::rows(v, head_dim));
        }
        T::vectorize(
            #[inline(always)]
            || {
                phi.chunks_exact(features).for_each(|phi| vector::axpy(z, T::one(), phi));
                if rows <= SMALL_BATCH {
                    let transposed = take(transposed, features * rows);
                    for (row, phi) in phi.chunks_exact(features).enumerate() {
                        for (to, &x) in transposed.iter_mut().skip(row).step_by(rows).zip(phi) {
                            *to = x;
                        }
                    }
                    matmul_small_batch((head_dim, rows), s, head_dim, true, (transposed, rows), v);
                }
            },
        );
    }

    /// Where the ring has a token.
    pub fn slot(&self, position: u32, chunk: usize) -> usize {
        position as usize % (2 * chunk)
    }
}

impl<T: Real> Retirement<T> {
    /// Of the salient tokens and the arrivals to be kept, those beyond the `cap` best enter the state.
    fn demote_beyond(&mut self, cap: usize, salient: &[(T, u32)]) {
        if salient.len() + self.kept <= cap {
            return;
        }
        self.ranked.clear();
        self.ranked.extend_from_slice(salient);
        self.ranked.extend_from_slice(&self.arrivals[..self.kept]);
        let Some(&last) = router::best(&mut self.ranked, cap).last() else {
            self.kept = 0;
            self.demoted.extend((0..salient.len()).rev());
            return;
        };
        let stays = |token: &(T, u32)| router::order(token, &last).is_le();
        // Arrivals are ranked: those that stay are the first.
        self.kept = self.arrivals[..self.kept].partition_point(stays);
        let salient = salient.iter().enumerate().rev();
        self.demoted.extend(salient.filter(|(_, token)| !stays(token)).map(|(index, _)| index));
    }
}
