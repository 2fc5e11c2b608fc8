//! Linear attention and nothing else (`linear_only`), as tensor ops: a device that has no kernels for it composes it of these.
//!
//! Blocks of tokens: within one, a masked product `φ_q φ_kᵀ`; what came before it through the state. Temporaries are the
//! features of every token and a state `[2F, D + 1]` of every block.

use candle_core::{D, Result, Tensor};

use crate::config::{FeatureMap, MIN_DENOMINATOR};

/// Tokens of a block.
const BLOCK: usize = 128;

/// What is computed from, in a graph or not; all on one device.
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

impl LinearOps<'_> {
    /// `φ(q_t)ᵀS_t / φ(q_t)ᵀz_t`, `[B, H, N, D]` in `q`'s dtype, and the state `[S | z]` `[B·S, 2F, D + 1]` after the tokens;
    /// `state` is what they find, zeros if absent.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn forward(&self, state: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let (batch, heads, tokens, d) = self.q.dims4()?;
        let selection_heads = self.k.dim(1)?;
        let (rows, group) = (batch * selection_heads, heads / selection_heads);
        let dtype = self.map_q.dtype();
        let block = BLOCK.min(tokens.max(1));
        let blocks = tokens.div_ceil(block);
        // Whole blocks; what is added adds nothing to the state and lies behind every query.
        let padded = |rows: &Tensor| rows.pad_with_zeros(2, 0, blocks * block - tokens);
        let phi_q = padded(&features(self.map, &self.q.to_dtype(dtype)?, self.map_q)?)?;
        let phi_k = features(self.map, &self.k.to_dtype(dtype)?, self.map_k)?;
        let phi_k = match self.counts {
            Some(counts) => phi_k.broadcast_mul(&counts.to_dtype(dtype)?)?,
            None => phi_k,
        };
        let v = self.v.to_dtype(dtype)?;
        let with_one = padded(&Tensor::cat(&[&v, &v.narrow(3, 0, 1)?.ones_like()?], 3)?)?;
        let features = phi_q.dim(3)?;
        let phi_k = padded(&phi_k)?.reshape((rows * blocks, block, features))?;
        let with_one = with_one.reshape((rows * blocks, block, d + 1))?;
        // Queries of one block and all heads of a group meet one state.
        let phi_q = phi_q.reshape((rows, group, blocks, block * features))?.transpose(1, 2)?;
        let phi_q = phi_q.reshape((rows * blocks, group * block, features))?;

        // What each block adds to [S | z], and what it finds there.
        let added = phi_k.transpose(1, 2)?.contiguous()?.matmul(&with_one)?;
        let added = added.reshape((rows, blocks, features * (d + 1)))?;
        let before = |of: Tensor| of.broadcast_matmul(&added);
        let (mut found, mut last) = (before(earlier_blocks(blocks, &v)?)?, added.sum_keepdim(1)?);
        if let Some(state) = state {
            let state = state.reshape((rows, 1, features * (d + 1)))?;
            (found, last) = (found.broadcast_add(&state)?, (last + state)?);
        }

        let terms = phi_q.matmul(&found.reshape((rows * blocks, features, d + 1))?)?;
        let products = phi_q.matmul(&phi_k.transpose(1, 2)?.contiguous()?)?;
        let products = products.broadcast_mul(&causal_mask(group, block, &v)?)?;
        let terms = (terms + products.matmul(&with_one)?)?;
        let terms = terms.reshape((rows, blocks, group, block * (d + 1)))?.transpose(1, 2)?;
        let terms = terms.reshape((batch, heads, blocks * block, d + 1))?.narrow(2, 0, tokens)?;
        let denominator = terms.narrow(3, d, 1)?.maximum(MIN_DENOMINATOR)?;
        let out = terms.narrow(3, 0, d)?.broadcast_div(&denominator)?.to_dtype(self.q.dtype())?;
        Ok((out, last.reshape((rows, features, d + 1))?))
    }
}

/// `φ(x) = [softmax(u) ; softmax(−u)]`, `u = f` or, of the NP-Map, `‖x‖ f/‖f‖`, `f = x W`: `x` `[B, heads, N, D]`, `w`
/// `[heads, D, F]`.
fn features(map: FeatureMap, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let norm = |x: &Tensor| x.sqr()?.sum_keepdim(D::Minus1)?.sqrt();
    let f = x.contiguous()?.broadcast_matmul(&w.unsqueeze(0)?)?;
    let u = match map {
        FeatureMap::Softmax => f,
        FeatureMap::NpMap { .. } => {
            let lengths = norm(x)?.broadcast_div(&norm(&f)?.maximum(1e-12)?)?;
            f.broadcast_mul(&lengths)?
        }
    };
    Tensor::cat(&[softmax(&u)?, softmax(&u.neg()?)?], D::Minus1)
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    // Softmax does not depend on what is taken away.
    let powers = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

/// `[1, blocks, blocks]`: 1 where the column's block lies before the row's.
fn earlier_blocks(blocks: usize, like: &Tensor) -> Result<Tensor> {
    mask((1, blocks, blocks), like, |i| i % blocks < i / blocks)
}

/// `[1, group · block, block]`: 1 where the column's token is the row's or lies before it; the tokens of a head lie together.
fn causal_mask(group: usize, block: usize, like: &Tensor) -> Result<Tensor> {
    mask((1, group * block, block), like, |i| i % block <= i / block % block)
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
                let (got, _) = ops.forward(None).unwrap();
                assert_relative_rms("output", &got, &expected.out, 1e-10);
                let weight = random(got.dims(), 7);
                let gradients =
                    |out: &Tensor| (out * &weight).unwrap().sum_all().unwrap().backward();
                let (got, expected) = (gradients(&got).unwrap(), gradients(&expected.out).unwrap());
                for (name, var) in ["q", "k", "v", "map_q", "map_k"].into_iter().zip(&vars) {
                    let (got, expected) = (got.get(var).unwrap(), expected.get(var).unwrap());
                    if tokens > 1 || name == "v" {
                        assert_relative_rms(name, got, expected, 1e-10);
                    }
                }
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
            LinearOps { q, k, v, map_q, map_k, map, counts }.forward(state).unwrap()
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
