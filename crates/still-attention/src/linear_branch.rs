//! The linear branch by itself, as tensor ops over whole chunks: of the exact keys only each token's own remains.
//!
//! The kernels of a GPU compute all branches at once; this is the loss that a training may put on this one. Its temporaries
//! are the features of every token and a state `[2F, D + 1]` of every chunk.

use candle_core::{D, DType, Result, Tensor};

/// What the branch takes, in a graph or not; all on one device.
pub(crate) struct LinearBranch<'a> {
    /// `[B, H, N, D]` after RoPE.
    pub q: &'a Tensor,
    /// `[B, S, N, D]` after RoPE, and the values.
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    /// `W` of `φ_q`, `[H, D, F]`, and of `φ_k`, `[S, D, F]`.
    pub map_q: &'a Tensor,
    pub map_k: &'a Tensor,
    /// `ln(n λ)` per query head, `[H]`; none with `LinearNorm::Sum`.
    pub log_scale: Option<&'a Tensor>,
    /// `[B, S, chunks · chunk]`: 1 for tokens that enter the state when their chunk retires, 0 for those that never do.
    pub absorbed: &'a Tensor,
    /// Tokens of a chunk.
    pub chunk: usize,
}

impl LinearBranch<'_> {
    /// `(v_t + λ φ_q(q_t)ᵀ S) / (1 + λ φ_q(q_t)ᵀ z)`, `[B, H, N, D]` in `q`'s dtype, computed in that of the maps.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn forward(&self) -> Result<Tensor> {
        let (batch, heads, tokens, d) = self.q.dims4()?;
        let selection_heads = self.k.dim(1)?;
        let group = heads / selection_heads;
        let chunks = tokens.div_ceil(self.chunk);
        let dtype = self.map_q.dtype();
        // Whole chunks; what is added lies behind every query.
        let padded = |rows: &Tensor| rows.pad_with_zeros(2, 0, chunks * self.chunk - tokens);
        let phi_q = padded(&features(&self.q.to_dtype(dtype)?, self.map_q)?)?;
        let phi_k = padded(&features(&self.k.to_dtype(dtype)?, self.map_k)?)?;
        let v = padded(&self.v.to_dtype(dtype)?)?;
        let features = phi_q.dim(3)?;
        let by_chunk = (batch * selection_heads * chunks, self.chunk, ());
        let absorbed = self.absorbed.to_dtype(dtype)?;

        // What each chunk adds to [S | z].
        let phi_k = phi_k.broadcast_mul(&absorbed.unsqueeze(3)?)?.reshape(by_chunk)?;
        let with_one = Tensor::cat(&[&v, &v.narrow(3, 0, 1)?.ones_like()?], 3)?;
        let added = phi_k.transpose(1, 2)?.contiguous()?.matmul(&with_one.reshape(by_chunk)?)?;

        // The state that each chunk's queries see: of chunks up to the second before theirs.
        let sums = |added: &Tensor| {
            let retired = retired(chunks, &v)?;
            retired.broadcast_matmul(&added.reshape((batch * selection_heads, chunks, ()))?)
        };
        let state = sums(&added)?.reshape((by_chunk.0, features, d + 1))?;

        // Queries of one chunk and all heads of a group meet one state.
        let grouped = (batch * selection_heads, group, chunks, self.chunk * features);
        let phi_q = phi_q.reshape(grouped)?.transpose(1, 2)?;
        let phi_q = phi_q.reshape((by_chunk.0, group * self.chunk, features))?;
        let terms = phi_q.matmul(&state)?;
        let terms = terms.reshape((batch, selection_heads, chunks, group, self.chunk * (d + 1)))?;
        let terms = match self.log_scale {
            None => terms,
            Some(log_scale) => {
                let counts = absorbed.reshape((batch * selection_heads, chunks, self.chunk))?;
                let counts = sums(&counts.sum(D::Minus1)?)?.maximum(1.0)?;
                let scale = log_scale.exp()?.reshape((1, selection_heads, 1, group))?;
                let counts = counts.reshape((batch, selection_heads, chunks, 1))?;
                terms.broadcast_mul(&scale.broadcast_div(&counts)?.unsqueeze(4)?)?
            }
        };
        let terms = terms.transpose(2, 3)?.reshape((batch, heads, chunks * self.chunk, d + 1))?;
        let terms = terms.narrow(2, 0, tokens)?;
        // A token's own key is its only exact one: e to the power of nothing.
        let values = v.narrow(2, 0, tokens)?.unsqueeze(2)?;
        let values = values.broadcast_as((batch, selection_heads, group, tokens, d))?;
        let numerator = (terms.narrow(3, 0, d)? + values.reshape(self.q.shape())?)?;
        let denominator = (terms.narrow(3, d, 1)? + 1.0)?;
        numerator.broadcast_div(&denominator)?.to_dtype(self.q.dtype())
    }
}

/// `φ(x) = [softmax(u) ; softmax(−u)]`, `u = ‖x‖ f/‖f‖`, `f = x W`: `x` `[B, heads, N, D]`, `map` `[heads, D, F]`.
fn features(x: &Tensor, map: &Tensor) -> Result<Tensor> {
    let norm = |x: &Tensor| x.sqr()?.sum_keepdim(D::Minus1)?.sqrt();
    let f = x.contiguous()?.broadcast_matmul(&map.unsqueeze(0)?)?;
    let lengths = norm(x)?.broadcast_div(&norm(&f)?.maximum(1e-12)?)?;
    let u = f.broadcast_mul(&lengths)?;
    Tensor::cat(&[softmax(&u)?, softmax(&u.neg()?)?], D::Minus1)
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    // Softmax does not depend on what is taken away.
    let powers = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

/// `[1, chunks, chunks]`: 1 where the column's chunk has retired for the queries of the row's.
fn retired(chunks: usize, like: &Tensor) -> Result<Tensor> {
    let at = |i: usize| f32::from(u8::from(i % chunks + 2 <= i / chunks));
    let values: Vec<f32> = (0..chunks * chunks).map(at).collect();
    Tensor::from_vec(values, (1, chunks, chunks), like.device())?.to_dtype(like.dtype())
}

/// Bits of bytes, the lowest first, as 0 and 1: `[…, n]` u8 → `[…, 8 n]` f32.
pub(crate) fn bits(bytes: &Tensor) -> Result<Tensor> {
    let mut shape = bytes.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last *= 8;
    }
    let powers: Vec<f32> = (0..8).map(|bit| 0.5_f32.powi(bit)).collect();
    let powers = Tensor::from_vec(powers, 8, bytes.device())?;
    let shifted = bytes.to_dtype(DType::F32)?.unsqueeze(bytes.rank())?.broadcast_mul(&powers)?;
    (shifted.floor()? - ((shifted * 0.5)?.floor()? * 2.0)?)?.reshape(shape)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use still_testing::{assert_relative_rms, random};

    use super::*;
    use crate::{
        Branches, HeadGeometry, HybridConfig, HybridWeights, LinearNorm, StillConfig,
        hybrid_attention,
    };

    /// Output and gradients in float64 against the CPU's kernel of the whole operator.
    #[test]
    fn it_is_the_operator_with_the_other_branches_off() {
        let geometry = HeadGeometry { num_heads: 6, num_key_value_heads: 2, head_dim: 4 };
        let layer = StillConfig::uniform(1, geometry, 8, 3).layer(0).unwrap();
        let branches = Branches { window: false, salient: false, linear: true };
        for (tokens, linear_norm) in
            [(61, LinearNorm::Mean), (64, LinearNorm::Mean), (61, LinearNorm::Sum)]
        {
            let config = HybridConfig { linear_norm, branches, ..layer.clone() };
            let vars = [
                random(&[2, 6, tokens, 4], 1),
                random(&[2, 2, tokens, 4], 2),
                random(&[2, 2, tokens, 4], 3),
                random(&[6, 4, 4], 4),
                random(&[2, 4, 4], 5),
                random(&[6], 6),
            ]
            .map(|tensor| Var::from_tensor(&tensor).unwrap());
            let [q, k, v, map_q, map_k, log_lambda] = vars.each_ref().map(|var| var.as_tensor());
            let log_scale = (linear_norm == LinearNorm::Mean).then_some(log_lambda);
            let weights = HybridWeights {
                feature_map_q: map_q.clone(),
                feature_map_k: map_k.clone(),
                householder_q: None,
                householder_k: None,
                log_lambda: log_scale.cloned(),
                window_factor: None,
            };
            let expected = hybrid_attention(q, k, v, &weights, None, &config, None).unwrap();
            let selection = expected.routing.selection().unwrap();
            let kept = |&at: &u32| f64::from(u8::from(at != crate::Selection::NEVER));
            let absorbed: Vec<f64> = selection.absorbed_at.iter().map(kept).collect();
            let absorbed = Tensor::from_vec(absorbed, (2, 2, tokens), &Device::Cpu).unwrap();
            let absorbed = absorbed.pad_with_zeros(2, 0, tokens.div_ceil(8) * 8 - tokens).unwrap();
            let branch =
                LinearBranch { q, k, v, map_q, map_k, log_scale, absorbed: &absorbed, chunk: 8 };
            let got = branch.forward().unwrap();
            assert_relative_rms("output", &got, &expected.out, 1e-10);
            let weight = random(got.dims(), 7);
            let gradients = |out: &Tensor| (out * &weight).unwrap().sum_all().unwrap().backward();
            let (got, expected) = (gradients(&got).unwrap(), gradients(&expected.out).unwrap());
            let names = ["q", "k", "v", "map_q", "map_k", "log_lambda"];
            for (name, var) in names.into_iter().zip(&vars) {
                if name != "log_lambda" || log_scale.is_some() {
                    assert_relative_rms(
                        name,
                        got.get(var).unwrap(),
                        expected.get(var).unwrap(),
                        1e-10,
                    );
                }
            }
        }
    }

    #[test]
    fn bits_come_lowest_first() {
        let bytes = Tensor::new(&[[0_u8, 1], [0b1010_0110, 255]], &Device::Cpu).unwrap();
        let expected = [0_u64, 1 << 0, 0b1010_0110, 255];
        let got: Vec<f32> = bits(&bytes).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        for (got, byte) in got.chunks(8).zip(expected) {
            let byte_of = |(bit, &x): (usize, &f32)| (x as u64) << bit;
            assert_eq!(got.iter().enumerate().map(byte_of).sum::<u64>(), byte);
        }
    }
}
