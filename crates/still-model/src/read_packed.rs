//! Reading several sequences at once, each by its own number of tokens: their rows go through every product together,
//! and nothing is padded.

use candle_core::Tensor;

use crate::decoder::AttentionInputs;
use crate::error::{ModelError, Result};
use crate::model::{Cache, Model};

/// Rows that go through a product together, as many as a block of [`Model::read`]: enough for products to be fast, few
/// enough to keep activations small.
const ROWS: usize = 256;

/// The same on CUDA, where a feed is never cut: what continues a hybrid state there is fed one by one.
const WHOLE_ROWS: usize = 16 * 1024;

/// New tokens of one sequence, whose cache is of that sequence alone.
#[derive(Debug)]
pub struct Feed<'a> {
    /// What is to be read; may be empty.
    pub ids: &'a [u32],
    /// What came before, and after the call everything.
    pub cache: &'a mut Cache,
}

/// Consecutive tokens of one feed.
#[derive(Clone, Copy, Debug)]
struct Piece {
    feed: usize,
    start: usize,
    tokens: usize,
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
        let packs = match self.decoder.device().is_cpu() {
            true => packs(&lengths),
            false => whole_packs(&lengths),
        };
        for pack in packs {
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
                let own = AttentionInputs {
                    q: rows(&inputs.q)?,
                    k: rows(&inputs.k)?,
                    v: rows(&inputs.v)?,
                    gate: inputs.gate.as_ref().map(rows).transpose()?,
                };
                let cache = &mut feeds[piece.feed].cache.layers[layer];
                outputs.push(cache.advance(&own, None)?);
                row += piece.tokens;
            }
            Ok(Some(Tensor::cat(&outputs, 2)?))
        })?;
        let hidden =
            hidden.ok_or_else(|| ModelError::Invalid("a layer gave no attention".into()))?;
        Ok(hidden.squeeze(0)?)
    }
}

/// The feeds' tokens in order, cut into packs of [`ROWS`].
fn packs(lengths: &[usize]) -> Vec<Vec<Piece>> {
    let mut packs = Vec::new();
    let (mut pack, mut room) = (Vec::new(), ROWS);
    for (feed, &length) in lengths.iter().enumerate() {
        let mut start = 0;
        while start < length {
            let tokens = room.min(length - start);
            pack.push(Piece { feed, start, tokens });
            start += tokens;
            room -= tokens;
            if room == 0 {
                packs.push(std::mem::take(&mut pack));
                room = ROWS;
            }
        }
    }
    if !pack.is_empty() {
        packs.push(pack);
    }
    packs
}

/// The feeds in order, whole, in packs of [`WHOLE_ROWS`] at most where one alone has not more.
fn whole_packs(lengths: &[usize]) -> Vec<Vec<Piece>> {
    let mut packs: Vec<Vec<Piece>> = Vec::new();
    let mut room = 0;
    for (feed, &tokens) in lengths.iter().enumerate().filter(|&(_, &tokens)| tokens > 0) {
        let piece = Piece { feed, start: 0, tokens };
        match packs.last_mut().filter(|_| tokens <= room) {
            Some(pack) => {
                pack.push(piece);
                room -= tokens;
            }
            None => {
                packs.push(vec![piece]);
                room = WHOLE_ROWS.saturating_sub(tokens);
            }
        }
    }
    packs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_feeds_share_packs_where_they_fit() {
        let shares = |lengths: &[usize]| -> Vec<Vec<usize>> {
            let feeds = |pack: Vec<Piece>| pack.iter().map(|piece| piece.feed).collect();
            let packs = whole_packs(lengths);
            assert!(packs.iter().flatten().all(|piece| piece.tokens == lengths[piece.feed]));
            packs.into_iter().map(feeds).collect()
        };
        assert_eq!(shares(&[0, 0]), Vec::<Vec<usize>>::new());
        assert_eq!(shares(&[9, 0, WHOLE_ROWS - 9, 1]), [vec![0, 2], vec![3]]);
        assert_eq!(shares(&[1, 2 * WHOLE_ROWS, 1, 1]), [vec![0], vec![1], vec![2, 3]]);
    }

    #[test]
    fn every_token_is_in_one_pack() {
        for lengths in [vec![], vec![0, 0], vec![256], vec![3, 0, 700, 256, 1], vec![255, 1, 1]] {
            let packs = packs(&lengths);
            let mut read = vec![0; lengths.len()];
            for (n, pack) in packs.iter().enumerate() {
                let rows: usize = pack.iter().map(|piece| piece.tokens).sum();
                assert!(rows == ROWS || n + 1 == packs.len(), "{packs:?}");
                for piece in pack {
                    assert_eq!(read[piece.feed], piece.start);
                    read[piece.feed] += piece.tokens;
                }
            }
            assert_eq!(read, lengths);
        }
    }
}
