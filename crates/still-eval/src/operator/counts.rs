//! What attention has to compute and to move, whoever computes it.
//!
//! **Operations** are those of matrix products, two for a multiplication and its addition: logits and their products with V over
//! the keys that a query sees; of the linear branch `x W` of both feature maps, `φ(q)ᵀ[S | z]` where something is absorbed, and
//! `φ(k) [vᵀ | 1]` of what is. Scores of the router are read off the window's logits and need no product of their own. Nothing is
//! counted that an implementation does twice or for nothing (masked keys, more planes of bf16). The backward pass has two
//! products for each of the forward pass, and the logits once more, because nobody keeps a quadratic temporary.
//!
//! **Bytes** are the least: every argument is read once and every result written once, nothing between them. A pass over whole
//! sequences reads Q, K, V and the maps (f32) and writes its output; the backward pass reads all of these and the output's
//! gradient and writes the others' gradients. A decode step reads what the state holds that the token sees, and writes the
//! token's row; where it retires a chunk also what that reads and writes. Scales, positions and scores are too few to count.

use std::ops::Range;

use still_attention::HeadGeometry;

/// One layer's attention for a batch of equally long sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Heads.
    pub geometry: HeadGeometry,
    /// Sequences.
    pub batch: usize,
    /// Bytes of a value of Q, K, V, the output and, while decoding, the maps.
    pub value_bytes: usize,
    /// Bytes of one of a state's exact rows.
    pub row_bytes: usize,
    /// None: dense causal attention.
    pub hybrid: Option<Hybrid>,
}

/// What the hybrid keeps exactly; routed by KV head, maps with as many columns as a head has channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hybrid {
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Salient tokens of a retired chunk.
    pub budget: usize,
    /// Salient tokens in all.
    pub cap: Option<usize>,
}

/// Operations and bytes of some work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Floating-point operations.
    pub flop: u64,
    /// Bytes of memory read and written.
    pub bytes: u64,
}

/// Bytes of a value of the linear state, of learned maps in whole sequences and of their gradients.
const F32: usize = 4;

/// What the query at a position sees.
struct Seen {
    /// Keys, its own among them.
    exact: usize,
    /// Tokens in the linear state.
    absorbed: usize,
}

impl Hybrid {
    /// Chunks that have left the window of the token at `position`.
    fn retired(&self, position: usize) -> usize {
        (position / self.chunk).saturating_sub(1)
    }

    fn kept(&self, retired: usize) -> usize {
        (retired * self.budget).min(self.cap.unwrap_or(usize::MAX))
    }

    fn absorbed(&self, retired: usize) -> usize {
        retired * self.chunk - self.kept(retired)
    }

    /// Retired chunks at `position`, if its token retires one.
    fn retires(&self, position: usize) -> Option<usize> {
        let retired = self.retired(position);
        (retired > 0 && position.is_multiple_of(self.chunk)).then_some(retired)
    }
}

impl Counted {
    /// Whole sequences of `tokens` tokens from their beginning.
    pub fn forward(&self, tokens: usize) -> Count {
        let HeadGeometry { num_heads: h, num_key_value_heads: k, head_dim: d } = self.geometry;
        let rows = self.batch * tokens * (2 * h + 2 * k) * d * self.value_bytes;
        Count { flop: self.flop(0..tokens), bytes: (rows + self.map_bytes()) as u64 }
    }

    /// The same with the gradients of everything that it takes.
    pub fn forward_backward(&self, tokens: usize) -> Count {
        let HeadGeometry { num_heads: h, num_key_value_heads: k, head_dim: d } = self.geometry;
        let forward = self.forward(tokens);
        let rows = self.batch * tokens * (4 * h + 4 * k) * d * self.value_bytes;
        let logits = (0..tokens).map(|t| 2 * d * h * self.seen(t).exact).sum::<usize>();
        Count {
            flop: 3 * forward.flop + (self.batch * logits) as u64,
            bytes: forward.bytes + (rows + 2 * self.map_bytes()) as u64,
        }
    }

    /// One token after the other, those at `positions`.
    pub fn decode(&self, positions: Range<usize>) -> Count {
        let bytes = positions.clone().map(|t| self.step_bytes(t)).sum::<usize>();
        Count { flop: self.flop(positions), bytes: bytes as u64 }
    }

    fn flop(&self, positions: Range<usize>) -> u64 {
        let one = |t| (self.query_flop(t) + self.retirement_flop(t)) as u64;
        self.batch as u64 * positions.map(one).sum::<u64>()
    }

    fn seen(&self, position: usize) -> Seen {
        let Some(hybrid) = self.hybrid else {
            return Seen { exact: position + 1, absorbed: 0 };
        };
        let retired = hybrid.retired(position);
        let window = position + 1 - retired * hybrid.chunk;
        Seen { exact: window + hybrid.kept(retired), absorbed: hybrid.absorbed(retired) }
    }

    /// Of all query heads of a token.
    fn query_flop(&self, position: usize) -> usize {
        let HeadGeometry { num_heads: h, head_dim: d, .. } = self.geometry;
        let seen = self.seen(position);
        let linear = if seen.absorbed > 0 { self.map_and_state_flop() } else { 0 };
        h * (4 * d * seen.exact + linear)
    }

    /// Of one head: a row through its map, and `φ` with `[S | z]` or with `[v | 1]`.
    fn map_and_state_flop(&self) -> usize {
        let d = self.geometry.head_dim;
        2 * d * d + 2 * 2 * d * (d + 1)
    }

    /// Of the chunk that a token retires, if it does: what enters the linear state.
    fn retirement_flop(&self, position: usize) -> usize {
        let Some((hybrid, retired)) = self.retirement(position) else { return 0 };
        let entering = hybrid.absorbed(retired) - hybrid.absorbed(retired - 1);
        self.geometry.num_key_value_heads * entering * self.map_and_state_flop()
    }

    fn retirement(&self, position: usize) -> Option<(Hybrid, usize)> {
        self.hybrid.and_then(|hybrid| Some((hybrid, hybrid.retires(position)?)))
    }

    /// Maps of both sides as they are learned.
    fn map_bytes(&self) -> usize {
        let HeadGeometry { num_heads: h, num_key_value_heads: k, head_dim: d } = self.geometry;
        if self.hybrid.is_some() { (h + k) * d * d * F32 } else { 0 }
    }

    fn step_bytes(&self, position: usize) -> usize {
        let HeadGeometry { num_heads: h, num_key_value_heads: k, head_dim: d } = self.geometry;
        let seen = self.seen(position);
        let token = (2 * h + 2 * k) * d * self.value_bytes;
        // K and V: a row for every earlier key that is seen, and one that is written.
        let pair = 2 * k * self.row_bytes;
        let state = k * 2 * d * (d + 1) * F32;
        let map = d * d * self.value_bytes;
        let mut of_sequence = token + pair * seen.exact;
        let mut of_all = 0;
        if seen.absorbed > 0 {
            of_sequence += state;
            of_all += h * map;
        }
        if let Some((hybrid, retired)) = self.retirement(position) {
            let kept = hybrid.kept(retired) - hybrid.kept(retired - 1);
            of_sequence += pair * (hybrid.chunk + kept);
            if seen.absorbed > 0 {
                of_sequence += state;
                of_all += k * map;
            }
        }
        self.batch * of_sequence + of_all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: HeadGeometry =
        HeadGeometry { num_heads: 2, num_key_value_heads: 1, head_dim: 2 };

    fn dense() -> Counted {
        Counted { geometry: GEOMETRY, batch: 1, value_bytes: 4, row_bytes: 4, hybrid: None }
    }

    fn hybrid(budget: usize, cap: Option<usize>) -> Counted {
        Counted { hybrid: Some(Hybrid { chunk: 2, budget, cap }), ..dense() }
    }

    /// Three queries see 1 + 2 + 3 keys: 6 pairs of 4 · 2 operations in 2 heads. Rows: 2 + 2 query heads and 1 + 1 KV heads.
    #[test]
    fn dense_by_hand() {
        let forward = dense().forward(3);
        assert_eq!(forward, Count { flop: 6 * 8 * 2, bytes: 6 * 3 * 2 * 4 });
        // Logits, once more, are half of the forward pass.
        let both = dense().forward_backward(3);
        assert_eq!(both, Count { flop: 96 * 3 + 48, bytes: 144 + 12 * 3 * 2 * 4 });
        // The fourth token: itself, three stored rows read, one written.
        let step = dense().decode(3..4);
        assert_eq!(step, Count { flop: 4 * 8 * 2, bytes: 6 * 2 * 4 + 4 * 2 * 2 * 2 });
        let two = Counted { batch: 2, ..dense() };
        assert_eq!((two.forward(3).flop, two.decode(3..4).bytes), (192, 2 * step.bytes));
    }

    /// Chunks of 2, one kept, 5 tokens: windows of 1, 2, 3, 4 and 3 tokens; the last query sees one salient token and one in
    /// the state, which entered as that query came.
    #[test]
    fn hybrid_by_hand() {
        let exact = (1 + 2 + 3 + 4 + 3 + 1) * 8 * 2;
        // A row through W: 2 · 2 · 2. φ has 4 channels, [S | z] 3 columns: 2 · 4 · 3.
        let one = 8 + 24;
        let forward = hybrid(1, None).forward(5);
        let rows = 6 * 5 * 2 * 4;
        let maps = 3 * 4 * 4;
        assert_eq!(forward, Count { flop: exact + 2 * one + one, bytes: rows + maps });
        let both = hybrid(1, None).forward_backward(5);
        assert_eq!(both.flop, 3 * forward.flop + exact / 2);
        assert_eq!(both.bytes, forward.bytes + 2 * rows + 2 * maps);
        // Feeding the tokens one by one computes the same.
        assert_eq!(hybrid(1, None).decode(0..5).flop, forward.flop);
    }

    #[test]
    fn a_decode_step_by_hand() {
        let token = 6 * 2 * 4;
        let pair = 2 * 2 * 2;
        let state = 4 * 3 * 4;
        let map = 4 * 4;
        // In its second chunk nothing has retired.
        let step = hybrid(1, None).decode(3..4);
        assert_eq!(step, Count { flop: 4 * 8 * 2, bytes: token + 4 * pair });
        // Token 4 retires a chunk: its two rows are read, one is written again, the state read and written.
        let step = hybrid(1, None).decode(4..5);
        assert_eq!(step.flop, 4 * 8 * 2 + 3 * 32);
        assert_eq!(step.bytes, token + 4 * pair + 3 * pair + 2 * state + 2 * map + map);
        // Token 5 does not.
        let step = hybrid(1, None).decode(5..6);
        assert_eq!(step.flop, 5 * 8 * 2 + 2 * 32);
        assert_eq!(step.bytes, token + 5 * pair + state + 2 * map);
    }

    #[test]
    fn budgets_and_caps() {
        // Everything kept is dense attention, but for rows that are stored again.
        let full = hybrid(2, None);
        assert_eq!(full.forward(9).flop, dense().forward(9).flop);
        // Nothing kept: at token 9 the window has 4 tokens, 6 are absorbed.
        assert_eq!(hybrid(0, None).decode(9..10).flop, 4 * 8 * 2 + 2 * 32);
        // A cap of 2 with three chunks retired: two kept, four absorbed. Token 8 retires the third, both of whose tokens' worth
        // enters: one of its own and one that is demoted, or both of its own.
        let capped = hybrid(1, Some(2));
        assert_eq!(capped.decode(9..10).flop, 6 * 8 * 2 + 2 * 32);
        assert_eq!(capped.decode(8..9).flop, 5 * 8 * 2 + 2 * 32 + 2 * 32);
        assert_eq!(hybrid(1, Some(100)).forward(9), hybrid(1, None).forward(9));
    }

    /// 8,192 tokens of the Llama-3.1-8B shape: window 13 GFLOP, salient keys 34, queries' linear branch 25, keys' 6.
    #[test]
    fn a_known_shape() {
        let geometry = HeadGeometry { num_heads: 32, num_key_value_heads: 8, head_dim: 128 };
        let hybrid = Some(Hybrid { chunk: 64, budget: 4, cap: None });
        let counted = Counted { geometry, batch: 1, value_bytes: 2, row_bytes: 256, hybrid };
        let gflop = counted.forward(8192).flop as f64 / 1e9;
        assert!((75.0..90.0).contains(&gflop), "{gflop}");
        // Store 2.06 MB, state 1.06, maps 1.05, window half a megabyte.
        let step = counted.decode(8191..8192).bytes as f64 / 1e6;
        assert!((4.5..5.0).contains(&step), "{step}");
    }
}
