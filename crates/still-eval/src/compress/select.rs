//! Which rows stay. Indices of a context's rows in ascending order, `[layer][K][…]`.

use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;

use super::scores::Scores;

/// First tokens that StreamingLLM keeps (section 3.2), and that KVzip's selection never drops.
pub(super) const SINKS: usize = 4;
/// Attention sinks and recent tokens of DuoAttention's streaming heads.
const STREAMING: (usize, usize) = (64, 256);

/// Rows that stay.
pub(super) type Kept = Vec<Vec<Vec<usize>>>;

/// Of how many rows and heads is selected.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Rows of the context.
    pub tokens: usize,
    pub layers: usize,
    pub kv_heads: usize,
    /// Share that stays.
    pub fraction: f64,
}

impl Sizes {
    /// Rows that stay in each head, where heads keep equally many: at least one.
    pub fn per_head(&self) -> usize {
        share(self.fraction, self.tokens).max(1).min(self.tokens)
    }

    /// The same selection for every head.
    fn everywhere(&self, rows: Vec<usize>) -> Kept {
        vec![vec![rows; self.kv_heads]; self.layers]
    }

    /// The first few rows and the most recent ones.
    pub fn streaming_llm(&self) -> Kept {
        self.everywhere(ends(self.tokens, SINKS, self.per_head()))
    }

    /// As many rows of each head at random.
    pub fn random(&self, seed: u64) -> Kept {
        let head = |stream: usize| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(stream as u64);
            let mut rows = index::sample(&mut rng, self.tokens, self.per_head()).into_vec();
            rows.sort_unstable();
            rows
        };
        let layer = |n: usize| (0..self.kv_heads).map(|k| head(n * self.kv_heads + k)).collect();
        (0..self.layers).map(layer).collect()
    }

    /// H2O: of rows before the most recent half of those that stay, the best.
    pub fn h2o(&self, scores: &[Scores]) -> Kept {
        let recent = self.per_head() / 2;
        let before = self.tokens - recent;
        let head = |scores: &Vec<f32>| {
            let mut rows = best(&scores[..before], self.per_head() - recent);
            rows.extend(before..self.tokens);
            rows
        };
        each_head(scores, head)
    }

    /// SnapKV: the best of the rows before the observing tokens, and these. `scores` has one for each row before.
    pub fn snapkv(&self, scores: &[Scores], observed: usize) -> Kept {
        let before = self.tokens - observed;
        let head = |scores: &Vec<f32>| {
            let mut rows = best(scores, self.per_head() - observed);
            rows.extend(before..self.tokens);
            rows
        };
        each_head(scores, head)
    }

    /// KVzip: the best rows of all heads and layers together. Infinite scores come first.
    pub fn kvzip(&self, scores: &[Scores]) -> Kept {
        let all: Vec<f32> = scores.iter().flatten().flatten().copied().collect();
        let mut kept = vec![vec![Vec::new(); self.kv_heads]; self.layers];
        // No head may be left without its sinks: nothing could be attended to before the next token.
        let sinks = SINKS.min(self.tokens) * self.kv_heads * self.layers;
        for row in best(&all, share(self.fraction, all.len()).max(sinks)) {
            let (head, token) = (row / self.tokens, row % self.tokens);
            kept[head / self.kv_heads][head % self.kv_heads].push(token);
        }
        kept
    }

    /// DuoAttention: as many of the best heads as the bytes allow keep every row, the others sinks and a window: a fifth and four
    /// fifths of at most [`STREAMING`], and of no more than half of what stays on the mean.
    pub fn duo_attention(&self, scores: &[Vec<f32>]) -> Kept {
        let streaming = (self.per_head() / 2).max(1).min(STREAMING.0 + STREAMING.1);
        let sinks = streaming * STREAMING.0 / (STREAMING.0 + STREAMING.1);
        let heads = self.layers * self.kv_heads;
        let left = share(self.fraction, heads * self.tokens).saturating_sub(heads * streaming);
        let whole = match self.tokens - streaming {
            0 => heads,
            more => (left / more).min(heads),
        };
        let mut kept = self.everywhere(ends(self.tokens, sinks, streaming));
        let all: Vec<f32> = scores.iter().flatten().copied().collect();
        for head in best(&all, whole) {
            kept[head / self.kv_heads][head % self.kv_heads] = (0..self.tokens).collect();
        }
        kept
    }
}

/// Of `count`, rounded down; a product that is whole but for rounding counts as whole.
fn share(fraction: f64, count: usize) -> usize {
    ((fraction * count as f64 + 1e-6) as usize).min(count)
}

/// Tokens that SnapKV observes where `kept` rows stay: no more than half of them.
pub(super) fn observed(most: usize, kept: usize) -> usize {
    most.min(kept / 2)
}

fn each_head(scores: &[Scores], head: impl Fn(&Vec<f32>) -> Vec<usize>) -> Kept {
    scores.iter().map(|layer| layer.iter().map(&head).collect()).collect()
}

/// The first `sinks` and the last of `tokens` rows, `most` in all.
fn ends(tokens: usize, sinks: usize, most: usize) -> Vec<usize> {
    let most = most.min(tokens);
    let sinks = sinks.min(most);
    (0..sinks).chain(tokens - (most - sinks)..tokens).collect()
}

/// Indices of the `count` largest scores, ascending; of equal ones the first.
fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let count = count.min(order.len());
    if count < order.len() {
        let by = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
        order.select_nth_unstable_by(count, by);
        order.truncate(count);
        order.sort_unstable();
    }
    order
}
