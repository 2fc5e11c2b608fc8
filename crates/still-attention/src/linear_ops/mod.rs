//! Linear attention and nothing else (`linear_only`), as tensor ops: a device that has no kernels for it composes it of these.
//!
//! Blocks of tokens: within one, a masked product `φ_q φ_kᵀ`; what came before it through the state. Temporaries are the
//! features of every token and a state `[2F, D + 1]` of every block.
//!
//! Gradients are written out (`backward`): the tensor library's own would be four times as many ops, which on a short
//! sequence wait for the host.

mod backward;
mod features;

use candle_core::{Result, Tensor};

use self::features::Mapped;
use crate::config::{FeatureMap, MIN_DENOMINATOR};

#[cfg(feature = "cuda")]
pub(crate) use self::backward::LinearGradients;

/// Tokens of a block.
const BLOCK: usize = 128;

/// What is computed from, in no graph; all on one device.
pub(crate) struct LinearOps<'a> {
    /// `[B, H, N, D]` after RoPE.
    pub q: &'a Tensor,
    /// `[B, S, N, D]` after RoPE, and the values.
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    /// `W` of `φ_q`, `[H, D, F]`, and of `φ_k`, `[S, D, F]`; their dtype is computed in.
    pub map_q: &'a Tensor,
    pub map_k: &'a Tensor,
    pub map: FeatureMap,
    /// `[B, 1, N, 1]`: 0 for tokens that do not count, 1 for the others; none if all do.
    pub counts: Option<&'a Tensor>,
}

/// How rows are cut into blocks.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    batch: usize,
    selection_heads: usize,
    tokens: usize,
    /// Tokens of a block.
    block: usize,
    /// Of a sequence.
    blocks: usize,
}

impl Blocks {
    /// Blocks of all sequences and selection heads.
    fn all(&self) -> usize {
        self.batch * self.selection_heads * self.blocks
    }

    /// `[B, heads, N, W]` to `[all, group · block, W]`, zeros behind the last token: they add nothing to a state and lie behind every
    /// query. Queries of one block and all heads of a group meet one state.
    fn cut(&self, rows: &Tensor) -> Result<Tensor> {
        let Self { batch, selection_heads, tokens, block, blocks, .. } = *self;
        let (group, width) = (rows.dim(1)? / selection_heads, rows.dim(3)?);
        let rows = match blocks * block - tokens {
            0 => rows.contiguous()?,
            missing => rows.pad_with_zeros(2, 0, missing)?.contiguous()?,
        };
        let rows = match group {
            1 => rows,
            _ => rows
                .reshape((batch * selection_heads, group, blocks, block * width))?
                .transpose(1, 2)?
                .contiguous()?,
        };
        rows.reshape((self.all(), group * block, width))
    }

    /// Back to `[B, heads, N, W]`.
    fn joined(&self, rows: &Tensor) -> Result<Tensor> {
        let Self { batch, selection_heads, tokens, block, blocks, .. } = *self;
        let (group, width) = (rows.dim(1)? / block, rows.dim(2)?);
        let rows = match group {
            1 => rows.clone(),
            _ => rows
                .reshape((batch * selection_heads, blocks, group, block * width))?
                .transpose(1, 2)?
                .contiguous()?,
        };
        rows.reshape((batch, selection_heads * group, blocks * block, width))?.narrow(2, 0, tokens)
    }

    /// Of every block's `[all, F, W]` the sum over those that `which` `[1, blocks, blocks]` names.
    fn sums(&self, which: &Tensor, of: &Tensor) -> Result<Tensor> {
        let (_, features, width) = of.dims3()?;
        let rows = self.batch * self.selection_heads;
        let sums = which.broadcast_matmul(&of.reshape((rows, self.blocks, features * width))?)?;
        sums.reshape((self.all(), features, width))
    }

    /// `products` `[all, group · block, block]`, 0 where the key comes after the query.
    fn causal(&self, products: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (all, rows, block) = products.dims3()?;
        let by_head = products.reshape((all, rows / block, block, block))?;
        by_head.broadcast_mul(mask)?.reshape((all, rows, block))
    }
}

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) struct SavedLinear {
    blocks: Blocks,
    q: Mapped,
    k: Mapped,
    /// Whose dtype the gradients of rows have.
    rows: candle_core::DType,
    counts: Option<Tensor>,
    /// `[all, group · block, 2F]` and `[all, block, 2F]`.
    phi_q: Tensor,
    phi_k: Tensor,
    /// `[v | 1]`, `[all, block, D + 1]`.
    with_one: Tensor,
    /// `[S | z]` that each block finds, `[all, 2F, D + 1]`.
    found: Tensor,
    /// `φ_q φ_kᵀ` where the key is not after the query, `[all, group · block, block]`.
    products: Tensor,
    /// Numerators and the denominator, `[all, group · block, D + 1]`.
    terms: Tensor,
    /// `[all, group · block, D]`
    out: Tensor,
    /// [`causal_mask`] and [`earlier_blocks`].
    mask: Tensor,
    earlier: Tensor,
}

impl LinearOps<'_> {
    /// `φ(q_t)ᵀS_t / φ(q_t)ᵀz_t`, `[B, H, N, D]` in `q`'s dtype, the state `[S | z]` `[B·S, 2F, D + 1]` after the tokens, and what
    /// the backward pass needs; `state` is what the tokens find, zeros if absent.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn forward(&self, state: Option<&Tensor>) -> Result<(Tensor, Tensor, SavedLinear)> {
        let (batch, _, tokens, d) = self.q.dims4()?;
        let selection_heads = self.k.dim(1)?;
        let dtype = self.map_q.dtype();
        let block = BLOCK.min(tokens.max(1));
        let blocks =
            Blocks { batch, selection_heads, tokens, block, blocks: tokens.div_ceil(block) };
        let q = Mapped::new(self.map, &self.q.to_dtype(dtype)?, self.map_q)?;
        let k = Mapped::new(self.map, &self.k.to_dtype(dtype)?, self.map_k)?;
        let counts = self.counts.map(|counts| counts.to_dtype(dtype)).transpose()?;
        let phi_k = match &counts {
            Some(counts) => k.phi.broadcast_mul(counts)?,
            None => k.phi.clone(),
        };
        let ones = Tensor::ones((batch, selection_heads, tokens, 1), dtype, self.v.device())?;
        let v = Tensor::cat(&[&self.v.to_dtype(dtype)?.contiguous()?, &ones], 3)?;
        let (phi_q, phi_k, with_one) = (blocks.cut(&q.phi)?, blocks.cut(&phi_k)?, blocks.cut(&v)?);

        // What each block adds to [S | z], and what it finds there.
        let added = phi_k.transpose(1, 2)?.contiguous()?.matmul(&with_one)?;
        let earlier = earlier_blocks(blocks.blocks, &v)?;
        let mut found = blocks.sums(&earlier, &added)?;
        let (_, features, width) = added.dims3()?;
        let by_sequence = (batch * selection_heads, blocks.blocks, features * width);
        let mut last = added.reshape(by_sequence)?.sum(1)?.reshape(((), features, width))?;
        if let Some(state) = state {
            let before = state.reshape((by_sequence.0, 1, by_sequence.2))?;
            let there = found.reshape(by_sequence)?.broadcast_add(&before)?;
            (found, last) = (there.reshape(added.shape())?, (last + state)?);
        }

        let mask = causal_mask(block, &v)?;
        let products = phi_q.matmul(&phi_k.transpose(1, 2)?.contiguous()?)?;
        let products = blocks.causal(&products, &mask)?;
        let terms = (phi_q.matmul(&found)? + products.matmul(&with_one)?)?;
        let denominator = terms.narrow(2, d, 1)?.maximum(MIN_DENOMINATOR)?;
        let out = terms.narrow(2, 0, d)?.broadcast_div(&denominator)?;
        let joined = blocks.joined(&out)?.to_dtype(self.q.dtype())?.contiguous()?;
        let rows = self.q.dtype();
        let saved = SavedLinear {
            blocks,
            q,
            k,
            rows,
            counts,
            phi_q,
            phi_k,
            with_one,
            found,
            products,
            terms,
            out,
            mask,
            earlier,
        };
        Ok((joined, last, saved))
    }
}

/// `[1, blocks, blocks]`: 1 where the column's block lies before the row's.
fn earlier_blocks(blocks: usize, like: &Tensor) -> Result<Tensor> {
    mask((1, blocks, blocks), like, |i| i % blocks < i / blocks)
}

/// `[1, block, block]`: 1 where the column's token is the row's or lies before it.
fn causal_mask(block: usize, like: &Tensor) -> Result<Tensor> {
    mask((1, block, block), like, |i| i % block <= i / block)
}

fn mask(
    shape: (usize, usize, usize),
    like: &Tensor,
    holds: impl Fn(usize) -> bool,
) -> Result<Tensor> {
    let values = (0..shape.1 * shape.2).map(|i| f32::from(u8::from(holds(i))));
    Tensor::from_vec(values.collect(), shape, like.device())?.to_dtype(like.dtype())
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use still_testing::{assert_relative_rms, random};

    use super::backward::LinearGradients;
    use super::*;
    use crate::{HeadGeometry, HybridConfig, HybridWeights, StillConfig, hybrid_attention};

    const GEOMETRY: HeadGeometry =
        HeadGeometry { num_heads: 6, num_key_value_heads: 2, head_dim: 4 };

    fn case(map: FeatureMap, tokens: usize) -> (HybridConfig, [Var; 5]) {
        let config = StillConfig::linear_only(1, GEOMETRY, 8).layer(0).unwrap();
        let vars = [
            random(&[2, 6, tokens, 4], 1),
            random(&[2, 2, tokens, 4], 2),
            random(&[2, 2, tokens, 4], 3),
            random(&[6, 4, 5], 4),
            random(&[2, 4, 5], 5),
        ];
        let vars = vars.map(|tensor| Var::from_tensor(&tensor).unwrap());
        (HybridConfig { feature_map: map, feature_dim: 5, ..config }, vars)
    }

    /// Output and gradients in float64 against the CPU's kernel.
    #[test]
    fn it_is_the_operator() {
        for map in [FeatureMap::Softmax, FeatureMap::NpMap { householder: false }] {
            for tokens in [1, 61, BLOCK, 3 * BLOCK + 7] {
                let (config, vars) = case(map, tokens);
                let [q, k, v, map_q, map_k] = vars.each_ref().map(|var| var.as_tensor());
                let weights = HybridWeights {
                    feature_map_q: map_q.clone(),
                    feature_map_k: map_k.clone(),
                    householder_q: None,
                    householder_k: None,
                    log_lambda: None,
                    window_factor: None,
                };
                let expected = hybrid_attention(q, k, v, &weights, None, &config, None).unwrap();
                let ops = LinearOps { q, k, v, map_q, map_k, map, counts: None };
                let (got, _, saved) = ops.forward(None).unwrap();
                assert_relative_rms("output", &got, &expected.out, 1e-10);
                let weight = random(got.dims(), 7);
                let expected = (&expected.out * &weight).unwrap().sum_all().unwrap();
                let expected = expected.backward().unwrap();
                let LinearGradients { qkv, map_q, map_k } = saved.backward(&weight, true).unwrap();
                let [d_q, d_k, d_v] = qkv.unwrap();
                let got = [("q", d_q), ("k", d_k), ("v", d_v), ("map_q", map_q), ("map_k", map_k)];
                for ((name, got), var) in got.iter().zip(&vars) {
                    if tokens > 1 || *name == "v" {
                        assert_relative_rms(name, got, expected.get(var).unwrap(), 1e-10);
                    }
                }
                let frozen = saved.backward(&weight, false).unwrap();
                assert!(frozen.qkv.is_none());
                assert_relative_rms("map_q", &frozen.map_q, &got[3].1, 0.0);
            }
        }
    }

    /// Any split of a sequence, with tokens between that do not count, gives the same output and state.
    #[test]
    fn a_state_goes_on_where_it_was() {
        let (tokens, cut) = (300, 141);
        let (_, vars) = case(FeatureMap::Softmax, tokens);
        let [q, k, v, map_q, map_k] = vars.each_ref().map(|var| var.as_detached_tensor());
        let run = |rows: [&Tensor; 3], counts: Option<&Tensor>, state: Option<&Tensor>| {
            let [q, k, v] = rows;
            let (map_q, map_k, map) = (&map_q, &map_k, FeatureMap::Softmax);
            let ops = LinearOps { q, k, v, map_q, map_k, map, counts };
            let (out, state, _) = ops.forward(state).unwrap();
            (out, state)
        };
        let (whole, end) = run([&q, &k, &v], None, None);
        let piece = |x: &Tensor, from, to| x.narrow(2, from, to - from).unwrap();
        let first = [&q, &k, &v].map(|x| piece(x, 0, cut + 9));
        let counts: Vec<f64> =
            (0..2 * (cut + 9)).map(|i| f64::from(u8::from(i % (cut + 9) < cut))).collect();
        let counts = Tensor::from_vec(counts, (2, 1, cut + 9, 1), q.device()).unwrap();
        let (a, state) = run(first.each_ref(), Some(&counts), None);
        let second = [&q, &k, &v].map(|x| piece(x, cut, tokens));
        let (b, again) = run(second.each_ref(), None, Some(&state));
        assert_relative_rms("first", &piece(&a, 0, cut), &piece(&whole, 0, cut), 1e-12);
        assert_relative_rms("second", &b, &piece(&whole, cut, tokens), 1e-12);
        assert_relative_rms("state", &again, &end, 1e-12);
    }
}
