//! A frozen projection with its low-rank update, `x Wᵀ + s (x Aᵀ) Bᵀ`, in one op.
//!
//! As separate ops the update, its scaled copy and their gradients would each be a tensor as large as the output.

use std::borrow::Cow;
use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};
use still_compute::Real;
use still_compute::matmul::{Mat, par_matmul, par_matmul_new};

use super::residual::add_into;
use super::{Dropout, device, slice, with_values};
use crate::decoder::{Lora, Weight};

/// `x` `[…, in]` times `weight` `[out, in]` transposed, plus the update: `[…, out]`. Dropout, if there is one, takes
/// from the update's input alone.
///
/// Gradients flow to `x`, `A` and `B`.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub fn low_rank_linear(x: &Tensor, weight: &Weight, lora: &Lora) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let (rank, _) = lora.a.dims2()?;
    let fits = x.dims().last() == Some(&inner)
        && lora.a.dims() == [rank, inner]
        && lora.b.dims() == [out, rank];
    if !fits {
        candle_core::bail!(
            "low_rank_linear: x is {:?}, weight {:?}, A {:?}, B {:?}",
            x.dims(),
            (out, inner),
            lora.a.dims(),
            lora.b.dims()
        )
    }
    if !x.device().is_cpu() {
        return device::low_rank_linear(x, weight.dense()?, lora);
    }
    let (x, a, b) = (x.contiguous()?, lora.a.contiguous()?, lora.b.contiguous()?);
    match x.dtype() {
        DType::F32 => x.apply_op3(&a, &b, LowRank::<f32>::new(weight, lora)),
        DType::F64 => x.apply_op3(&a, &b, LowRank::<f64>::new(weight, lora)),
        other => {
            candle_core::bail!("low_rank_linear: no kernel for {other:?}, expected f32 or f64")
        }
    }
}

struct LowRank<T> {
    weight: Weight,
    scale: f64,
    dropout: Option<Dropout>,
    dtype: PhantomData<fn() -> T>,
}

/// Sizes of one call.
struct Sizes {
    rows: usize,
    inner: usize,
    out: usize,
    rank: usize,
}

impl<T: Real> LowRank<T> {
    fn new(weight: &Weight, lora: &Lora) -> Self {
        let weight = weight.clone();
        Self { weight, scale: lora.scale, dropout: lora.dropout, dtype: PhantomData }
    }

    /// What the update reads of `x`.
    fn dropped<'a>(&self, x: &'a [T]) -> Cow<'a, [T]> {
        let Some(dropout) = &self.dropout else { return Cow::Borrowed(x) };
        let mut x = x.to_vec();
        dropout.apply(&mut x);
        Cow::Owned(x)
    }

    fn sizes(&self, x: usize, a: usize) -> Result<Sizes> {
        let (out, inner) = self.weight.dims2()?;
        Ok(Sizes { rows: x / inner, inner, out, rank: a / inner })
    }

    /// `s x Aᵀ`, `[rows, rank]`.
    fn down(&self, &Sizes { rows, inner, rank, .. }: &Sizes, x: &[T], a: &[T]) -> Vec<T> {
        let mut y =
            par_matmul_new((rows, rank, inner), Mat::rows(x, inner), Mat::rows(a, inner).t());
        y.iter_mut().for_each(|y| *y *= T::of(self.scale));
        y
    }

    fn forward(&self, x: &[T], a: &[T], b: &[T]) -> Result<Vec<T>> {
        let sizes = self.sizes(x.len(), a.len())?;
        let Sizes { rows, out, rank, .. } = sizes;
        let mut y = self.weight.multiply(x)?;
        let low = self.down(&sizes, &self.dropped(x), a);
        let (low, b) = (Mat::rows(&low, rank), Mat::rows(b, rank).t());
        par_matmul((rows, out, rank), &mut y, out, true, low, b);
        Ok(y)
    }

    /// Gradients of `x`, `A` and `B`.
    fn backward(&self, x: &[T], a: &[T], b: &[T], dy: &[T]) -> Result<[Vec<T>; 3]> {
        let sizes = self.sizes(x.len(), a.len())?;
        let Sizes { rows, inner, out, rank } = sizes;
        let mut dx = self.weight.with_values(|w| {
            par_matmul_new((rows, inner, out), Mat::rows(dy, out), Mat::rows(w, inner))
        })?;
        let dy = Mat::rows(dy, out);
        let mut up = par_matmul_new((rows, rank, out), dy, Mat::rows(b, rank));
        up.iter_mut().for_each(|up| *up *= T::of(self.scale));
        let up = Mat::rows(&up, rank);
        let a_rows = Mat::rows(a, inner);
        match &self.dropout {
            None => par_matmul((rows, inner, rank), &mut dx, inner, true, up, a_rows),
            Some(dropout) => {
                let mut through_update = par_matmul_new((rows, inner, rank), up, a_rows);
                dropout.apply(&mut through_update);
                add_into(&mut dx, &through_update);
            }
        }
        let x = self.dropped(x);
        let da = par_matmul_new((rank, inner, rows), up.t(), Mat::rows(&x, inner));
        let low = self.down(&sizes, &x, a);
        let db = par_matmul_new((out, rank, rows), dy.t(), Mat::rows(&low, rank));
        Ok([dx, da, db])
    }
}

impl<T: Real> CustomOp3 for LowRank<T> {
    fn name(&self) -> &'static str {
        "low_rank_linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.forward(slice(x, x_layout)?, slice(a, a_layout)?, slice(b, b_layout)?)?;
        let mut shape = x_layout.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.weight.dims2()?.0;
        }
        Ok((T::to_cpu_storage_owned(y), shape.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, da, db] = with_values(x, |x| {
            with_values(a, |a| with_values(b, |b| with_values(dy, |dy| self.backward(x, a, b, dy))))
        })?????;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dx, x)?), Some(tensor(da, a)?), Some(tensor(db, b)?)))
    }
}
