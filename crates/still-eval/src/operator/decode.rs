//! One token after another through a state that has read a prefix.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use still_attention::{
    AttentionState, HeadGeometry, HeadScratch, HybridConfig, HybridState, HybridWeights, KvCache,
    PreparedWeights, RowDtype,
};
use still_model::{ModelError, Result};

/// Copies of a state take so much together, more than any cache holds: a model's layers do not find theirs in one either.
const LEAST_BYTES: usize = 1 << 28;

/// Layers of a large model: of small states there are no more copies than these.
const MOST_COPIES: usize = 32;

/// What is decoded.
pub(super) struct Decoded<'a> {
    pub geometry: HeadGeometry,
    /// None: dense attention.
    pub hybrid: Option<(&'a HybridConfig, &'a HybridWeights)>,
    /// How a state stores exact rows.
    pub rows: RowDtype,
    /// Q, K and V of the tokens that are read first.
    pub prefix: [Tensor; 3],
    /// Of the token that comes again and again.
    pub token: [Tensor; 3],
    /// How often it does.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "a state on the CPU makes room as it goes")
    )]
    pub steps: usize,
}

/// Equal states next to each other, as a model's layers are.
pub(super) struct Steps {
    pub copies: usize,
    /// Feeds one token to each.
    pub step: Box<dyn FnMut() -> Result<()>>,
}

/// Reads the prefix.
pub(super) fn steps(decoded: Decoded<'_>) -> Result<Steps> {
    let batch = decoded.prefix[0].dim(0)?;
    match (decoded.prefix[0].device().clone(), decoded.hybrid) {
        (Device::Cpu, Some((config, weights))) => {
            let weights = PreparedWeights::new(decoded.geometry, config, weights)?;
            let mut state = HybridState::new(weights, batch, decoded.rows);
            let [q, k, v] = &decoded.prefix;
            state.advance(q, k, v, None, None)?;
            let mut states = copies(&state, state.size_bytes());
            let [q, k, v] = decoded.token;
            Ok(Steps {
                copies: states.len(),
                step: Box::new(move || {
                    for state in &mut states {
                        state.advance(&q, &k, &v, None, None)?;
                    }
                    Ok(())
                }),
            })
        }
        (Device::Cpu, None) => dense_on_cpu(&decoded, batch),
        #[cfg(feature = "cuda")]
        (Device::Cuda(_), Some((config, weights))) => {
            super::cuda::hybrid(&decoded, config, weights, batch)
        }
        #[cfg(feature = "cuda")]
        (Device::Cuda(_), None) => super::cuda::dense(&decoded, batch),
        (device, _) => Err(ModelError::Unsupported {
            what: format!("a decode step on {:?}", device.location()),
            found_in: None,
            hint: "use the CPU, or CUDA in a program built with the feature `cuda`".into(),
        }),
    }
}

/// As a model's step does it: each head by one thread.
fn dense_on_cpu(decoded: &Decoded<'_>, batch: usize) -> Result<Steps> {
    let HeadGeometry { num_heads, num_key_value_heads, head_dim: d } = decoded.geometry;
    let mut cache = KvCache::new(decoded.geometry, batch, decoded.rows);
    let [q, k, v] = &decoded.prefix;
    cache.advance(q, k, v, None)?;
    let caches = copies(&cache, cache.size_bytes());
    let values = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let [q, k, v] = &decoded.token;
    let (q, k, v) = (values(q)?, values(k)?, values(v)?);
    let group = num_heads / num_key_value_heads * d;
    let mut out = vec![f32::NAN; q.len()];
    Ok(Steps {
        copies: caches.len(),
        step: Box::new(move || {
            for cache in &caches {
                let heads = out.par_chunks_mut(group).zip(q.par_chunks(group)).enumerate();
                heads.for_each_init(HeadScratch::default, |scratch, (part, (out, q))| {
                    let row = part * d..(part + 1) * d;
                    cache.head(part).feed(q, &k[row.clone()], &v[row], scratch, out);
                });
            }
            Ok(())
        }),
    })
}

/// As many as are not found in a cache.
pub(super) fn copies<T: Clone>(state: &T, bytes: usize) -> Vec<T> {
    vec![state.clone(); LEAST_BYTES.div_ceil(bytes.max(1)).min(MOST_COPIES)]
}
