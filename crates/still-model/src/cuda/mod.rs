//! Models on CUDA: what their layers remember, long reads and decode steps.

pub(crate) mod ops;
mod small_batch;
mod small_batch_products;
mod step_graph;

use candle_core::{DType, Tensor};
use still_attention::{CudaHybridState, CudaKvCache, CudaWeights, RowDtype};
use still_compute::cuda::can_capture;

use crate::cancel::Cancel;
use crate::error::{ModelError, Result};
use crate::model::{Cache, LayerCache, Model};

pub(crate) use step_graph::StepGraph;

/// Tokens whose hidden states are given out together: their logits are to fit beside everything else.
const BLOCK: usize = 1024;

/// What one layer remembers of a batch of sequences.
#[derive(Clone, Debug)]
pub(crate) enum CudaLayer {
    Dense(CudaKvCache),
    Hybrid(Box<CudaHybridState>),
}

impl CudaLayer {
    /// Attends from the new tokens to themselves and everything before: `[B, H, T, D]`.
    pub fn advance(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        lengths: Option<&[usize]>,
    ) -> still_attention::Result<Tensor> {
        match self {
            Self::Dense(cache) => cache.advance(q, k, v, lengths),
            Self::Hybrid(state) => state.advance(q, k, v, lengths),
        }
    }

    pub fn position(&self, sequence: usize) -> usize {
        match self {
            Self::Dense(cache) => cache.position(sequence),
            Self::Hybrid(state) => state.position(sequence),
        }
    }

    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Dense(cache) => cache.size_bytes(),
            Self::Hybrid(state) => state.size_bytes(),
        }
    }
}

impl Model {
    /// The empty layers of a cache.
    pub(crate) fn layers_on_cuda(&self, batch: usize, rows: RowDtype) -> Result<Vec<CudaLayer>> {
        let (device, dtype) = (self.decoder.device(), self.decoder.dtype());
        if !matches!((rows, dtype), (RowDtype::F32, DType::F32) | (RowDtype::Bf16, DType::BF16)) {
            return Err(ModelError::Unsupported {
                what: format!("{rows:?} rows in the cache of a model in {dtype:?} on CUDA"),
                found_in: None,
                hint: format!("ask for {} rows, or load the model in f32 or bf16", dtype.as_str()),
            });
        }
        let geometry = self.config().geometry();
        let Some(student) = &self.student else {
            let layer = |_| Ok(CudaLayer::Dense(CudaKvCache::new(geometry, batch, device, dtype)?));
            return (0..self.decoder.layers.len()).map(layer).collect();
        };
        let layers = student.layers.iter().map(|layer| {
            let weights =
                CudaWeights::new(geometry, &layer.config, &layer.attention, device, dtype)?;
            Ok(CudaLayer::Hybrid(Box::new(CudaHybridState::new(weights, batch)?)))
        });
        layers.collect()
    }

    /// [`Model::read`]: all tokens at once, so that an empty state is filled by the kernels of whole sequences.
    pub(crate) fn read_on_cuda<E: From<ModelError>>(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        cancel: &Cancel,
        each: impl Fn(usize, Tensor) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        if ids.is_empty() {
            return Ok(());
        }
        let x = self.decoder.embed(ids)?;
        let hidden = self.forward_embedded(x, cache, None, cancel)?;
        let hidden = hidden.squeeze(0).map_err(ModelError::from)?;
        for start in (0..ids.len()).step_by(BLOCK) {
            let length = BLOCK.min(ids.len() - start);
            each(start, hidden.narrow(0, start, length).map_err(ModelError::from)?)?;
        }
        Ok(())
    }

    /// [`Model::decode`]: the logits are the one thing that is copied to the host.
    pub(crate) fn decode_on_cuda(&self, ids: &[u32], cache: &mut Cache) -> Result<()> {
        self.check_cache(cache, ids.len())?;
        let device = self.decoder.device().as_cuda_device()?;
        let logits = if self.student.is_some() && can_capture(device) {
            self.replay_step(ids, cache)?
        } else {
            let x = self.decoder.embed(ids)?.transpose(0, 1)?;
            let hidden = self.forward_embedded(x, cache, None, &Cancel::default())?.squeeze(1)?;
            self.decoder.logits(&hidden)?
        };
        cache.buffers.logits = logits.flatten_all()?.to_vec1()?;
        Ok(())
    }

    /// A step through the cache's graph, captured first if there is none that fits: logits `[B, vocab]` f32.
    fn replay_step(&self, ids: &[u32], cache: &mut Cache) -> Result<Tensor> {
        self.decoder.check_ids(ids)?;
        let positions: Vec<usize> = (0..ids.len()).map(|n| cache.position(n)).collect();
        let tokens = positions.iter().max().map_or(0, |longest| longest + 1);
        let Cache { layers, buffers, .. } = cache;
        for state in states(layers) {
            state.reserve(tokens)?;
        }
        let fitting = buffers.graph.take().filter(|graph| graph.fits(self, layers));
        let graph = match fitting {
            Some(graph) => graph,
            None => StepGraph::capture(self, layers, ids.len())?,
        };
        let graph = buffers.graph.insert(graph);
        graph.launch(ids, &positions)?;
        states(layers).for_each(CudaHybridState::count);
        Ok(graph.logits.clone())
    }
}

/// The hybrid states among layers.
fn states(layers: &mut [LayerCache]) -> impl Iterator<Item = &mut CudaHybridState> {
    layers.iter_mut().filter_map(|layer| match layer {
        LayerCache::Cuda(CudaLayer::Hybrid(state)) => Some(&mut **state),
        _ => None,
    })
}
