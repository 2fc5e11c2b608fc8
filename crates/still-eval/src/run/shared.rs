//! Log-likelihoods of many sequences, what they share at their beginnings read once.
//!
//! Three levels: what a whole group of items begins with (MMLU's examples), what one item's sequences begin with (the
//! context, and whatever its choices have in common), and the rest of each. A level's new tokens of several sequences go
//! through the model together.

use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;
use still_attention::RowDtype;
use still_model::{Batching, Cache, Feed, Model};

use super::encode::Sequence;
use crate::error::{EvalError, Result};
use crate::nll::{Guess, guesses_of_hidden};

/// Rows that are scored together at least, if there are so many.
const SCORED: usize = 256;

/// A shorter beginning of a group is not worth a cache of its own.
pub(super) const WORTH_SHARING: usize = 32;

/// Reads on one thread's pool, and keeps what the last group began with.
#[derive(Debug)]
pub struct Reader<'a> {
    model: &'a Model,
    rows: RowDtype,
    empty: &'a Cache,
    batching: Batching,
    beginning: Option<(Vec<u32>, Cache)>,
    /// Tokens fed so far: what is shared counts once.
    pub tokens: usize,
}

/// How each target of a sequence fared.
type Guesses = Vec<Guess>;

/// What came of an item.
#[derive(Clone, Debug)]
pub struct ItemRead {
    /// By sequence.
    pub guesses: Vec<Guesses>,
    /// Of the cache after the sequence that took most.
    pub cache_bytes: usize,
}

/// Part of a sequence, fed after its parent's.
struct Part<'a> {
    ids: &'a [u32],
    parent: &'a Cache,
    /// Rows that are scored, ascending; each with what it is to predict, and for whom.
    wanted: Vec<(usize, Vec<Wanted>)>,
}

/// A target: sequence, and which of its targets.
#[derive(Clone, Copy)]
struct Wanted {
    id: u32,
    sequence: usize,
    target: usize,
}

/// What each of some rows is to predict.
type Targets<'a> = Vec<&'a [Wanted]>;

impl Part<'_> {
    /// Of hidden states that begin with row `start`, those that are scored, and what each is to predict; `None` if none is.
    fn scored(&self, start: usize, hidden: &Tensor) -> Result<Option<(Tensor, Targets<'_>)>> {
        let end = start + hidden.dim(0)?;
        let wanted = self.wanted.iter().filter(|(row, _)| (start..end).contains(row));
        let (index, targets): (Vec<u32>, Targets<'_>) =
            wanted.map(|(row, wanted)| ((row - start) as u32, wanted.as_slice())).unzip();
        if targets.is_empty() {
            return Ok(None);
        }
        let index = Tensor::new(index, hidden.device())?;
        Ok(Some((hidden.index_select(&index, 0)?, targets)))
    }
}

impl<'a> Reader<'a> {
    /// `empty` is a cache of one sequence that nothing was fed to, its exact rows stored as `rows`; `batching` the model's.
    pub fn new(model: &'a Model, rows: RowDtype, empty: &'a Cache, batching: Batching) -> Self {
        Self { model, rows, empty, batching, beginning: None, tokens: 0 }
    }

    /// Of each item, of each of its sequences, the guesses of its targets, and what the item's cache took. `shared` is what all
    /// of them are likely to begin with.
    ///
    /// # Errors
    /// An error of the model.
    pub fn read(
        &mut self,
        items: &[Vec<Sequence>],
        shared: Option<&[u32]>,
    ) -> Result<Vec<ItemRead>> {
        let root = self.begin(items, shared)?;
        let beginning = self.beginning.take().filter(|_| root > 0);
        let base = beginning.as_ref().map_or(self.empty, |(_, cache)| cache);
        // Where nothing is shared beyond the root, sequences are read by themselves, equal ones once.
        let commons = items.iter().map(|item| {
            let common = common(item);
            let saved = (item.len() - 1) * common.saturating_sub(root);
            if common > root && self.shares(saved) { common } else { root }
        });
        let commons: Vec<usize> = commons.collect();
        let mut read = Vec::with_capacity(items.len());
        let Batching { side_by_side, tokens, .. } = self.batching;
        let new_tokens = |item: usize| match side_by_side || commons[item] > root {
            true => commons[item] - root,
            false => alike(&items[item]).map(|run| run[0].ids.len() - root).sum(),
        };
        for group in by_tokens(items.len(), tokens, new_tokens) {
            self.read_items(&items[group.clone()], &commons[group], root, base, &mut read)?;
        }
        self.beginning = beginning;
        Ok(read)
    }

    /// Whether a beginning that saves so many tokens is read once.
    fn shares(&self, saved: usize) -> bool {
        saved >= self.batching.least_shared
    }

    /// Makes the beginning that `items` share stand in `self.beginning`; its length, 0 if there is none worth it.
    fn begin(&mut self, items: &[Vec<Sequence>], shared: Option<&[u32]>) -> Result<usize> {
        let Some(shared) = shared else { return Ok(0) };
        let mut length = shared.len();
        for sequence in items.iter().flatten() {
            // Scored rows are of the items' own parts.
            length = length.min(sequence.first_scored());
            length = equal(&shared[..length], &sequence.ids);
        }
        let sequences = items.iter().map(Vec::len).sum::<usize>();
        if length < WORTH_SHARING || !self.shares(length * sequences.saturating_sub(1)) {
            return Ok(0);
        }
        let ids = &shared[..length];
        if self.beginning.as_ref().is_none_or(|(read, _)| read != ids) {
            self.beginning = None;
            let mut cache = self.empty.clone();
            self.tokens += ids.len();
            let mut feed = [Feed { ids, cache: &mut cache }];
            self.model.read_packed(&mut feed, |_, _, _| Ok::<_, EvalError>(()))?;
            self.beginning = Some((ids.to_vec(), cache));
        }
        Ok(length)
    }

    fn read_items(
        &mut self,
        items: &[Vec<Sequence>],
        commons: &[usize],
        root: usize,
        base: &Cache,
        read: &mut Vec<ItemRead>,
    ) -> Result<()> {
        let all: Vec<&Sequence> = items.iter().flatten().collect();
        let nothing = Guess { nll: f32::NAN, greedy: false };
        let mut found: Vec<Guesses> =
            all.iter().map(|sequence| vec![nothing; sequence.targets.len()]).collect();
        // The items' own beginnings, where there is more of one than the root.
        let mut first = 0;
        let (mut parts, mut owners) = (Vec::with_capacity(items.len()), Vec::new());
        for (n, (item, &common)) in items.iter().zip(commons).enumerate() {
            let sequences = first..first + item.len();
            first += item.len();
            if common > root {
                let ids = &item[0].ids[root..common];
                let wanted = wanted(&all, sequences, root, common);
                parts.push(Part { ids, parent: base, wanted });
                owners.push(n);
            }
        }
        let mut caches: Vec<Option<Cache>> = items.iter().map(|_| None).collect();
        for (owner, cache) in owners.into_iter().zip(self.read_parts(&parts, &mut found)?) {
            caches[owner] = Some(cache);
        }
        let parents: Vec<&Cache> =
            caches.iter().map(|cache| cache.as_ref().unwrap_or(base)).collect();
        let mut sizes: Vec<usize> = parents.iter().map(|cache| cache.size_bytes()).collect();
        // What is left of the sequences, and whose it is.
        let mut first = 0;
        let (mut parts, mut owners) = (Vec::new(), Vec::new());
        for (n, ((item, &common), parent)) in items.iter().zip(commons).zip(parents).enumerate() {
            for run in alike(item) {
                let sequences = first..first + run.len();
                first = sequences.end;
                let (ids, end) = (&run[0].ids[common..], run[0].ids.len());
                if !ids.is_empty() {
                    let wanted = wanted(&all, sequences, common, end);
                    parts.push(Part { ids, parent, wanted });
                    owners.push(n);
                }
            }
        }
        for group in by_tokens(parts.len(), self.batching.tokens, |part| parts[part].ids.len()) {
            let bytes = self.read_leaves(&parts[group.clone()], &mut found)?;
            for (&owner, bytes) in owners[group].iter().zip(bytes) {
                sizes[owner] = sizes[owner].max(bytes);
            }
        }
        let mut found = found.into_iter();
        read.extend(items.iter().zip(sizes).map(|(item, cache_bytes)| ItemRead {
            guesses: found.by_ref().take(item.len()).collect(),
            cache_bytes,
        }));
        Ok(())
    }

    /// Feeds parts that nothing follows and scores what they want; the bytes of their caches.
    fn read_leaves(&mut self, parts: &[Part<'_>], found: &mut [Guesses]) -> Result<Vec<usize>> {
        let longest = parts.iter().map(|part| part.ids.len()).max().unwrap_or(0);
        let begin = parts.iter().all(|part| part.parent.position(0) == 0);
        let fits = parts.len() * longest <= 2 * self.batching.tokens;
        if !self.batching.padded || !begin || !fits || parts.len() < 2 {
            let caches = self.read_parts(parts, found)?;
            return Ok(caches.iter().map(Cache::size_bytes).collect());
        }
        let lengths: Vec<usize> = parts.iter().map(|part| part.ids.len()).collect();
        self.tokens += lengths.iter().sum::<usize>();
        let mut ids = vec![0; parts.len() * longest];
        for (row, part) in ids.chunks_mut(longest).zip(parts) {
            row[..part.ids.len()].copy_from_slice(part.ids);
        }
        let ids = Tensor::from_vec(ids, (parts.len(), longest), self.model.device())?;
        let mut cache = self.model.new_cache(parts.len(), self.rows)?;
        let hidden = self.model.forward(&ids, &mut cache, Some(&lengths))?;
        let mut scorer = Scorer { model: self.model, rows: Vec::new(), targets: Vec::new() };
        for (sequence, (part, &length)) in parts.iter().zip(&lengths).enumerate() {
            let own = hidden.get(sequence)?.narrow(0, 0, length)?;
            let Some((rows, targets)) = part.scored(0, &own)? else { continue };
            scorer.rows.push(rows);
            scorer.targets.extend(targets);
            if scorer.targets.len() >= SCORED {
                scorer.flush(found)?;
            }
        }
        scorer.flush(found)?;
        Ok(vec![cache.size_bytes() / parts.len(); parts.len()])
    }

    /// Feeds every part to a copy of its parent and scores what it wants; the caches.
    fn read_parts(&mut self, parts: &[Part<'_>], found: &mut [Guesses]) -> Result<Vec<Cache>> {
        let mut caches: Vec<Cache> = parts.iter().map(|part| part.parent.clone()).collect();
        if let ([part], [cache]) = (parts, caches.as_mut_slice())
            && self.pipelines(part)
        {
            self.tokens += part.ids.len();
            self.read_alone(part, cache, found)?;
            return Ok(caches);
        }
        let mut feeds: Vec<Feed<'_>> = parts
            .iter()
            .zip(&mut caches)
            .map(|(part, cache)| Feed { ids: part.ids, cache })
            .collect();
        self.tokens += feeds.iter().map(|feed| feed.ids.len()).sum::<usize>();
        let mut scorer = Scorer { model: self.model, rows: Vec::new(), targets: Vec::new() };
        self.model.read_packed(&mut feeds, |part, start, hidden| {
            let Some((rows, targets)) = parts[part].scored(start, &hidden)? else { return Ok(()) };
            scorer.rows.push(rows);
            scorer.targets.extend(targets);
            if scorer.targets.len() >= SCORED { scorer.flush(found) } else { Ok(()) }
        })?;
        scorer.flush(found)?;
        Ok(caches)
    }

    /// Whether a part is worth several threads, each a block of its tokens behind the one before.
    fn pipelines(&self, part: &Part<'_>) -> bool {
        let several = rayon::current_num_threads() > 1 && part.ids.len() > SCORED;
        several && self.batching.side_by_side
    }

    /// Feeds one part; each block is scored on the thread that read it.
    fn read_alone(&self, part: &Part<'_>, cache: &mut Cache, found: &mut [Guesses]) -> Result<()> {
        let found = Mutex::new(found);
        self.model.read(part.ids, cache, |start, hidden| {
            let Some((rows, targets)) = part.scored(start, &hidden)? else { return Ok(()) };
            let guesses = guesses(self.model, &rows, &targets)?;
            note(&mut found.lock().unwrap_or_else(PoisonError::into_inner), &targets, &guesses);
            Ok(())
        })
    }
}

/// Hidden states that wait to be scored together.
struct Scorer<'a> {
    model: &'a Model,
    rows: Vec<Tensor>,
    targets: Targets<'a>,
}

impl Scorer<'_> {
    fn flush(&mut self, found: &mut [Guesses]) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let hidden = Tensor::cat(&std::mem::take(&mut self.rows), 0)?;
        let targets = std::mem::take(&mut self.targets);
        note(found, &targets, &guesses(self.model, &hidden, &targets)?);
        Ok(())
    }
}

/// How what each row of hidden states is to predict fares.
fn guesses(model: &Model, hidden: &Tensor, targets: &[&[Wanted]]) -> Result<Vec<Guesses>> {
    let ids: Vec<Vec<u32>> =
        targets.iter().map(|wanted| wanted.iter().map(|wanted| wanted.id).collect()).collect();
    let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    guesses_of_hidden(model, hidden, &ids)
}

fn note(found: &mut [Guesses], targets: &[&[Wanted]], guesses: &[Guesses]) {
    for (wanted, guess) in targets.iter().copied().flatten().zip(guesses.iter().flatten()) {
        found[wanted.sequence][wanted.target] = *guess;
    }
}

/// What rows `from..to` of `sequences`, which are equal there, are to predict; rows count from `from`.
fn wanted(
    all: &[&Sequence],
    sequences: std::ops::Range<usize>,
    from: usize,
    to: usize,
) -> Vec<(usize, Vec<Wanted>)> {
    let row = |row: usize| {
        let of_sequence = |sequence: usize| {
            let target = row.checked_sub(all[sequence].first_scored())?;
            Some(Wanted { id: *all[sequence].targets.get(target)?, sequence, target })
        };
        (row - from, sequences.clone().filter_map(of_sequence).collect::<Vec<_>>())
    };
    (from..to).map(row).filter(|(_, wanted)| !wanted.is_empty()).collect()
}

/// Runs of equal sequences. The choices of a multiple-choice item often differ in the last token alone, which is not fed.
fn alike(item: &[Sequence]) -> impl Iterator<Item = &[Sequence]> {
    item.chunk_by(|a, b| a.ids == b.ids)
}

/// Tokens that all sequences begin with.
fn common(sequences: &[Sequence]) -> usize {
    let first = &sequences[0].ids;
    sequences.iter().map(|sequence| equal(first, &sequence.ids)).min().unwrap_or(0)
}

/// How far two runs are equal.
pub(super) fn equal<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// `0..count` cut into runs of `most` tokens or less, of one if that one has more.
fn by_tokens(
    count: usize,
    most: usize,
    tokens: impl Fn(usize) -> usize,
) -> Vec<std::ops::Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut sum) = (0, 0);
    for index in 0..count {
        if index > start && sum + tokens(index) > most {
            runs.push(start..index);
            (start, sum) = (index, 0);
        }
        sum += tokens(index);
    }
    if start < count {
        runs.push(start..count);
    }
    runs
}

#[cfg(test)]
mod tests {
    use still_model::random::{random_model, tiny_config};

    use super::*;

    /// Items of a group: the same 40 tokens, 9 of the item's own, and four choices of a token each.
    fn items() -> Vec<Vec<Sequence>> {
        let ids = |item: u32| (0..40).chain((0..9).map(move |i| 50 + item * 5 + i)).collect();
        let choice =
            |item, target| Sequence { ids: ids(item), targets: vec![target], truncated: false };
        (0..3).map(|item| (60..64).map(|target| choice(item, target)).collect()).collect()
    }

    #[test]
    fn choices_of_one_token_are_read_once() {
        let model = random_model(tiny_config(), 3).unwrap();
        let empty = model.new_cache(1, RowDtype::F32).unwrap();
        let cpu = Batching { side_by_side: true, tokens: 512, least_shared: 0, padded: false };
        // What a GPU asks for: 3 × 9 tokens are not worth a call of their own.
        let gpu = Batching { side_by_side: false, tokens: 512, least_shared: 200, padded: true };
        let shared: Vec<u32> = (0..40).collect();
        for (shared, tokens) in [(Some(shared.as_slice()), 40 + 3 * 9), (None, 3 * 49)] {
            let [expected, got] = [cpu, gpu].map(|batching| {
                let mut reader = Reader::new(&model, RowDtype::F32, &empty, batching);
                let read = reader.read(&items(), shared).unwrap();
                assert_eq!(reader.tokens, tokens, "{batching:?}");
                read
            });
            for (expected, got) in expected.iter().zip(&got) {
                assert_eq!(got.guesses.len(), 4);
                for (expected, got) in expected.guesses.iter().zip(&got.guesses) {
                    assert!((expected[0].nll - got[0].nll).abs() < 1e-4, "{expected:?} {got:?}");
                }
            }
        }
    }

    #[test]
    fn runs_hold_few_tokens_and_everything() {
        let sizes = [100, 500, 12, 0, 600, 1, 1];
        let runs = by_tokens(sizes.len(), 512, |index| sizes[index]);
        assert_eq!(runs, [0..1, 1..4, 4..5, 5..7]);
        assert!(by_tokens(0, 512, |_| 1).is_empty());
    }
}
