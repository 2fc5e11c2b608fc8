//! Steps of sequences that have a state each. A table on the device says where each state lies. So a step of all of them is one
//! launch, and a step that was captured is one of whoever is in the table.

use std::ptr::{null, null_mut};
use std::sync::Arc;

use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, DType, Device, Tensor};
use still_compute::cuda::{Launch, StepMemory};
use still_kernels::dense::DenseSequence;
use still_kernels::{Decode, NO_CAP, Rows, STILL_PLAIN, SequenceState};

use super::decode::step::{StepState, splits};
use super::dense::StepRows;
use super::graph_state::{GraphState, GraphStep, StepRotation};
use super::kv_cache::{self, CudaKvCache};
use super::layout::{router, uninit};
use super::support;
use super::{CudaHybridState, CudaWeights};
use crate::attention_state::without_gate;
use crate::{AttentionError, AttentionRows, HeadGeometry, Result};

/// A state that may be in a [`StepTable`].
#[derive(Clone, Copy, Debug)]
pub enum TableState<'a> {
    /// Of hybrid attention.
    Hybrid(&'a CudaHybridState),
    /// Of dense attention.
    Dense(&'a CudaKvCache),
}

/// The steps of one layer of up to so many sequences, which have a state each.
#[derive(Debug)]
pub struct StepTable {
    rows: usize,
    layer: Layer,
    table: Table,
}

/// What the states of a layer have in common, and what a step needs besides them.
#[derive(Debug)]
enum Layer {
    Hybrid(HybridLayer),
    Dense {
        geometry: HeadGeometry,
        dtype: DType,
        coding: i32,
        /// `[B, H]`, zeros between steps.
        arrived: CudaSlice<u32>,
    },
}

#[derive(Debug)]
struct HybridLayer {
    weights: Arc<CudaWeights>,
    coding: i32,
    splits: i32,
    /// `[B, S]`: under a cap, what a retirement's two kernels tell each other.
    admitted: CudaSlice<u64>,
    /// `[B, S]`, zeros between steps.
    arrived: CudaSlice<u32>,
}

/// The states of a step of hybrid attention.
struct Hybrid<'t> {
    rows: usize,
    layer: &'t HybridLayer,
    table: &'t CudaSlice<u64>,
}

/// Where states lie: addresses and sizes of 64 bits.
#[derive(Debug)]
struct Table {
    device: CudaDevice,
    on_device: CudaSlice<u64>,
    on_host: Vec<u64>,
    /// The states' memory: as long as this is held, no other has its address.
    memory: Vec<Arc<()>>,
}

impl StepTable {
    /// An empty table of `rows` sequences with states like this one.
    ///
    /// # Errors
    /// No sequence; no memory left on the device.
    pub fn new(like: &dyn GraphState, rows: usize) -> Result<Self> {
        if rows == 0 {
            return Err(AttentionError::Config("a table of states has one row or more".into()));
        }
        let (device, layer, entry) = match like.in_table() {
            TableState::Hybrid(state) => {
                let (weights, coding) = (state.weights().clone(), state.coding());
                let device = weights.device().clone();
                let heads = rows * weights.heads();
                let layer = HybridLayer {
                    coding,
                    splits: splits(heads, coding != STILL_PLAIN),
                    admitted: uninit(&device, heads)?,
                    arrived: device.alloc_zeros(heads)?,
                    weights,
                };
                (device, Layer::Hybrid(layer), size_of::<SequenceState>())
            }
            TableState::Dense(cache) => {
                let (geometry, dtype, coding) = (cache.geometry(), cache.dtype(), cache.coding());
                let Device::Cuda(device) = cache.device().clone() else {
                    return Err(AttentionError::Config("a table of states is on CUDA".into()));
                };
                let arrived = device.alloc_zeros(rows * geometry.num_heads)?;
                let layer = Layer::Dense { geometry, dtype, coding, arrived };
                (device, layer, size_of::<DenseSequence>())
            }
        };
        let on_device = uninit(&device, rows * entry / size_of::<u64>())?;
        let table = Table { device, on_device, on_host: Vec::new(), memory: Vec::new() };
        Ok(Self { rows, layer, table })
    }

    /// Whether a state can be in it.
    pub fn takes(&self, state: &dyn GraphState) -> bool {
        self.layer.fits(state.in_table())
    }

    /// Puts states of one sequence each in the first rows. What lies where it did before is not looked at again.
    ///
    /// # Errors
    /// More states than rows; a state that is not like that of [`new`](Self::new); an error of the device.
    pub fn place<'a>(
        &mut self,
        states: impl ExactSizeIterator<Item = &'a dyn GraphState>,
    ) -> Result<()> {
        let placed = self.place_moved(states);
        if placed.is_err() {
            // Nobody knows what the device has.
            self.table.memory.clear();
        }
        placed
    }

    fn place_moved<'a>(
        &mut self,
        states: impl ExactSizeIterator<Item = &'a dyn GraphState>,
    ) -> Result<()> {
        if states.len() > self.rows {
            let (states, rows) = (states.len(), self.rows);
            return Err(AttentionError::Config(format!("{states} states for a table of {rows}")));
        }
        let Table { device, on_device, on_host, memory } = &mut self.table;
        let mut moved = false;
        for (row, state) in states.enumerate() {
            let state = state.in_table();
            let own = state.memory();
            if memory.get(row).is_some_and(|there| Arc::ptr_eq(there, own)) {
                continue;
            }
            if !self.layer.fits(state) {
                let what = "states of a step are of one sequence each, of one layer and row format";
                return Err(AttentionError::Config(what.into()));
            }
            let entry = state.entry()?;
            let at = row * entry.len();
            on_host.resize(on_host.len().max(at + entry.len()), 0);
            on_host[at..at + entry.len()].copy_from_slice(&entry);
            match memory.get_mut(row) {
                Some(there) => *there = own.clone(),
                None => memory.push(own.clone()),
            }
            moved = true;
        }
        if moved {
            device.memcpy_htod(&on_host[..], &mut on_device.slice_mut(..on_host.len()))?;
        }
        Ok(())
    }
}

/// Row `i` of a step is that of the state in row `i`.
impl GraphStep for StepTable {
    unsafe fn step(
        &self,
        rows: AttentionRows<'_>,
        positions: &Tensor,
        rotation: Option<StepRotation<'_>>,
        memory: &StepMemory,
    ) -> Result<Tensor> {
        match &self.layer {
            // SAFETY: the caller's.
            Layer::Hybrid(layer) => unsafe {
                let state = Hybrid { rows: self.rows, layer, table: &self.table.on_device };
                layer.weights.step(&state, rows, positions, rotation, memory)
            },
            Layer::Dense { geometry, dtype, coding, arrived } => {
                without_gate(&rows)?;
                let (fed, table) = ([rows.q, rows.k, rows.v], &self.table.on_device);
                let (at, cache) = ((*geometry, self.rows, *dtype), StepRows::Table(table, *coding));
                kv_cache::step(fed, at, cache, positions, arrived, rotation, memory)
            }
        }
    }

    fn rotates(&self, rotary: usize) -> bool {
        support::rotates(rotary)
    }

    /// The table stays where it is.
    fn generation(&self) -> usize {
        0
    }
}

impl Layer {
    /// Whether a state is of one sequence, and the layer's.
    fn fits(&self, state: TableState<'_>) -> bool {
        match (self, state) {
            (Self::Hybrid(HybridLayer { weights, coding, .. }), TableState::Hybrid(state)) => {
                let others = state.weights();
                let same = Arc::ptr_eq(weights, others) || weights.is_like(others);
                state.batch() == 1 && state.coding() == *coding && same
            }
            (Self::Dense { geometry, dtype, coding, .. }, TableState::Dense(cache)) => {
                let theirs = (cache.geometry(), cache.dtype(), cache.coding());
                cache.batch() == 1 && theirs == (*geometry, *dtype, *coding)
            }
            _ => false,
        }
    }
}

impl TableState<'_> {
    fn memory(&self) -> &Arc<()> {
        match self {
            Self::Hybrid(state) => state.memory(),
            Self::Dense(cache) => cache.memory(),
        }
    }

    /// Its words in the table.
    fn entry(&self) -> Result<Vec<u64>> {
        Ok(match self {
            Self::Hybrid(state) => state.place()?.words().to_vec(),
            Self::Dense(cache) => cache.place()?.words().to_vec(),
        })
    }
}

impl StepState for Hybrid<'_> {
    fn args<'a>(&'a self, launch: &mut Launch<'a>) -> Decode {
        let HybridLayer { weights, coding, splits, admitted, arrived } = self.layer;
        let config = weights.config();
        Decode {
            q: Rows::NONE,
            k: Rows::NONE,
            v: Rows::NONE,
            out: Rows::NONE,
            w_q: null(),
            w_k: null(),
            log_scale: null(),
            budgets: null(),
            cap: config.cap.map_or(NO_CAP, |cap| cap as i32),
            positions: null(),
            ring_k: null_mut(),
            ring_v: null_mut(),
            ring_score: null_mut(),
            store: null(),
            coding: *coding,
            key_scale: weights.key_scale(launch),
            admitted: launch.at(admitted),
            s: null_mut(),
            z: null_mut(),
            partial: null_mut(),
            arrived: launch.at(arrived),
            splits: *splits,
            gate: Rows::NONE,
            router: router(config),
            cos: null(),
            sin: null(),
            rotary: 0,
            states: launch.at::<_, SequenceState>(self.table).cast_const(),
        }
    }

    fn batch(&self) -> usize {
        self.rows
    }

    fn splits(&self) -> i32 {
        self.layer.splits
    }
}
