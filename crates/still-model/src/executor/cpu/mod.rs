//! The CPU: threads share what there is to do.

mod read;
mod step;
mod updates;

use candle_core::{DType, Tensor};
use still_attention::{
    AttentionState, HybridState, KvCache, PreparedWeights, RowDtype, SlidingKvCache,
};
use still_quant::SMALL_BATCH;

use super::packs::{Piece, ROWS, packs};
use super::{Batching, EachBlock, Executor, Wanted};
use crate::cache::{Cache, Workspace};
use crate::cancel::Cancel;
use crate::error::Result;
use crate::model::Model;

pub use read::lanes;
pub(super) use step::Buffers;

/// The CPU.
#[derive(Debug)]
pub(super) struct Cpu;

impl Executor for Cpu {
    fn dtypes(&self) -> &'static [DType] {
        &[DType::F32]
    }

    fn batching(&self) -> Batching {
        Batching { side_by_side: true, tokens: 512, least_shared: 0, padded: false }
    }

    fn new_states(
        &self,
        model: &Model,
        batch: usize,
        rows: RowDtype,
    ) -> Result<Vec<Box<dyn AttentionState>>> {
        let geometry = model.config().geometry();
        let state = |n: usize| -> Result<Box<dyn AttentionState>> {
            if let Some(layer) = model.student.as_ref().and_then(|student| student.layer(n)) {
                let weights = PreparedWeights::new(geometry, &layer.config, &layer.attention)?;
                let rows = layer.config.stored_rows(rows);
                return Ok(Box::new(HybridState::new(weights, batch, rows)));
            }
            let layer = &model.decoder.layers[n];
            let scale = layer.logit_scale;
            Ok(match layer.sliding_window {
                None => Box::new(KvCache::new(geometry, batch, rows).with_logit_scale(scale)?),
                Some(window) => {
                    let cache = SlidingKvCache::new(geometry, window, batch, rows)?;
                    Box::new(cache.with_logit_scale(scale)?)
                }
            })
        };
        (0..model.decoder.layers.len()).map(state).collect()
    }

    fn forward(
        &self,
        model: &Model,
        ids: &Tensor,
        cache: &mut Cache,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        let (batch, tokens) = ids.dims2()?;
        if tokens == 1 && batch <= SMALL_BATCH && lengths.is_none() {
            step::step(model, &ids.flatten_all()?.to_vec1::<u32>()?, cache, false)?;
            let shape = (batch, 1, model.config().hidden_size);
            return Ok(Tensor::from_slice(&cache.scratch.step.normed, shape, ids.device())?);
        }
        model.forward_through_layers(ids, cache, lengths)
    }

    fn read(
        &self,
        model: &Model,
        ids: &[u32],
        cache: &mut Cache,
        how: (Wanted, &Cancel),
        each: &EachBlock<'_>,
    ) -> Result<()> {
        read::read(model, ids, cache, how, each)
    }

    fn packs(&self, lengths: &[usize]) -> Vec<Vec<Piece>> {
        packs(lengths, ROWS)
    }

    fn decode<'a>(&self, model: &Model, ids: &[u32], cache: &'a mut Cache) -> Result<&'a [f32]> {
        if ids.len() <= SMALL_BATCH {
            step::step(model, ids, cache, true)?;
        } else {
            let column = Tensor::from_slice(ids, (ids.len(), 1), model.device())?;
            let hidden = self.forward(model, &column, cache, None)?.squeeze(1)?;
            let vocab = 0..model.config().vocab_size;
            model.decoder.logits_into(&hidden, vocab, &mut cache.logits)?;
        }
        Ok(&cache.logits)
    }

    fn decode_many<'a>(
        &self,
        model: &Model,
        ids: &[u32],
        caches: &mut [&mut Cache],
        workspace: &'a mut Workspace,
    ) -> Result<&'a [f32]> {
        step::step_of_many(model, ids, caches, workspace)?;
        Ok(&workspace.logits)
    }
}
