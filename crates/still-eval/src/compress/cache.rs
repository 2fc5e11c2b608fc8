//! The rows that stayed of one context or several, and reading on with them.

use candle_core::{DType, Tensor};
use still_attention::RowDtype;
use still_model::Model;

use super::attention::{ABSENT, Rows, attend, later};
use super::context::scale_of;
use super::select::Kept;
use crate::error::{EvalError, Result};

/// What sequences attend to: rows that were kept, and those of every token since.
#[derive(Clone, Debug)]
pub(crate) struct CompressedCache {
    /// By layer.
    kept: Vec<Rows>,
    /// Rows of what was read since, by layer: apart, since those kept may be many, and a row more would copy them.
    since: Vec<Option<Rows>>,
    /// Tokens read, by sequence.
    positions: Vec<usize>,
    /// Rows of all heads and layers, by sequence.
    rows: Vec<usize>,
    /// Of a row of K and its row of V.
    row_bytes: usize,
}

impl CompressedCache {
    /// The rows `kept` of a context of `tokens` tokens, stored as `dtype`.
    pub(super) fn new(
        layers: &[Rows],
        kept: &Kept,
        tokens: usize,
        dtype: RowDtype,
    ) -> Result<Self> {
        let rows = kept.iter().flatten().map(Vec::len).sum();
        let width = layers.first().map_or(Ok(0), |rows| rows.k.dim(3))?;
        let picked = layers.iter().zip(kept).map(|(rows, kept)| pick(rows, kept));
        Ok(Self {
            kept: picked.collect::<Result<_>>()?,
            since: vec![None; layers.len()],
            positions: vec![tokens],
            rows: vec![rows],
            row_bytes: 2 * dtype.row_bytes(width),
        })
    }

    /// The same for each of `count` sequences, of a cache of one.
    pub fn repeat(&self, count: usize) -> Result<Self> {
        Self::join(&vec![self; count])
    }

    /// Sequences of several caches in one, which nothing was read with yet.
    pub fn join(caches: &[&Self]) -> Result<Self> {
        let Some(first) = caches.first() else {
            return Err(EvalError::Argument("no cache was given to join".into()));
        };
        if caches.iter().any(|cache| cache.since.iter().any(Option::is_some)) {
            return Err(EvalError::Argument(
                "caches are joined before they are read on with".into(),
            ));
        }
        let layer = |n: usize| {
            let rows: Vec<&Rows> = caches.iter().map(|cache| &cache.kept[n]).collect();
            stack(&rows)
        };
        Ok(Self {
            kept: (0..first.kept.len()).map(layer).collect::<Result<_>>()?,
            since: first.since.clone(),
            positions: caches.iter().flat_map(|cache| cache.positions.clone()).collect(),
            rows: caches.iter().flat_map(|cache| cache.rows.clone()).collect(),
            row_bytes: first.row_bytes,
        })
    }

    /// Bytes that the rows of a sequence take as stored; where each head's begin is not counted.
    pub fn size_bytes(&self, sequence: usize) -> usize {
        self.rows[sequence] * self.row_bytes
    }

    /// Feeds tokens of every sequence; the final-normed hidden states `[B, T, E]`, of shorter sequences followed by others.
    pub fn feed(&mut self, model: &Model, ids: &[&[u32]]) -> Result<Tensor> {
        let longest = ids.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let padded =
            |ids: &&[u32]| ids.iter().copied().chain(std::iter::repeat(0)).take(longest).collect();
        let fed: Vec<Vec<u32>> = ids.iter().map(padded).collect();
        let decoder = &model.decoder;
        let x = decoder.embed(&fed.concat())?;
        let x = x.reshape((ids.len(), longest, decoder.config.hidden_size))?;
        let rotation = decoder.rotation_at(&self.positions, longest)?;
        let absent = self.padding(model, ids, longest)?;
        let later = later(longest, model.device())?;
        let (kept, since) = (&self.kept, &mut self.since);
        let x = decoder.visit_layers::<EvalError>(x, &rotation, None, |n, layer, inputs| {
            let mut own = Rows::new(&inputs.k, &inputs.v)?;
            own.absent.clone_from(&absent);
            let own = match since[n].take() {
                Some(since) => since.then(&own)?,
                None => own,
            };
            let output = attend(&inputs.q, &[&kept[n], &own], scale_of(layer), &later);
            since[n] = Some(own);
            output
        })?;
        let heads = decoder.layers.len() * decoder.config.num_key_value_heads;
        for ((position, rows), ids) in self.positions.iter_mut().zip(&mut self.rows).zip(ids) {
            *position += ids.len();
            *rows += heads * ids.len();
        }
        Ok(decoder.final_norm(&x)?)
    }

    /// `[B, K, T]`: [`ABSENT`] for what is fed after a sequence's end. `None` if all are as long.
    fn padding(&self, model: &Model, ids: &[&[u32]], longest: usize) -> Result<Option<Tensor>> {
        if ids.iter().all(|ids| ids.len() == longest) {
            return Ok(None);
        }
        let row = |ids: &&[u32]| {
            let there = ids.len();
            (0..longest).map(move |t| if t < there { 0.0 } else { ABSENT })
        };
        let mask: Vec<f32> = ids.iter().flat_map(row).collect();
        let mask = Tensor::from_vec(mask, (ids.len(), 1, longest), model.device())?;
        let kv_heads = model.config().num_key_value_heads;
        Ok(Some(mask.broadcast_as((ids.len(), kv_heads, longest))?.contiguous()?))
    }
}

/// The rows of one sequence that each head keeps, filled up to the longest head's; at least one, so that no tensor is empty.
fn pick(rows: &Rows, kept: &[Vec<usize>]) -> Result<Rows> {
    let most = kept.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let device = rows.k.device();
    let head = |head: usize| -> Result<Rows> {
        let of_head = |rows: &Tensor| Ok::<_, EvalError>(rows.narrow(1, head, 1)?);
        let kept = &kept[head];
        let at: Vec<u32> = kept.iter().map(|&row| row as u32).collect();
        let fill = most - kept.len();
        let taken = |rows: &Tensor| -> Result<Tensor> {
            let rows = of_head(rows)?.contiguous()?;
            if kept.is_empty() {
                let (batch, heads, _, width) = rows.dims4()?;
                return Ok(Tensor::zeros((batch, heads, fill, width), DType::F32, device)?);
            }
            let at = Tensor::new(at.as_slice(), device)?;
            Ok(rows.index_select(&at, 2)?.pad_with_zeros(2, 0, fill)?)
        };
        let absent = std::iter::repeat_n(0.0_f32, kept.len());
        let absent: Vec<f32> = absent.chain(std::iter::repeat_n(ABSENT, fill)).collect();
        let absent = Tensor::from_vec(absent, (1, 1, most), device)?;
        Ok(Rows { k: taken(&rows.k)?, v: taken(&rows.v)?, absent: Some(absent) })
    };
    let heads: Vec<Rows> = (0..kept.len()).map(head).collect::<Result<_>>()?;
    let join = |of: fn(&Rows) -> &Tensor| Tensor::cat(&heads.iter().map(of).collect::<Vec<_>>(), 1);
    let absent = match kept.iter().all(|kept| kept.len() == most) {
        true => None,
        false => {
            Some(Tensor::cat(&heads.iter().map(Rows::absence).collect::<Result<Vec<_>>>()?, 1)?)
        }
    };
    Ok(Rows { k: join(|r| &r.k)?, v: join(|r| &r.v)?, absent })
}

/// Rows of several sequences, filled up to the longest.
fn stack(all: &[&Rows]) -> Result<Rows> {
    let lengths: Vec<usize> =
        all.iter().map(|rows| rows.k.dim(2)).collect::<candle_core::Result<_>>()?;
    let most = lengths.iter().copied().max().unwrap_or(0);
    let filled = |of: fn(&Rows) -> &Tensor| -> Result<Tensor> {
        let filled = all
            .iter()
            .zip(&lengths)
            .map(|(rows, &length)| of(rows).pad_with_zeros(2, 0, most - length));
        Ok(Tensor::cat(&filled.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    };
    let absent = || -> Result<Tensor> {
        let absent = all.iter().zip(&lengths).map(|(rows, &length)| -> Result<Tensor> {
            let (batch, heads, _, _) = rows.k.dims4()?;
            if length == most {
                return rows.absence();
            }
            let shape = (batch, heads, most - length);
            let fill = Tensor::full(ABSENT, shape, rows.k.device())?;
            Ok(Tensor::cat(&[&rows.absence()?, &fill], 2)?)
        });
        Ok(Tensor::cat(&absent.collect::<Result<Vec<_>>>()?, 0)?)
    };
    let all_there = all.iter().zip(&lengths).all(|(rows, &n)| rows.absent.is_none() && n == most);
    let absent = if all_there { None } else { Some(absent()?) };
    Ok(Rows { k: filled(|rows| &rows.k)?, v: filled(|rows| &rows.v)?, absent })
}
