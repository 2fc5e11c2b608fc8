//! Reading several sequences at once, each by its own number of tokens: their rows go through every product together,
//! and nothing is padded.

use candle_core::Tensor;
use still_attention::AttentionRows;

use crate::cache::Cache;
use crate::error::{ModelError, Result};
use crate::executor::{Piece, executor};
use crate::model::Model;

/// New tokens of one sequence, whose cache is of that sequence alone.
#[derive(Debug)]
pub struct Feed<'a> {
    /// What is to be read; may be empty.
    pub ids: &'a [u32],
    /// What came before, and after the call everything.
    pub cache: &'a mut Cache,
}

impl Model {
    /// Feeds every sequence its tokens; `each` is given a feed's index, where in its `ids` a run of tokens starts, and
    /// their final-normed hidden states `[n, E]`, in order.
    ///
    /// Reading alone gives the same up to rounding. Everything happens on the calling thread's pool: who has many sequences
    /// and several threads gives each thread its own.
    ///
    /// # Errors
    /// An id outside the vocabulary, a cache of another model or of several sequences, an error of `each`. The caches have
    /// then been fed unknown parts.
    pub fn read_packed<E: From<ModelError>>(
        &self,
        feeds: &mut [Feed<'_>],
        mut each: impl FnMut(usize, usize, Tensor) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        for feed in feeds.iter() {
            self.check_cache(feed.cache, 1)?;
        }
        let lengths: Vec<usize> = feeds.iter().map(|feed| feed.ids.len()).collect();
        for pack in executor(self.device())?.packs(&lengths) {
            let hidden = self.read_pack(feeds, &pack)?;
            let mut row = 0;
            for piece in pack {
                let rows = hidden.narrow(0, row, piece.tokens).map_err(ModelError::from)?;
                row += piece.tokens;
                each(piece.feed, piece.start, rows)?;
            }
        }
        Ok(())
    }

    /// Hidden states `[ROWS or fewer, E]` of the pieces, one after another.
    fn read_pack(&self, feeds: &mut [Feed<'_>], pack: &[Piece]) -> Result<Tensor> {
        let ids: Vec<u32> = pack
            .iter()
            .flat_map(|piece| &feeds[piece.feed].ids[piece.start..piece.start + piece.tokens])
            .copied()
            .collect();
        let positions: Vec<usize> = pack
            .iter()
            .flat_map(|piece| {
                let position = feeds[piece.feed].cache.position(0);
                position..position + piece.tokens
            })
            .collect();
        let rotation = self.decoder.rotation_of(&positions)?;
        let x = self.decoder.embed(&ids)?;
        let hidden = self.through_layers(x, &rotation, |layer, inputs| {
            let mut row = 0;
            let mut outputs = Vec::with_capacity(pack.len());
            for piece in pack {
                let rows = |x: &Tensor| x.narrow(2, row, piece.tokens)?.contiguous();
                let (q, k, v) = (rows(&inputs.q)?, rows(&inputs.k)?, rows(&inputs.v)?);
                let gate = inputs.gate.as_ref().map(rows).transpose()?;
                let rows = AttentionRows { q: &q, k: &k, v: &v, gate: gate.as_ref() };
                outputs.push(feeds[piece.feed].cache.layers[layer].advance(rows, None)?);
                row += piece.tokens;
            }
            Ok::<_, ModelError>(Tensor::cat(&outputs, 2)?)
        })?;
        Ok(hidden.squeeze(0)?)
    }
}
