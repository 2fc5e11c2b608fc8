//! Decode steps on CUDA.

use candle_core::Tensor;
use still_attention::{
    AttentionRows, CudaHybridState, CudaKvCache, CudaWeights, GraphState, HybridConfig,
    HybridWeights, IDLE,
};
use still_compute::cuda::{CapturedGraph, StepMemory};
use still_model::Result;

use super::decode::{Decoded, Steps, copies};

/// Decodes onto hybrid states.
pub(super) fn hybrid(
    decoded: &Decoded<'_>,
    config: &HybridConfig,
    weights: &HybridWeights,
    batch: usize,
) -> Result<Steps> {
    let [q, k, v] = &decoded.prefix;
    let weights = CudaWeights::new(decoded.geometry, config, weights, q.device(), q.dtype())?;
    let mut state = CudaHybridState::with_rows(weights, batch, decoded.rows)?;
    state.advance(q, k, v, None)?;
    replayed(decoded, state, batch)
}

/// Decodes onto dense caches.
pub(super) fn dense(decoded: &Decoded<'_>, batch: usize) -> Result<Steps> {
    let [q, k, v] = &decoded.prefix;
    let (geometry, rows) = (decoded.geometry, decoded.rows);
    let mut cache = CudaKvCache::with_rows(geometry, batch, q.device(), q.dtype(), rows)?;
    cache.advance(q, k, v, None)?;
    replayed(decoded, cache, batch)
}

/// A step of all copies is one CUDA graph, as a model's is; positions lie on the device before the first.
fn replayed<S>(decoded: &Decoded<'_>, mut state: S, batch: usize) -> Result<Steps>
where
    S: GraphState + Clone + 'static,
{
    let [q, ..] = &decoded.prefix;
    let (device, tokens) = (q.device(), q.dim(2)?);
    // A graph is stale when memory moves.
    state.reserve(tokens + decoded.steps)?;
    let states = copies(&state, state.size_bytes());
    drop(state);

    // Idle: what runs before the first launch leaves the states alone.
    let position = Tensor::from_vec(vec![IDLE; batch], batch, device)?;
    let positions = (tokens..tokens + decoded.steps).flat_map(|t| vec![t as u32; batch]);
    let positions =
        Tensor::from_vec(positions.collect::<Vec<u32>>(), (decoded.steps, batch), device)?;
    let memory = StepMemory::default();
    let step = Step { states, token: decoded.token.clone(), position, memory };
    let graph = CapturedGraph::capture(device.as_cuda_device()?, || step.queue())?;
    let copies = step.states.len();
    let mut replay = Replay { graph, step, positions, next: 0 };
    Ok(Steps { copies, step: Box::new(move || replay.launch()) })
}

/// A graph and, for as long as it lives, what it reads and writes.
struct Replay<S> {
    graph: CapturedGraph,
    step: Step<S>,
    /// `[steps, B]` u32
    positions: Tensor,
    /// The step to come.
    next: usize,
}

impl<S> Replay<S> {
    fn launch(&mut self) -> Result<()> {
        self.step.position.slice_set(&self.positions.get(self.next)?, 0, 0)?;
        self.next += 1;
        Ok(self.graph.launch()?)
    }
}

/// The kernels of a token through all states.
struct Step<S> {
    states: Vec<S>,
    token: [Tensor; 3],
    /// `[B]` u32
    position: Tensor,
    /// What the kernels write.
    memory: StepMemory,
}

impl<S: GraphState> Step<S> {
    /// Queues them.
    fn queue(&self) -> Result<()> {
        let [q, k, v] = &self.token;
        let rows = AttentionRows { q, k, v, gate: None };
        for state in &self.states {
            // SAFETY: the position is idle or the one that comes next, and there is room for all that come.
            unsafe { state.step(rows, &self.position, None, &self.memory) }?;
        }
        Ok(())
    }
}
