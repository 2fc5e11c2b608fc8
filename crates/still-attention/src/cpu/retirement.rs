//! The retirement of a chunk: which of its tokens stay exact, and the linear state with the others in it.

use super::head_input::{HeadInput, Routing};
use super::head_state::HeadState;
use super::query_rows::take;
use super::weighted_sum::{SMALL_BATCH, add_outer_products};
use crate::router;
use still_compute::Real;
use still_compute::vector;

/// What one retirement does, and the memory that it is worked in. Positions and rows are of one selection head.
#[derive(Clone, Debug)]
pub(crate) struct Retirement<T> {
    /// Score and position of the chunk's tokens, those that become salient first.
    arrivals: Vec<(T, u32)>,
    /// How many of them become salient.
    kept: usize,
    /// Rows of the salient store that leave it, largest first (so that swap-removal stays valid).
    demoted: Vec<usize>,
    /// Salient tokens and arrivals by score, where there is a cap.
    ranked: Vec<(T, u32)>,
    /// The rows that enter the state.
    pub gathered: Gathered<T>,
}

/// Memory that rows are gathered and mapped in.
#[derive(Clone, Debug)]
pub(crate) struct Gathered<T> {
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub phi: Vec<T>,
    pub recalled: Vec<T>,
}

impl<T> Default for Gathered<T> {
    fn default() -> Self {
        Self { k: Vec::new(), v: Vec::new(), phi: Vec::new(), recalled: Vec::new() }
    }
}

impl<T> Default for Retirement<T> {
    fn default() -> Self {
        Self {
            arrivals: Vec::new(),
            kept: 0,
            demoted: Vec::new(),
            ranked: Vec::new(),
            gathered: Gathered::default(),
        }
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
        retirement: &mut Retirement<T>,
    ) {
        retirement.decide(self, now, input);
        if let Some(absorbed_at) = absorbed_at {
            let arrivals = retirement.arrivals[retirement.kept..].iter();
            let ranks = self.ranks.as_deref().unwrap_or_default();
            let demoted = retirement.demoted.iter().map(|&row| &ranks[row]);
            for &(_, position) in arrivals.chain(demoted) {
                absorbed_at[position as usize] = now as u32;
            }
        }
        if input.branches.linear {
            self.absorb(input, retirement);
        }
        let Retirement { arrivals, kept, demoted, gathered: Gathered { k, v, .. }, .. } =
            retirement;
        for &row in &*demoted {
            self.salient_k.swap_remove(row);
            self.salient_v.swap_remove(row);
            if let Some(ranks) = &mut self.ranks {
                ranks.swap_remove(row);
            }
        }
        self.salient_k.reserve(*kept);
        self.salient_v.reserve(*kept);
        let kept = &mut arrivals[..*kept];
        if kept.len() == input.chunk {
            // Keys of neighbouring tokens may share scales.
            kept.sort_unstable_by_key(|&(_, position)| position);
        }
        k.clear();
        v.clear();
        for &(_, position) in &*kept {
            let slot = self.slot(position, input.chunk);
            self.ring_k.append_row(slot, k);
            self.ring_v.append_row(slot, v);
        }
        self.salient_k.extend(k);
        self.salient_v.extend(v);
        if let Some(ranks) = &mut self.ranks {
            ranks.extend_from_slice(kept);
        }
    }

    /// Adds what leaves the exact rows to the linear state: `S += φ(k) vᵀ`, `z += φ(k)`, `n += 1`.
    fn absorb(&mut self, input: &HeadInput<'_, T>, retirement: &mut Retirement<T>) {
        let Retirement { arrivals, kept, demoted, gathered, .. } = retirement;
        let Gathered { k, v, phi, .. } = gathered;
        let arrivals = &arrivals[*kept..];
        let rows = arrivals.len() + demoted.len();
        if rows == 0 {
            return;
        }
        k.clear();
        v.clear();
        for &(_, position) in arrivals {
            let slot = self.slot(position, input.chunk);
            self.ring_k.append_row(slot, k);
            self.ring_v.append_row(slot, v);
        }
        for &row in &*demoted {
            self.salient_k.append_row(row, k);
            self.salient_v.append_row(row, v);
        }
        let (features, head_dim) = (input.features.width(), input.head_dim);
        let phi = take(phi, rows * features);
        // As small batches, whose products take no memory.
        let batches = k.chunks(SMALL_BATCH * head_dim).zip(phi.chunks_mut(SMALL_BATCH * features));
        batches.for_each(|(k, phi)| input.features.of_keys_into(k, head_dim, phi));
        // Absent until something is absorbed.
        self.s.resize(features * head_dim, T::zero());
        self.z.resize(features, T::zero());
        add_outer_products(&mut self.s, (phi, features), (v, head_dim));
        let z = &mut self.z;
        T::vectorize(
            #[inline(always)]
            || phi.chunks_exact(features).for_each(|phi| vector::axpy(z, T::one(), phi)),
        );
        self.count += rows;
    }

    /// Where the ring has a token.
    pub fn slot(&self, position: u32, chunk: usize) -> usize {
        position as usize % (2 * chunk)
    }
}

impl<T: Real> Retirement<T> {
    /// Takes the memory that retiring a chunk of this head needs, so that a thread has it before a chunk retires.
    pub fn reserve(&mut self, state: &HeadState<T>, input: &HeadInput<'_, T>) {
        let Routing::Scores { budget, cap } = input.routing else { return };
        let at_least = |held: usize, needed: usize| needed.saturating_sub(held);
        let Gathered { k, v, phi, .. } = &mut self.gathered;
        // As many tokens enter the state as leave the ring and do not add to the salient ones.
        let rows = input.chunk;
        for (buffer, width) in
            [(k, input.head_dim), (v, input.head_dim), (phi, input.features.width())]
        {
            buffer.reserve(at_least(buffer.len(), rows * width));
        }
        self.arrivals.reserve(at_least(self.arrivals.len(), rows));
        if let (Some(_), Some(ranks)) = (cap, &state.ranks) {
            self.demoted.reserve(at_least(self.demoted.len(), budget));
            self.ranked.reserve(at_least(self.ranked.len(), ranks.len() + budget));
        }
    }

    /// Decides which tokens of chunk `now − 2` stay exact, and which salient ones do no longer.
    fn decide(&mut self, state: &HeadState<T>, now: usize, input: &HeadInput<'_, T>) {
        let first = (now - 2) * input.chunk;
        let tokens = first..first + input.chunk;
        self.arrivals.clear();
        self.arrivals
            .extend(tokens.map(|position| (state.score(position, input), position as u32)));
        self.demoted.clear();
        let ranks = state.ranks.as_deref();
        match input.routing {
            Routing::Scores { budget, cap } => {
                router::rank(&mut self.arrivals);
                self.kept = budget;
                if let Some(cap) = cap {
                    self.demote_beyond(cap, ranks.expect("a state under a cap has ranks"));
                }
                self.arrivals[self.kept..].sort_unstable_by_key(|&(_, position)| position);
            }
            Routing::Given(given) => {
                let leaves = |position: u32| given[position as usize] == now as u32;
                self.arrivals.sort_by_key(|&(_, position)| leaves(position));
                self.kept = self.arrivals.partition_point(|&(_, position)| !leaves(position));
                let ranks = ranks.expect("a state of a given selection has ranks");
                let rows = ranks.iter().enumerate().rev();
                self.demoted.extend(rows.filter(|(_, rank)| leaves(rank.1)).map(|(row, _)| row));
            }
        }
    }

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
        self.demoted.extend(salient.filter(|(_, token)| !stays(token)).map(|(row, _)| row));
    }
}
