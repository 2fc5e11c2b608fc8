//! The state of one sequence and selection head. Chunks retire into it in [`super::retirement`].

use candle_core::{DType, Device, Tensor};

use super::head_input::HeadInput;
use super::key_store::KeyStore;
use super::rows::RowStore;
use crate::Result;
use crate::config::{Router, RowDtype};
use crate::key_exponents::KeyExponents;
use crate::saved_state::SavedState;
use crate::selection::Selection;
use crate::size::{StateBytes, ring_rows};
use still_compute::Real;

/// Names of saved tensors.
pub(crate) const SCORE: &str = "salient_score";
pub(crate) const POSITION: &str = "salient_position";

/// The declared layout: everything one selection head remembers of one sequence.
///
/// | part | size |
/// |---|---|
/// | window ring of K and V rows, slot `position mod 2C`: `r` of `2C`, as many as tokens have needed, in tiles of 16 | `2 · r · D` row values |
/// | router scores of the ring's tokens, or what they are made of so far ([`HeadState::score`]) | `r` floats |
/// | salient K and V rows, in no particular order; those of a head that keeps all, in theirs | `2 · m · D` row values |
/// | score and position of each salient row, under a cap | `m` floats and u32 |
/// | linear state `S` `[2F, D]`, `z` `[2F]` (absent until something is absorbed), `n` | floats |
#[derive(Clone, Debug)]
pub(crate) struct HeadState<T> {
    pub position: usize,
    /// Most rows of the ring, `2C`.
    slots: usize,
    pub ring_k: KeyStore<T>,
    pub ring_v: RowStore<T>,
    pub ring_score: Vec<T>,
    pub salient_k: KeyStore<T>,
    pub salient_v: RowStore<T>,
    /// By salient row, where something asks: a cap or a given selection for what is demoted, a caller for positions.
    pub ranks: Option<Vec<(T, u32)>>,
    pub s: Vec<T>,
    pub z: Vec<T>,
    pub count: usize,
}

impl<T: Real> HeadState<T> {
    /// `ranked`: whether scores and positions of salient rows are kept.
    pub fn new(chunk: usize, head_dim: usize, rows: RowDtype, ranked: bool) -> Self {
        Self {
            position: 0,
            slots: 2 * chunk,
            ring_k: KeyStore::new(head_dim, rows.window()),
            ring_v: RowStore::new(head_dim, rows.window()),
            ring_score: Vec::new(),
            salient_k: KeyStore::new(head_dim, rows),
            salient_v: RowStore::new(head_dim, rows),
            ranks: ranked.then(Vec::new),
            s: Vec::new(),
            z: Vec::new(),
            count: 0,
        }
    }

    /// The same, empty, with salient keys coded by channel ([`HybridConfig::codes_keys_by_channel`](crate::HybridConfig)), and
    /// channels of coded keys scaled by `exponents`.
    #[must_use]
    pub fn coding_keys(self, by_channel: bool, exponents: Option<&KeyExponents>) -> Self {
        let keys = match by_channel {
            true => KeyStore::by_channel(self.salient_k.width()),
            false => self.salient_k,
        };
        Self { salient_k: keys.scaled(exponents), ..self }
    }

    /// Makes the ring large enough for `tokens` more tokens, up to the end of their chunk.
    pub fn grow_ring(&mut self, tokens: usize) {
        let rows = ring_rows(self.position + tokens, self.slots);
        if rows > self.ring_k.len() {
            self.resize_ring(rows);
        }
    }

    fn resize_ring(&mut self, rows: usize) {
        self.ring_k.resize(rows);
        self.ring_v.resize(rows);
        self.ring_score.resize(rows, T::zero());
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.position = 0;
        self.count = 0;
        self.resize_ring(0);
        self.salient_k.truncate(0);
        self.salient_v.truncate(0);
        self.ranks.iter_mut().for_each(Vec::clear);
        self.s.clear();
        self.z.clear();
    }

    /// Puts everything among a state's tensors.
    pub fn save(&self, state: &mut SavedState, part: usize) -> Result<()> {
        let vector = |values: Vec<T>| {
            let length = values.len();
            Tensor::from_vec(values, length, &Device::Cpu)
        };
        state.put_count(part, "position", self.position)?;
        state.put_count(part, "count", self.count)?;
        self.ring_k.save(state, part, "ring_k")?;
        self.ring_v.save(state, part, "ring_v")?;
        state.put(part, "ring_score", vector(self.ring_score.clone())?);
        self.salient_k.save(state, part, "salient_k")?;
        self.salient_v.save(state, part, "salient_v")?;
        if let Some(ranks) = &self.ranks {
            let (scores, positions): (Vec<T>, Vec<u32>) = ranks.iter().copied().unzip();
            let rows = positions.len();
            state.put(part, SCORE, vector(scores)?);
            state.put(part, POSITION, Tensor::from_vec(positions, rows, &Device::Cpu)?);
        }
        state.put(part, "s", vector(self.s.clone())?);
        state.put(part, "z", vector(self.z.clone())?);
        Ok(())
    }

    /// Takes back what [`save`](Self::save) put; `features` is the length of `z` where something was absorbed.
    pub fn restore(&mut self, state: &mut SavedState, part: usize, features: usize) -> Result<()> {
        let width = self.ring_k.width();
        self.clear();
        self.position = state.take_count(part, "position")?;
        self.count = state.take_count(part, "count")?;
        // A state that went back has more rows than it needs, and earlier programs saved every slot.
        let needed = ring_rows(self.position, self.slots);
        let saved = state.rows(part, "ring_k").unwrap_or(needed);
        let rows = if (needed..=self.slots).contains(&saved) { saved } else { needed };
        self.ring_k.restore(state, part, "ring_k", Some(rows))?;
        self.ring_v.restore(state, part, "ring_v", Some(rows))?;
        self.ring_score = state.take(part, "ring_score", T::DTYPE, &[Some(rows)])?.to_vec1()?;
        self.resize_ring(needed);
        self.salient_k.restore(state, part, "salient_k", None)?;
        let rows = Some(self.salient_k.len());
        self.salient_v.restore(state, part, "salient_v", rows)?;
        // Earlier programs saved ranks of every state.
        if self.ranks.is_some() || state.rows(part, SCORE).is_some() {
            let scores = state.take(part, SCORE, T::DTYPE, &[rows])?.to_vec1()?;
            let positions = state.take(part, POSITION, DType::U32, &[rows])?.to_vec1()?;
            if let Some(ranks) = &mut self.ranks {
                *ranks = scores.into_iter().zip(positions).collect();
            }
        }
        // Absent until something is absorbed.
        let features = if self.count > 0 { features } else { 0 };
        self.s = state.take(part, "s", T::DTYPE, &[Some(features * width)])?.to_vec1()?;
        self.z = state.take(part, "z", T::DTYPE, &[Some(features)])?.to_vec1()?;
        Ok(())
    }

    pub fn bytes_by_part(&self) -> StateBytes {
        let [ring_k, salient_k] = [&self.ring_k, &self.salient_k].map(KeyStore::size_bytes);
        let [ring_v, salient_v] = [&self.ring_v, &self.salient_v].map(RowStore::size_bytes);
        let ranks = self.ranks.as_deref().map_or(0, size_of_val);
        StateBytes {
            window_rows: ring_k[0] + ring_v[0],
            kept_rows: salient_k[0] + salient_v[0],
            row_scales: ring_k[1] + ring_v[1] + salient_k[1] + salient_v[1],
            scores: size_of_val(self.ring_score.as_slice()) + ranks,
            linear_states: (self.s.len() + self.z.len()) * size_of::<T>()
                + size_of_val(&self.count),
        }
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
