//! Products of a small batch's rows: one kernel for several matrices, with the norm before them and what is added after.

use std::ptr::null;

use candle_core::{DType, Result, Tensor, bail};
use still_compute::cuda::{kind, queue_any};
use still_kernels::decoder::{
    FACTORS, Factor as Place, SMALL_BATCH_ROWS, SmallBatchProducts, still_small_batch_products,
};

use crate::decoder::Lora;

/// Rows of a small batch.
pub(super) const MOST: usize = SMALL_BATCH_ROWS;

/// What widths are multiples of.
pub(super) const UNIT: usize = 8;

/// The rows `x` `[rows, in]`, and the weight and ε of the norm that they go through first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Normed<'a> {
    pub x: &'a Tensor,
    pub norm: Option<(&'a Tensor, f64)>,
}

/// A matrix `[out, in]` and what its product is added to.
#[derive(Clone, Debug)]
pub(super) struct Factor<'a> {
    pub weight: &'a Tensor,
    /// `[out]`
    pub bias: Option<&'a Tensor>,
    /// `[rows, out]`
    pub add: Option<&'a Tensor>,
    /// With `x Aᵀ`, `[rows, rank]` f32.
    pub update: Option<(&'a Lora, Tensor)>,
}

impl<'a> Factor<'a> {
    /// The matrix alone.
    pub fn new(weight: &'a Tensor) -> Self {
        Self { weight, bias: None, add: None, update: None }
    }
}

impl Normed<'_> {
    /// The products with `factors`, each `[rows, out]` of `dtype`, which is that of `x` or f32.
    ///
    /// # Errors
    /// Shapes or dtypes that have no kernel; more rows or factors than a kernel takes.
    pub fn products(self, factors: &[Factor<'_>], dtype: DType) -> Result<Vec<Tensor>> {
        self.run(factors, dtype, false)
    }

    /// `silu(x gateᵀ) ⊙ x upᵀ`, `[rows, out]`.
    ///
    /// # Errors
    /// As [`Normed::products`].
    pub fn gated(self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        if gate.dims() != up.dims() {
            bail!("small-batch products: gate {:?} and up {:?} differ", gate.dims(), up.dims())
        }
        let mut made = self.run(&[Factor::new(gate), Factor::new(up)], self.x.dtype(), true)?;
        Ok(made.remove(0))
    }

    fn run(self, factors: &[Factor<'_>], dtype: DType, gated: bool) -> Result<Vec<Tensor>> {
        let (rows, inner) = self.x.dims2()?;
        let Some(weight_dtype) = factors.first().map(|factor| factor.weight.dtype()) else {
            bail!("small-batch products: of no matrix")
        };
        if rows > MOST || factors.len() > FACTORS || !inner.is_multiple_of(UNIT) {
            bail!("small-batch products: {rows} rows of {inner} values, {} matrices", factors.len())
        }
        let mut inputs = Vec::new();
        // Where among the inputs a tensor is, once it is known to be what the kernel takes it for.
        let mut place = |tensor: Option<&Tensor>, shape: &[usize], dtype: DType| {
            let Some(tensor) = tensor else { return Ok(None) };
            let count: usize = shape.iter().product();
            if tensor.elem_count() != count || tensor.dtype() != dtype {
                let (dims, got) = (tensor.dims(), tensor.dtype());
                bail!("small-batch products: expected {shape:?} {dtype:?}, got {dims:?} {got:?}")
            }
            inputs.push(tensor.detach().contiguous()?);
            Ok(Some(inputs.len() - 1))
        };
        let row_dtype = self.x.dtype();
        let x = place(Some(self.x), &[rows, inner], row_dtype)?;
        let norm = place(self.norm.map(|(weight, _)| weight), &[inner], row_dtype)?;
        let mut places = Vec::with_capacity(factors.len());
        let mut outputs = Vec::with_capacity(factors.len());
        for Factor { weight, bias, add, update } in factors {
            let out = weight.dim(0)?;
            let rank = update.as_ref().map_or(Ok(0), |(lora, _)| lora.a.dim(0))?;
            places.push((
                [out, rank],
                [
                    place(Some(weight), &[out, inner], weight_dtype)?,
                    place(*bias, &[out], row_dtype)?,
                    place(*add, &[rows, out], row_dtype)?,
                    place(update.as_ref().map(|(lora, _)| &lora.b), &[out, rank], DType::F32)?,
                    place(update.as_ref().map(|(_, low)| low), &[rows, rank], DType::F32)?,
                ],
            ));
            outputs.push(((rows, out).into(), dtype));
        }
        if gated {
            outputs.truncate(1);
        }
        let (kind_of_x, kind_of_weights, kind_of_outputs) =
            (kind(row_dtype)?, kind(weight_dtype)?, kind(dtype)?);
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        queue_any("still_small_batch_products", &inputs, outputs, |from, to, stream| {
            let at = |place: Option<usize>| place.map_or(null(), |place| from[place].cast_const());
            let args = SmallBatchProducts {
                dtype: kind_of_x,
                weight_dtype: kind_of_weights,
                to_dtype: kind_of_outputs,
                rows: rows as i32,
                inner: inner as i32,
                count: factors.len() as i32,
                gated: i32::from(gated),
                eps: self.norm.map_or(0.0, |(_, eps)| eps as f32),
                x: at(x),
                norm: at(norm),
            };
            let factors: Vec<Place> = places
                .iter()
                .zip(factors)
                .enumerate()
                .map(|(n, (&([out, rank], [weight, bias, add, update, low]), factor))| Place {
                    out: out as i32,
                    rank: rank as i32,
                    update_scale: factor.update.as_ref().map_or(0.0, |(lora, _)| lora.scale as f32),
                    weight: at(weight),
                    bias: at(bias),
                    add: at(add),
                    update: at(update).cast(),
                    low: at(low).cast(),
                    to: to.get(n).copied().unwrap_or(std::ptr::null_mut()),
                })
                .collect();
            // SAFETY: every tensor is contiguous and as large as decoder.h says, which `place` has seen to; a gated product
            // writes to the first alone.
            unsafe { still_small_batch_products(&raw const args, factors.as_ptr(), stream) }
        })
    }
}
