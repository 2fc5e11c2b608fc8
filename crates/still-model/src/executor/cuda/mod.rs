//! CUDA: whole sequences through a layer at once, decode steps as graphs.

mod small_batch;
mod small_batch_products;
mod step_graph;
mod steps;

use candle_core::DType;
use still_attention::{
    AttentionState, CudaHybridState, CudaKvCache, CudaLinearState, CudaWeights, GraphState,
    GraphStep, Mode, RowDtype,
};
use still_compute::cuda::can_capture;

use super::packs::{DEVICE_ROWS, Piece, packs};
use super::{Batching, EachBlock, Executor, Wanted, one_by_one};
use crate::cache::{Cache, Workspace};
use crate::cancel::Cancel;
use crate::decoder::StudentLayer;
use crate::error::{ModelError, Result};
use crate::model::Model;

pub(super) use step_graph::StepGraph;
pub(super) use steps::Steps;

/// Tokens whose hidden states are given out together: their logits are to fit besides everything else.
const BLOCK: usize = 1024;

/// Tokens that are read together: many enough to be as fast as with more, few enough that a long prompt's activations stay
/// small. A multiple of the chunk.
const PIECE: usize = 16 * 1024;

/// Tokens that a common beginning has to save: one more call waits for its launches about as long as so many
/// tokens take.
const LEAST_SHARED: usize = 1024;

/// A CUDA device.
#[derive(Debug)]
pub(super) struct Cuda;

impl Executor for Cuda {
    fn dtypes(&self) -> &'static [DType] {
        &[DType::BF16, DType::F32]
    }

    /// A teacher reads whole sequences fast, and what continues them by the tensor library's ops.
    fn batching(&self) -> Batching {
        Batching {
            side_by_side: false,
            tokens: DEVICE_ROWS,
            least_shared: LEAST_SHARED,
            padded: true,
        }
    }

    fn new_states(
        &self,
        model: &Model,
        batch: usize,
        rows: RowDtype,
    ) -> Result<Vec<Box<dyn AttentionState>>> {
        let (device, dtype) = (model.device(), model.decoder.dtype());
        let plain =
            matches!((rows, dtype), (RowDtype::F32, DType::F32) | (RowDtype::Bf16, DType::BF16));
        if !plain && !rows.is_coded() {
            return Err(ModelError::Unsupported {
                what: format!(
                    "{rows:?} rows in the cache of a model in {} on CUDA",
                    dtype.as_str()
                ),
                found_in: None,
                hint: format!(
                    "ask for {}, int8 or int4 rows, or load the model in f32 or bf16",
                    dtype.as_str()
                ),
            });
        }
        let geometry = model.config().geometry();
        let Some(student) = &model.student else {
            let state = |_| {
                let cache = CudaKvCache::with_rows(geometry, batch, device, dtype, rows)?;
                Ok(Box::new(cache) as _)
            };
            return (0..model.decoder.layers.len()).map(state).collect();
        };
        let state = |layer: &StudentLayer| {
            let StudentLayer { config, attention, .. } = layer;
            let rows = config.stored_rows(rows);
            if config.mode == Mode::LinearOnly {
                let state =
                    CudaLinearState::new(geometry, config, attention, device, dtype, batch)?;
                return Ok(Box::new(state.with_rows(rows)) as Box<dyn AttentionState>);
            }
            let weights = CudaWeights::new(geometry, config, attention, device, dtype)?;
            Ok(Box::new(CudaHybridState::with_rows(weights, batch, rows)?) as _)
        };
        student.layers.iter().map(state).collect()
    }

    /// Reads a piece onto the state that the one before has left.
    fn read(
        &self,
        model: &Model,
        ids: &[u32],
        cache: &mut Cache,
        (_, cancel): (Wanted, &Cancel),
        each: &EachBlock<'_>,
    ) -> Result<()> {
        for (n, ids) in ids.chunks(PIECE).enumerate() {
            let x = model.decoder.embed(ids)?;
            let hidden = model.forward_embedded(x, cache, None, cancel)?.squeeze(0)?;
            for start in (0..ids.len()).step_by(BLOCK) {
                let length = BLOCK.min(ids.len() - start);
                let (at, hidden) = (n * PIECE + start, hidden.narrow(0, start, length)?);
                if each(at..at + length, Some(hidden)).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn packs(&self, lengths: &[usize]) -> Vec<Vec<Piece>> {
        packs(lengths, DEVICE_ROWS)
    }

    /// The logits are the one thing that is copied to the host.
    fn decode<'a>(&self, model: &Model, ids: &[u32], cache: &'a mut Cache) -> Result<&'a [f32]> {
        let device = model.device().as_cuda_device()?;
        // Dense attention of some head dimensions has no kernel for a step.
        let in_graph = cache.layers.iter_mut().all(|layer| layer.in_graph().is_some());
        if in_graph && can_capture(device) {
            return replay_step(model, ids, cache);
        }
        let x = model.decoder.embed(ids)?.transpose(0, 1)?;
        let hidden = model.forward_embedded(x, cache, None, &Cancel::default())?.squeeze(1)?;
        cache.logits = model.decoder.logits(&hidden)?.flatten_all()?.to_vec1()?;
        Ok(&cache.logits)
    }

    fn decode_many<'a>(
        &self,
        model: &Model,
        ids: &[u32],
        caches: &mut [&mut Cache],
        workspace: &'a mut Workspace,
    ) -> Result<&'a [f32]> {
        let mut layers = caches.iter_mut().flat_map(|cache| &mut cache.layers);
        let in_graph = layers.all(|layer| layer.in_graph().is_some());
        if !in_graph || !can_capture(model.device().as_cuda_device()?) {
            return one_by_one(self, model, ids, caches, workspace);
        }
        steps::replay(model, ids, caches, workspace)?;
        workspace.logits()
    }
}

/// A step through the cache's graph, captured first if there is none that fits: logits `[B, vocab]`.
fn replay_step<'a>(model: &Model, ids: &[u32], cache: &'a mut Cache) -> Result<&'a [f32]> {
    model.decoder.check_ids(ids)?;
    let positions: Vec<usize> = (0..ids.len()).map(|n| cache.position(n)).collect();
    let tokens = positions.iter().max().map_or(0, |longest| longest + 1);
    let Cache { layers, scratch, .. } = cache;
    let mut states = in_graph(layers)?;
    for state in &mut states {
        state.reserve(tokens)?;
    }
    let steps: Vec<&dyn GraphStep> = states.iter().map(|state| &**state as _).collect();
    let fitting = scratch.graph.take().filter(|graph| graph.fits(model, &steps));
    let graph = match fitting {
        Some(graph) => graph,
        None => StepGraph::capture(model, &steps, ids.len())?,
    };
    let graph = scratch.graph.insert(graph);
    graph.launch(ids, &positions)?;
    states.into_iter().for_each(|state| state.count());
    graph.logits(ids.len())
}

/// The states of all layers, as a graph feeds them.
fn in_graph(layers: &mut [Box<dyn AttentionState>]) -> Result<Vec<&mut dyn GraphState>> {
    layers.iter_mut().map(|layer| layer.in_graph().ok_or_else(not_in_graph)).collect()
}

fn not_in_graph() -> ModelError {
    ModelError::Invalid("a graph is made of layers on CUDA that have a kernel for a step".into())
}
