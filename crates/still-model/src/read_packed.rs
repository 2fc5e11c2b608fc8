//! Prefill of several sequences of different lengths together: every matrix product takes the rows of all, without padding.

use candle_core::Tensor;
use still_attention::AttentionRows;

use crate::cache::Cache;
use crate::error::{ModelError, Result};
use crate::executor::{Piece, executor};
use crate::model::Model;

/// New tokens of one sequence, and its cache.
#[derive(Debug)]
pub struct Feed<'a> {
    /// Token ids to read; may be empty.
    pub ids: &'a [u32],
    /// The sequence's own cache, which the tokens are added to.
    pub cache: &'a mut Cache,
}

impl Model {
    /// Feeds every sequence its tokens. `each` receives, in order, the index of a feed, a position in its `ids`, and the
    /// final-normed hidden states `[n, E]` of the tokens from there on.
    ///
    /// A sequence that is read alone gives the same up to rounding. All work runs on the calling thread's pool. With many
    /// sequences and several threads, give each thread its own sequences.
    ///
    /// # Errors
    /// An id outside the vocabulary, a cache of another model or of several sequences, an error of `each`. The caches have then
    /// read unknown parts.
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

    /// Hidden states `[ROWS or fewer, E]` of the pieces, concatenated.
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
