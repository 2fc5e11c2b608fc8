//! Reads a context with full attention, and compresses what was read.

use candle_core::{DType, Tensor};
use still_attention::RowDtype;
use still_model::{DecoderLayer, Model};

use super::attention::Rows;
use super::cache::CompressedCache;
use super::scores::{OBSERVED, Scores, h2o, snapkv};
use super::select::{Kept, Sizes, observed};
use super::{Compression, Method, reconstruction, retrieval};
use crate::error::{EvalError, Result};

/// Compresses contexts that a dense model reads.
#[derive(Debug)]
pub(crate) struct Compressor<'a> {
    model: &'a Model,
    compression: Compression,
    dtype: RowDtype,
    /// Of retrieval heads, if the method wants them.
    head_scores: Vec<Vec<f32>>,
}

/// A context that was read.
pub(super) struct Context {
    pub layers: Vec<Rows>,
    /// Which rows stay.
    pub kept: Kept,
    /// Final-normed hidden states `[N, E]`.
    pub hidden: Tensor,
}

impl<'a> Compressor<'a> {
    /// `dtype`: as the cache stores rows.
    ///
    /// # Errors
    /// A student, layers with a sliding window, rows that are not stored value by value.
    pub fn new(model: &'a Model, compression: Compression, dtype: RowDtype) -> Result<Self> {
        let refused = |what: &str| Err(EvalError::Argument(format!("{compression}: {what}")));
        if model.student.is_some() {
            return refused("the caches of dense models are compressed, and this is a student");
        }
        if model.decoder.layers.iter().any(|layer| layer.sliding_window.is_some()) {
            return refused("the model has layers with a sliding window, whose rows go anyway");
        }
        if dtype.is_coded() {
            return refused("rows are kept as they are: use --cache-dtype f32, bf16 or f16");
        }
        let head_scores = match compression.method {
            Method::DuoAttention => retrieval::retrieval(model)?,
            _ => Vec::new(),
        };
        Ok(Self { model, compression, dtype, head_scores })
    }

    /// Which model it compresses caches of.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// By which method.
    pub fn method(&self) -> Method {
        self.compression.method
    }

    /// Reads a context that the token `next` comes after; what is left of its cache, and its final-normed hidden states `[N, E]`,
    /// which are the dense model's. A method that sees the question sees `next`, its last token, too; no row of `next` is left.
    pub fn read(&self, ids: &[u32], next: u32) -> Result<(CompressedCache, Option<Tensor>)> {
        if ids.is_empty() {
            let nothing = self.empty_rows()?;
            let kept =
                vec![vec![Vec::new(); self.model.config().num_key_value_heads]; nothing.len()];
            return Ok((CompressedCache::new(&nothing, &kept, 0, self.dtype)?, None));
        }
        let Context { layers, kept, hidden } = self.context(ids, next)?.0;
        let cache = CompressedCache::new(&layers, &kept, ids.len(), self.dtype)?;
        Ok((cache, Some(hidden.narrow(0, 0, ids.len())?)))
    }

    /// What a context's rows are and which of them stay; with a row and a hidden state more, of `next`, if the method sees that. And what
    /// rows were chosen by, `[layer][K][…]`: nothing where their places decide, or whole heads are chosen.
    pub(super) fn context(&self, ids: &[u32], next: u32) -> Result<(Context, Vec<Scores>)> {
        let mut seen = ids.to_vec();
        if self.method().sees_question() {
            seen.push(next);
        }
        let (layers, mut scores, hidden) = self.dense(&seen)?;
        if self.method() == Method::KvZip {
            scores = reconstruction::kvzip(self.model, &seen, &layers)?;
        }
        let mut kept = self.select(&seen, &scores);
        kept.iter_mut().flatten().for_each(|rows| rows.retain(|&row| row < ids.len()));
        Ok((Context { layers, kept, hidden }, scores))
    }

    fn sizes(&self, tokens: usize) -> Sizes {
        let config = self.model.config();
        Sizes {
            tokens,
            layers: config.num_hidden_layers,
            kv_heads: config.num_key_value_heads,
            fraction: self.compression.fraction,
        }
    }

    /// How many of the last tokens SnapKV observes.
    fn observed(&self, tokens: usize) -> usize {
        observed(OBSERVED, self.sizes(tokens).per_head())
    }

    /// Rows of every layer, scores where the method takes them from the context's own attention, hidden states.
    fn dense(&self, ids: &[u32]) -> Result<(Vec<Rows>, Vec<Scores>, Tensor)> {
        let decoder = &self.model.decoder;
        let observed = self.observed(ids.len());
        let (mut layers, mut scores) = (Vec::new(), Vec::new());
        let rotation = decoder.rotation(0, ids.len())?;
        let x = decoder.visit_layers::<EvalError>(
            decoder.embed(ids)?,
            &rotation,
            None,
            |_, layer, inputs| {
                let (q, k, scale) = (&inputs.q, &inputs.k, scale_of(layer));
                match self.compression.method {
                    Method::SnapKv => scores.push(snapkv(q, k, observed, scale)?),
                    Method::H2o => scores.push(h2o(q, k, scale)?),
                    _ => {}
                }
                layers.push(Rows::new(&self.stored(k)?, &self.stored(&inputs.v)?)?);
                Ok(layer.softmax_attention(inputs)?)
            },
        )?;
        Ok((layers, scores, decoder.final_norm(&x)?.squeeze(0)?))
    }

    /// Values as the cache stores them.
    fn stored(&self, rows: &Tensor) -> Result<Tensor> {
        Ok(match self.dtype {
            RowDtype::Bf16 => rows.to_dtype(DType::BF16)?,
            RowDtype::F16 => rows.to_dtype(DType::F16)?,
            _ => rows.clone(),
        })
    }

    /// Which rows stay.
    fn select(&self, ids: &[u32], scores: &[Scores]) -> Kept {
        let sizes = self.sizes(ids.len());
        match self.compression.method {
            Method::SnapKv => sizes.snapkv(scores, self.observed(ids.len())),
            Method::KvZip => sizes.kvzip(scores),
            Method::DuoAttention => sizes.duo_attention(&self.head_scores),
            Method::H2o => sizes.h2o(scores),
            Method::StreamingLlm => sizes.streaming_llm(),
            Method::Random => sizes.random(seed_of(ids)),
        }
    }

    /// One row of zeros a head, which no head keeps.
    fn empty_rows(&self) -> Result<Vec<Rows>> {
        let config = self.model.config();
        let shape = (1, config.num_key_value_heads, 1, config.head_dim);
        let zeros = Tensor::zeros(shape, DType::F32, self.model.device())?;
        (0..config.num_hidden_layers).map(|_| Rows::new(&zeros, &zeros)).collect()
    }
}

/// What `q·k` of a layer is multiplied by.
pub(super) fn scale_of(layer: &DecoderLayer) -> f64 {
    layer.logit_scale.unwrap_or(1.0 / (layer.head_dim as f64).sqrt())
}

/// Contexts of their own have chances of their own (FNV-1a).
fn seed_of(ids: &[u32]) -> u64 {
    let hash = |hash: u64, id: &u32| (hash ^ u64::from(*id)).wrapping_mul(0x100_0000_01b3);
    ids.iter().fold(0xcbf2_9ce4_8422_2325, hash)
}
