//! Documents to windows: cut at a length, given to lengths, packed.

use std::collections::BTreeMap;
use std::ops::Range;

use super::lengths::Schedule;
use super::order::{Purpose, shuffled};
use super::tokens::TokenFile;
use crate::recipe::DataRecipe;

/// A stretch of one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub source: u32,
    /// Tokens.
    pub length: u32,
    /// The first token, in the source's file.
    pub start: u64,
}

impl Piece {
    pub fn range(self) -> Range<u64> {
        self.start..self.start + u64::from(self.length)
    }

    fn at(source: usize, range: Range<u64>) -> Self {
        Self { source: source as u32, length: (range.end - range.start) as u32, start: range.start }
    }
}

/// Windows of one source or, without weights, of all.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pieces: Vec<Piece>,
    /// Where each window ends among the pieces.
    ends: Vec<u32>,
    /// Tokens of all windows.
    pub tokens: u64,
}

impl Group {
    /// Each piece a window.
    pub fn plain(pieces: Vec<Piece>) -> Self {
        let ends = (1..=pieces.len() as u32).collect();
        Self::new(pieces, ends)
    }

    fn new(pieces: Vec<Piece>, ends: Vec<u32>) -> Self {
        let tokens = pieces.iter().map(|piece| u64::from(piece.length)).sum();
        Self { pieces, ends, tokens }
    }

    /// Several pieces a window of at most `capacity` tokens: the longest first, each into the fullest window that it
    /// fits into. No document is cut to fill a window.
    fn packed(pieces: &[Piece], capacity: usize, seed: u64) -> Self {
        let mut order = shuffled(pieces.len(), seed, Purpose::Packing, 0);
        order.sort_by_key(|&n| std::cmp::Reverse(pieces[n as usize].length));
        let mut windows: Vec<Vec<Piece>> = Vec::new();
        let mut by_room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for n in order {
            let piece = pieces[n as usize];
            let length = piece.length as usize;
            let fitting = by_room.range_mut(length..).next().map(|(&room, at)| (room, at.pop()));
            let (room, window) = match fitting {
                Some((room, Some(window))) => {
                    if by_room.get(&room).is_some_and(Vec::is_empty) {
                        by_room.remove(&room);
                    }
                    (room, window)
                }
                _ => {
                    windows.push(Vec::new());
                    (capacity, windows.len() - 1)
                }
            };
            windows[window].push(piece);
            by_room.entry(room - length).or_default().push(window);
        }
        let mut end = 0;
        let ends = windows.iter().map(|window| {
            end += window.len() as u32;
            end
        });
        let ends = ends.collect();
        Self::new(windows.concat(), ends)
    }

    /// Windows.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// The pieces of a window.
    pub fn window(&self, n: usize) -> &[Piece] {
        let start = n.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.pieces[start as usize..self.ends[n] as usize]
    }
}

/// The documents that are read, cut at the longest length; ends that are too short or count nothing are left out.
/// Also how many documents gave any.
pub(super) fn blocks(
    files: &[TokenFile],
    wanted: impl Fn(usize, usize) -> bool,
    longest: usize,
    min_length: usize,
) -> (Vec<Piece>, usize) {
    let (mut blocks, mut documents) = (Vec::new(), 0);
    for (source, file) in files.iter().enumerate() {
        for document in (0..file.documents()).filter(|&document| wanted(source, document)) {
            let before = blocks.len();
            cut(file, source, file.document(document), longest, min_length, &mut blocks);
            documents += usize::from(blocks.len() > before);
        }
    }
    (blocks, documents)
}

fn cut(
    file: &TokenFile,
    source: usize,
    range: Range<u64>,
    length: usize,
    min_length: usize,
    to: &mut Vec<Piece>,
) {
    let end = range.end;
    to.extend(
        range
            .step_by(length)
            .map(|start| start..end.min(start + length as u64))
            .filter(|piece| piece.end - piece.start >= min_length as u64)
            .filter(|piece| file.counts_any(piece.clone()))
            .map(|piece| Piece::at(source, piece)),
    );
}

/// The windows of every length. In a mix each block goes to one length, so that an epoch reads every token once; with
/// lengths in turn each reads all of them.
pub(super) fn views(
    files: &[TokenFile],
    blocks: &[Piece],
    schedule: &Schedule,
    recipe: &DataRecipe,
    seed: u64,
) -> Vec<Vec<Group>> {
    let given = schedule
        .token_shares()
        .map(|shares| give(blocks, &schedule.lengths, &shares, recipe.pack, seed));
    let lengths = schedule.lengths.iter().enumerate();
    lengths
        .map(|(n, &length)| {
            let of_length = |at: &usize| given.as_ref().is_none_or(|given| given[*at] == n as u8);
            let mut pieces = Vec::new();
            for block in (0..blocks.len()).filter(of_length).map(|at| blocks[at]) {
                let source = block.source as usize;
                cut(&files[source], source, block.range(), length, recipe.min_length, &mut pieces);
            }
            let of_sources = match recipe.weights.len() {
                0 => vec![pieces],
                sources => (0..sources as u32)
                    .map(|source| {
                        pieces.iter().filter(|piece| piece.source == source).copied().collect()
                    })
                    .collect(),
            };
            let group = |pieces: Vec<Piece>| match recipe.pack {
                true => Group::packed(&pieces, length, seed),
                false => Group::plain(pieces),
            };
            of_sources.into_iter().map(group).collect()
        })
        .collect()
}

/// The length, by index, that each block is read at: always the one furthest below its share of the tokens. Unless
/// documents are packed, a length is for blocks that the length before it would cut.
fn give(blocks: &[Piece], lengths: &[usize], shares: &[f64], pack: bool, seed: u64) -> Vec<u8> {
    let mut given = vec![0; blocks.len()];
    if lengths.len() == 1 {
        return given;
    }
    let mut tokens = vec![0.0; lengths.len()];
    let mut sum = 0.0;
    for at in shuffled(blocks.len(), seed, Purpose::Lengths, 0) {
        let length = blocks[at as usize].length as usize;
        sum += length as f64;
        let open = if pack {
            lengths.len()
        } else {
            1 + lengths[..lengths.len() - 1].iter().filter(|&&shorter| shorter < length).count()
        };
        let lack = |n: &usize| shares[*n] * sum - tokens[*n];
        let most = (0..open).max_by(|a, b| lack(a).total_cmp(&lack(b))).unwrap_or(0);
        tokens[most] += length as f64;
        given[at as usize] = most as u8;
    }
    given
}
