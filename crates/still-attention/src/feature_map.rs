//! The feature maps of the linear branch as a differentiable tensor op.

use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::config::FeatureMap;
use crate::cpu::feature_map::{map_into, map_rows_backward};
use crate::cpu::linalg::Mat;
use crate::error::{AttentionError, Result};
use crate::real::Real;
use crate::tensor::slice;
use crate::vector::vectorize;

/// `φ` of `x` `[B, X, N, D]` under `w` `[S, D, F]`, `S` a multiple of `X`: `[B, S, N, 2F]`.
///
/// Differentiable in both. f32 or f64 on the CPU.
///
/// # Errors
/// Shapes that contradict each other; a dtype or device without a kernel.
pub fn feature_map(map: FeatureMap, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (_, x_heads, _, head_dim) = x.dims4()?;
    let (heads, w_rows, _) = w.dims3()?;
    if w_rows != head_dim || heads % x_heads != 0 {
        return Err(AttentionError::Shape {
            op: "feature_map",
            tensor: "w",
            expected: format!("[a multiple of {x_heads}, {head_dim}, F]"),
            got: w.dims().to_vec(),
        });
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    match x.dtype() {
        DType::F32 => Ok(x.apply_op2(&w, MapOp::<f32>::new(map))?),
        DType::F64 => Ok(x.apply_op2(&w, MapOp::<f64>::new(map))?),
        other => Err(AttentionError::Unsupported {
            op: "feature_map",
            tensor: "x",
            expected: "f32 or f64",
            got: other.as_str().into(),
        }),
    }
}

/// `H_û W = W − 2 û (ûᵀ W)` per head: a reflection keeps `‖x‖`, so that it folds into the matrix.
///
/// `w` `[S, D, F]`, `u` `[S, D]` (any length, never zero).
///
/// # Errors
/// Shapes that contradict each other.
pub fn fold_householder(w: &Tensor, u: &Tensor) -> Result<Tensor> {
    let unit = u.broadcast_div(&u.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?;
    let row = unit.unsqueeze(1)?;
    let along = row.matmul(w)?;
    Ok((w - (row.transpose(1, 2)?.contiguous()?.matmul(&along)? * 2.0)?)?)
}

struct MapOp<T> {
    map: FeatureMap,
    dtype: PhantomData<fn() -> T>,
}

/// Sizes of one call.
struct Sizes {
    heads: usize,
    repeat: usize,
    tokens: usize,
    head_dim: usize,
    feature_dim: usize,
}

impl Sizes {
    fn new(x: &[usize], w: &[usize]) -> Self {
        Self { heads: w[0], repeat: w[0] / x[1], tokens: x[2], head_dim: x[3], feature_dim: w[2] }
    }

    /// The rows of `x` that head `task % heads` of sequence `task / heads` maps.
    fn x<'a, T>(&self, x: &'a [T], task: usize) -> &'a [T] {
        let rows = self.tokens * self.head_dim;
        let head =
            (task / self.heads) * (self.heads / self.repeat) + task % self.heads / self.repeat;
        &x[head * rows..(head + 1) * rows]
    }

    fn w<'a, T>(&self, w: &'a [T], task: usize) -> &'a [T] {
        let size = self.head_dim * self.feature_dim;
        &w[task % self.heads * size..(task % self.heads + 1) * size]
    }
}

impl<T: Real> MapOp<T> {
    fn new(map: FeatureMap) -> Self {
        Self { map, dtype: PhantomData }
    }
}

impl<T: Real> CustomOp2 for MapOp<T> {
    fn name(&self) -> &'static str {
        "feature_map"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let sizes = Sizes::new(x_layout.dims(), w_layout.dims());
        let (x, w) = (slice::<T>(x, x_layout)?, slice::<T>(w, w_layout)?);
        let batch = x_layout.dims()[0];
        let width = 2 * sizes.feature_dim;
        let mut phi = vec![T::nan(); batch * sizes.heads * sizes.tokens * width];
        phi.par_chunks_mut(sizes.tokens * width).enumerate().for_each(|(task, phi)| {
            let x = Mat::rows(sizes.x(x, task), sizes.head_dim);
            vectorize(
                #[inline(always)]
                || map_into(self.map, x, sizes.w(w, task), sizes.feature_dim, phi),
            );
        });
        let shape = Shape::from((batch, sizes.heads, sizes.tokens, width));
        Ok((T::to_cpu_storage_owned(phi), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        phi: &Tensor,
        d_phi: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let sizes = Sizes::new(x.dims(), w.dims());
        let flat = |tensor: &Tensor| tensor.contiguous()?.flatten_all()?.to_vec1::<T>();
        let (x_values, w_values, phi, d_phi) = (flat(x)?, flat(w)?, flat(phi)?, flat(d_phi)?);
        let rows = sizes.tokens * 2 * sizes.feature_dim;
        let parts: Vec<(Vec<T>, Vec<T>)> = (0..phi.len() / rows)
            .into_par_iter()
            .map(|task| {
                let mut dx = vec![T::zero(); sizes.tokens * sizes.head_dim];
                let mut dw = vec![T::zero(); sizes.head_dim * sizes.feature_dim];
                let span = task * rows..(task + 1) * rows;
                let x = Mat::rows(sizes.x(&x_values, task), sizes.head_dim);
                let (w, f) = (sizes.w(&w_values, task), sizes.feature_dim);
                let (phi, d_phi) = (&phi[span.clone()], &d_phi[span]);
                vectorize(
                    #[inline(always)]
                    || {
                        map_rows_backward(
                            self.map,
                            x,
                            sizes.tokens,
                            w,
                            f,
                            phi,
                            d_phi,
                            &mut dx,
                            &mut dw,
                        )
                    },
                );
                (dx, dw)
            })
            .collect();
        let mut dx = vec![T::zero(); x_values.len()];
        let mut dw = vec![T::zero(); w_values.len()];
        let add = |to: &mut [T], from: &[T]| to.iter_mut().zip(from).for_each(|(to, &x)| *to += x);
        for (task, (part_x, part_w)) in parts.iter().enumerate() {
            let x_task = task / sizes.repeat;
            add(&mut dx[x_task * part_x.len()..(x_task + 1) * part_x.len()], part_x);
            let head = task % sizes.heads;
            add(&mut dw[head * part_w.len()..(head + 1) * part_w.len()], part_w);
        }
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(Tensor::from_vec(dw, w.shape(), device)?),
        ))
    }
}
