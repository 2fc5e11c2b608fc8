//! The state as tensors on the host, the same that a state of the CPU saves, and back.

use candle_core::{DType, Device, Tensor};

use super::super::saved_channels;
use super::super::saved_rows::DeviceRows;
use super::super::store::{self, Coding};
use super::{CudaHybridState, GraphState, RING, RING_K, RING_SCORE, RING_V, S, Z, kept, retired};
use crate::attention_state::check_truncate;
use crate::cpu::head_state::{POSITION, SCORE};
use crate::size::ring_rows;
use crate::{AttentionError, Result, RowDtype, SavedState};
use still_kernels::{CHUNK, STILL_INT4};

/// A layer's buffers in the host's memory, one after the other as on the device.
struct Buffers {
    ring_k: Vec<u8>,
    ring_v: Vec<u8>,
    ring_score: Vec<f32>,
    store_k: Vec<u8>,
    store_v: Vec<u8>,
    ranks: Option<(Vec<f32>, Vec<i32>)>,
    s: Vec<f32>,
    z: Vec<f32>,
}

const SALIENT_K: &str = "salient_k";

/// Where a head's part of the buffers is.
struct Part {
    /// Among the heads of all sequences.
    index: usize,
    position: usize,
    /// Its first row in the store, and how many there are.
    first: usize,
    kept: usize,
    /// Tokens in the linear state.
    count: usize,
    /// Whether salient keys are coded by channel.
    by_channel: bool,
}

impl CudaHybridState {
    /// How rows of the window lie.
    fn ring_coding(&self) -> Coding {
        let bytes = self.weights.dtype.size_in_bytes();
        Coding::new(RowDtype::F32, self.weights.geometry.head_dim, bytes)
    }

    /// The parts of sequences at `positions`, in order.
    fn saved_parts(&self, positions: &[usize]) -> Vec<Part> {
        let heads = self.weights.heads();
        let starts = self.store.starts(&self.weights.host_budgets);
        let (config, d) = (&self.weights.config, self.weights.geometry.head_dim);
        let in_four_bits = self.store.kind() == STILL_INT4;
        let part = |index: usize| {
            let (sequence, head) = (index / heads, index % heads);
            let position = positions[sequence];
            let budget = self.weights.host_budgets[head];
            Part {
                index,
                position,
                first: sequence * self.store.rows + starts[head],
                kept: kept(self.weights.config.cap, budget, retired(position)),
                count: self.absorbed(position, head),
                by_channel: in_four_bits && config.codes_keys_by_channel(d, head, RowDtype::Int4),
            }
        };
        (0..positions.len() * heads).map(part).collect()
    }

    /// See [`crate::AttentionState::save`].
    pub(super) fn saved(&self) -> Result<SavedState> {
        let device = &self.weights.device;
        let d = self.weights.geometry.head_dim;
        let (held, stored) = (&self.held, &self.store.held);
        let ranks = match self.store.is_ranked() {
            true => Some((
                stored.read_all(device, store::SCORE)?,
                stored.read_all(device, store::TOKEN)?,
            )),
            false => None,
        };
        let buffers = Buffers {
            ring_k: held.read_all(device, RING_K)?,
            ring_v: held.read_all(device, RING_V)?,
            ring_score: held.read_all(device, RING_SCORE)?,
            store_k: stored.read_all(device, store::K)?,
            store_v: stored.read_all(device, store::V)?,
            ranks,
            s: held.read_all(device, S)?,
            z: held.read_all(device, Z)?,
        };
        let mut saved = SavedState::default();
        for part in self.saved_parts(&self.positions) {
            self.save_part(&buffers, &part, d, &mut saved)?;
        }
        Ok(saved)
    }

    fn save_part(
        &self,
        from: &Buffers,
        part: &Part,
        d: usize,
        saved: &mut SavedState,
    ) -> Result<()> {
        let &Part { index, position, first, kept, count, by_channel } = part;
        saved.put_count(index, "position", position)?;
        saved.put_count(index, "count", count)?;
        // Rows that no token has are zeros.
        let slots = ring_rows(position, RING);
        let mut there = [false; RING];
        (retired(position) * CHUNK..position).for_each(|token| there[token % RING] = true);
        let (ring, row) = (self.ring_coding(), d * self.weights.dtype.size_in_bytes());
        for (name, rows) in [("ring_k", &from.ring_k), ("ring_v", &from.ring_v)] {
            let mut rows = rows[index * RING * row..(index * RING + slots) * row].to_vec();
            let all = rows.chunks_exact_mut(row).zip(there);
            all.filter(|(_, there)| !there).for_each(|(row, _)| row.fill(0));
            ring.save(&DeviceRows { values: &rows[..], scales: &[] }, saved, index, name)?;
        }
        let scores = from.ring_score[index * RING..index * RING + slots].iter().zip(there);
        let scores = scores.map(|(&score, there)| if there { score } else { 0.0 });
        saved.put(index, "ring_score", vector(scores.collect())?);
        for (name, rows) in [(SALIENT_K, &from.store_k), ("salient_v", &from.store_v)] {
            let [values, scales] = self.store.places(self.positions.len(), first, kept);
            let rows = DeviceRows { values: &rows[values], scales: &rows[scales] };
            let coding = self.store.coding();
            match by_channel && name == SALIENT_K {
                true => saved_channels::save(&coding, &rows, saved, index, name)?,
                false => coding.save(&rows, saved, index, name)?,
            }
        }
        if let Some((scores, tokens)) = &from.ranks {
            saved.put(index, SCORE, vector(scores[first..first + kept].to_vec())?);
            let tokens = tokens[first..first + kept].iter().map(|&token| token as u32);
            let tokens: Vec<u32> = tokens.collect();
            saved.put(index, POSITION, Tensor::from_vec(tokens, kept, &Device::Cpu)?);
        }
        // Absent until something is absorbed.
        let features = if count > 0 { 2 * d } else { 0 };
        let at = index * 2 * d;
        saved.put(index, "s", vector(from.s[at * d..(at + features) * d].to_vec())?);
        saved.put(index, "z", vector(from.z[at..at + features].to_vec())?);
        Ok(())
    }

    /// See [`crate::AttentionState::restore`].
    pub(super) fn restore_saved(&mut self, mut saved: SavedState) -> Result<()> {
        let (heads, d) = (self.weights.heads(), self.weights.geometry.head_dim);
        let mut positions = Vec::with_capacity(self.positions.len());
        for index in 0..self.positions.len() * heads {
            let position = saved.take_count(index, "position")?;
            // Heads of a sequence have read equally many.
            if index % heads == 0 {
                positions.push(position);
            } else if positions.last() != Some(&position) {
                return Err(AttentionError::Config(format!(
                    "a saved state's part {index} has read {position} tokens, and the one before it not"
                )));
            }
        }
        for (index, &position) in
            positions.iter().flat_map(|p| std::iter::repeat_n(p, heads)).enumerate()
        {
            let budget = self.weights.host_budgets[index % heads];
            let expected = kept(self.weights.config.cap, budget, retired(position));
            let has = saved.rows(index, SALIENT_K);
            if has != Some(expected) {
                return Err(AttentionError::Config(format!(
                    "a saved state's part {index} keeps {} salient tokens, and this state's would keep {expected}",
                    has.unwrap_or(0)
                )));
            }
        }
        // Nothing that is there need move.
        self.positions.fill(0);
        self.reserve(positions.iter().copied().max().unwrap_or(0))?;
        let store_rows = self.positions.len() * self.store.rows;
        let (held, stored) = (&self.held, &self.store.held);
        let floats = |array| vec![0.0_f32; held.bytes(array) / size_of::<f32>()];
        let ranked = self.store.is_ranked();
        let mut buffers = Buffers {
            ring_k: vec![0; held.bytes(RING_K)],
            ring_v: vec![0; held.bytes(RING_V)],
            ring_score: floats(RING_SCORE),
            store_k: vec![0; stored.bytes(store::K)],
            store_v: vec![0; stored.bytes(store::V)],
            ranks: ranked.then(|| (vec![0.0; store_rows], vec![0; store_rows])),
            s: floats(S),
            z: floats(Z),
        };
        for part in self.saved_parts(&positions) {
            self.restore_part(&mut saved, &part, d, &mut buffers)?;
        }
        saved.check_all_taken()?;
        let device = self.weights.device.clone();
        let (held, stored) = (&mut self.held, &mut self.store.held);
        held.write(&device, RING_K, &buffers.ring_k)?;
        held.write(&device, RING_V, &buffers.ring_v)?;
        held.write(&device, RING_SCORE, &buffers.ring_score)?;
        held.write(&device, S, &buffers.s)?;
        held.write(&device, Z, &buffers.z)?;
        stored.write(&device, store::K, &buffers.store_k)?;
        stored.write(&device, store::V, &buffers.store_v)?;
        if let Some((scores, tokens)) = &buffers.ranks {
            stored.write(&device, store::SCORE, scores)?;
            stored.write(&device, store::TOKEN, tokens)?;
        }
        self.positions = positions;
        Ok(())
    }

    fn restore_part(
        &self,
        saved: &mut SavedState,
        part: &Part,
        d: usize,
        to: &mut Buffers,
    ) -> Result<()> {
        let &Part { index, position, first, kept, count, by_channel } = part;
        let has = saved.take_count(index, "count")?;
        if has != count {
            return Err(AttentionError::Config(format!(
                "a saved state's part {index} has {has} tokens in its linear state, and this state's would have {count}"
            )));
        }
        // A state that went back has more rows than it needs, and earlier programs saved every slot.
        let needed = ring_rows(position, RING);
        let slots = saved.rows(index, "ring_k").unwrap_or(needed);
        let slots = if (needed..=RING).contains(&slots) { slots } else { needed };
        let (ring, row) = (self.ring_coding(), d * self.weights.dtype.size_in_bytes());
        for (name, to) in [("ring_k", &mut to.ring_k), ("ring_v", &mut to.ring_v)] {
            let values = &mut to[index * RING * row..(index + 1) * RING * row];
            let mut to = DeviceRows { values, scales: &mut [] };
            ring.restore(saved, (index, name), slots, &mut to)?;
        }
        let scores: Vec<f32> =
            saved.take(index, "ring_score", DType::F32, &[Some(slots)])?.to_vec1()?;
        to.ring_score[index * RING..index * RING + slots].copy_from_slice(&scores);
        for (name, to) in [(SALIENT_K, &mut to.store_k), ("salient_v", &mut to.store_v)] {
            let [values, scales] = self.store.places(self.positions.len(), first, kept);
            // Scales lie behind all values.
            let (before, behind) = to.split_at_mut(values.end);
            let scales = scales.start - values.end..scales.end - values.end;
            let mut to =
                DeviceRows { values: &mut before[values.start..], scales: &mut behind[scales] };
            let coding = self.store.coding();
            match by_channel && name == SALIENT_K {
                true => saved_channels::restore(&coding, saved, (index, name), kept, &mut to)?,
                false => coding.restore(saved, (index, name), kept, &mut to)?,
            }
        }
        // Earlier programs saved ranks of every state.
        if to.ranks.is_some() || saved.rows(index, SCORE).is_some() {
            let scores: Vec<f32> =
                saved.take(index, SCORE, DType::F32, &[Some(kept)])?.to_vec1()?;
            let tokens: Vec<u32> =
                saved.take(index, POSITION, DType::U32, &[Some(kept)])?.to_vec1()?;
            if let Some((all_scores, all_tokens)) = &mut to.ranks {
                all_scores[first..first + kept].copy_from_slice(&scores);
                let places = all_tokens[first..first + kept].iter_mut();
                places.zip(tokens).for_each(|(to, token)| *to = token as i32);
            }
        }
        let features = if count > 0 { 2 * d } else { 0 };
        let s: Vec<f32> = saved.take(index, "s", DType::F32, &[Some(features * d)])?.to_vec1()?;
        let z: Vec<f32> = saved.take(index, "z", DType::F32, &[Some(features)])?.to_vec1()?;
        let at = index * 2 * d;
        to.s[at * d..(at + features) * d].copy_from_slice(&s);
        to.z[at..at + features].copy_from_slice(&z);
        Ok(())
    }

    /// See [`crate::AttentionState::truncate`].
    pub(super) fn go_back(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        check_truncate(&self.weights.config, self.positions[sequence], tokens)?;
        if tokens == 0 {
            let (device, d) = (self.weights.device.clone(), self.weights.geometry.head_dim);
            let features = self.weights.heads() * 2 * d;
            let own = sequence * features..(sequence + 1) * features;
            self.held.clear::<f32>(&device, S, own.start * d..own.end * d)?;
            self.held.clear::<f32>(&device, Z, own)?;
        }
        self.positions[sequence] = tokens;
        Ok(())
    }
}

fn vector(values: Vec<f32>) -> candle_core::Result<Tensor> {
    let length = values.len();
    Tensor::from_vec(values, length, &Device::Cpu)
}
