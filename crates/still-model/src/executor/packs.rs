//! How sequences that are read together are cut into packs.

/// Rows that go through a product together, as many as a block of [`Model::read`](crate::Model::read): enough for products to be fast, few
/// enough to keep activations small.
pub(super) const ROWS: usize = 256;

/// The same on CUDA, which is idle with few.
#[cfg(feature = "cuda")]
pub(super) const DEVICE_ROWS: usize = 16 * 1024;

/// Consecutive tokens of one feed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub feed: usize,
    pub start: usize,
    pub tokens: usize,
}

/// The feeds' tokens in order, cut into packs of `rows`.
pub(super) fn packs(lengths: &[usize], rows: usize) -> Vec<Vec<Piece>> {
    let mut packs = Vec::new();
    let (mut pack, mut room) = (Vec::new(), rows);
    for (feed, &length) in lengths.iter().enumerate() {
        let mut start = 0;
        while start < length {
            let tokens = room.min(length - start);
            pack.push(Piece { feed, start, tokens });
            start += tokens;
            room -= tokens;
            if room == 0 {
                packs.push(std::mem::take(&mut pack));
                room = rows;
            }
        }
    }
    if !pack.is_empty() {
        packs.push(pack);
    }
    packs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_in_one_pack() {
        for lengths in [vec![], vec![0, 0], vec![256], vec![3, 0, 700, 256, 1], vec![255, 1, 1]] {
            let packs = packs(&lengths, ROWS);
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
