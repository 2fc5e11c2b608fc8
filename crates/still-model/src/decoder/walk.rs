//! A layer walked forward and back by hand, for devices on which a graph of many small ops costs more than what they compute.
//!
//! The tensor library makes a tensor of zeros for every gradient and adds to it; here each gradient is written once, products
//! add to what is there, and what is kept for the way back is chosen. Attention, which lies between the two halves, is not here.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};

use super::layer::DecoderLayer;
use super::linear::{Linear, Lora, LoraLayer};
use super::ops::device::{norm, product, rotate, rows, swiglu};
use super::ops::{Rotation, rms_norm, rms_norm_heads, split_heads};
use crate::error::{ModelError, Result};

/// A projection on its way forward: what its way back needs.
#[derive(Debug)]
struct ProjectionWalk {
    weight: Tensor,
    update: Option<UpdateWalk>,
}

#[derive(Debug)]
struct UpdateWalk {
    lora: Lora,
    /// `A` and `B` in the dtype of activations.
    a: Tensor,
    b: Tensor,
    /// `x Aᵀ`, `[rows, rank]`.
    low: Tensor,
}

/// `x` `[rows, in]` → `[rows, out]`, without an update.
fn project(linear: &Linear, x: &Tensor) -> Result<Tensor> {
    let y = product(x, &linear.weight.dense()?.t()?, 1.0, None, x.dtype())?;
    biased(y, linear)
}

/// A projection's products with its bias, if it has one.
fn biased(y: Tensor, linear: &Linear) -> Result<Tensor> {
    match &linear.bias {
        Some(bias) => Ok(y.broadcast_add(bias)?),
        None => Ok(y),
    }
}

impl ProjectionWalk {
    /// `x` `[rows, in]` → `[rows, out]`.
    fn forward(linear: &Linear, lora: Option<&Lora>, x: &Tensor) -> Result<(Tensor, Self)> {
        let dtype = x.dtype();
        let weight = linear.weight.dense()?.clone();
        let mut y = product(x, &weight.t()?, 1.0, None, dtype)?;
        let update = match lora {
            Some(lora) if lora.dropout.is_some() => {
                let what = "a layer with dropout cannot be walked through by hand".into();
                return Err(ModelError::Invalid(what));
            }
            Some(lora) => {
                let (a, b) = (lora.a.detach().to_dtype(dtype)?, lora.b.detach().to_dtype(dtype)?);
                let low = product(x, &a.t()?, 1.0, None, dtype)?;
                y = product(&low, &b.t()?, lora.scale, Some(y), dtype)?;
                Some(UpdateWalk { lora: lora.clone(), a, b, low })
            }
            None => None,
        };
        Ok((biased(y, linear)?, Self { weight, update }))
    }

    /// Adds the gradient of `x` to `dx`, if it is wanted; notes those of the update.
    fn back(
        &self,
        x: &Tensor,
        dy: &Tensor,
        dx: &mut Option<Tensor>,
        wanted: bool,
        grads: &mut GradStore,
    ) -> Result<()> {
        let dtype = dy.dtype();
        if wanted {
            *dx = Some(product(dy, &self.weight, 1.0, dx.take(), dtype)?);
        }
        let Some(UpdateWalk { lora, a, b, low }) = &self.update else { return Ok(()) };
        let up = product(dy, b, lora.scale, None, dtype)?;
        if wanted {
            *dx = Some(product(&up, a, 1.0, dx.take(), dtype)?);
        }
        grads.insert(&lora.a, product(&up.t()?, x, 1.0, None, DType::F32)?);
        grads.insert(&lora.b, product(&dy.t()?, low, lora.scale, None, DType::F32)?);
        Ok(())
    }
}

/// The half of a layer before its attention, walked forward.
#[derive(Debug)]
pub struct InputsWalk {
    x: Tensor,
    /// `[rows, E]`
    normed: Tensor,
    projections: [ProjectionWalk; 3],
    /// Queries and keys before their heads' own norms, where there are such.
    before_norm: [Option<Tensor>; 2],
    rotation: Rotation,
}

/// The half of a layer after its attention, walked forward.
#[derive(Debug)]
pub struct FinishWalk {
    /// The attention's output, `[rows, H · D]`.
    merged: Tensor,
    projection: ProjectionWalk,
    /// The hidden states between attention and MLP.
    x: Tensor,
    /// `gate(n)` and `up(n)`, unless they are to be computed again.
    wide: Option<[Tensor; 2]>,
}

impl DecoderLayer {
    /// As [`DecoderLayer::attention_inputs`], without a graph: rotated queries `[B, H, N, D]`, keys and values `[B, K, N, D]`.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit; an update with dropout.
    pub fn walk_inputs(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        lora: &LoraLayer,
    ) -> Result<([Tensor; 3], InputsWalk)> {
        let x = x.detach();
        let (batch, tokens, _) = x.dims3()?;
        let normed = rows(&rms_norm(&x, &self.input_layernorm, self.rms_norm_eps)?)?;
        let forward = |linear, lora: &Option<Lora>| {
            let (y, walk) = ProjectionWalk::forward(linear, lora.as_ref(), &normed)?;
            Ok::<_, ModelError>((y.reshape((batch, tokens, ()))?, walk))
        };
        let (q, q_walk) = forward(&self.q_proj, &lora.q)?;
        let (k, k_walk) = forward(&self.k_proj, &lora.k)?;
        let (v, v_walk) = forward(&self.v_proj, &lora.v)?;
        let head_norm = |x: Tensor, weight: &Option<Tensor>| match weight {
            Some(weight) => {
                Ok::<_, ModelError>((rms_norm_heads(&x, weight, self.rms_norm_eps)?, Some(x)))
            }
            None => Ok((x, None)),
        };
        let (q, before_q) = head_norm(q, &self.q_norm)?;
        let (k, before_k) = head_norm(k, &self.k_norm)?;
        let heads = [
            split_heads(&q, self.head_dim, Some(rotation))?,
            split_heads(&k, self.head_dim, Some(rotation))?,
            split_heads(&v, self.head_dim, None)?,
        ];
        let walk = InputsWalk {
            x,
            normed,
            projections: [q_walk, k_walk, v_walk],
            before_norm: [before_q, before_k],
            rotation: rotation.clone(),
        };
        Ok((heads, walk))
    }

    /// As [`DecoderLayer::finish`], without a graph. With `keep` the MLP's two wide activations are kept for the way back, which
    /// otherwise computes them again.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit; an update with dropout.
    pub fn walk_finish(
        &self,
        x: &Tensor,
        attention: &Tensor,
        lora: &LoraLayer,
        keep: bool,
    ) -> Result<(Tensor, FinishWalk)> {
        let (batch, heads, tokens, head_dim) = attention.dims4()?;
        let merged = attention.detach().transpose(1, 2)?.contiguous()?;
        let merged = merged.reshape((batch * tokens, heads * head_dim))?;
        let (y, projection) = ProjectionWalk::forward(&self.o_proj, lora.o.as_ref(), &merged)?;
        let x = (x.detach() + y.reshape(x.shape())?)?;
        let wide = self.wide(&x)?;
        let hidden = swiglu::forward(&wide[0], &wide[1])?;
        let y = project(&self.mlp.down, &hidden)?;
        let y = (y.reshape(x.shape())? + &x)?;
        Ok((y, FinishWalk { merged, projection, x, wide: keep.then_some(wide) }))
    }

    /// `gate(n)` and `up(n)`, `n` the norm of `x`: `[rows, I]`.
    fn wide(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        let normed = rows(&rms_norm(x, &self.mlp.norm, self.mlp.rms_norm_eps)?)?;
        Ok([project(&self.mlp.gate, &normed)?, project(&self.mlp.up, &normed)?])
    }
}

impl FinishWalk {
    /// From the gradient of the layer's output to those of its input, as far as it comes this way, and of the attention's output
    /// `[B, H, N, D]`. Notes the gradients of the update.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn back(
        self,
        layer: &DecoderLayer,
        dy: &Tensor,
        grads: &mut GradStore,
    ) -> Result<[Tensor; 2]> {
        let dtype = dy.dtype();
        let (batch, tokens, _) = dy.dims3()?;
        let mlp = &layer.mlp;
        let [gate, up] = match self.wide {
            Some(wide) => wide,
            None => layer.wide(&self.x)?,
        };
        let d_hidden = product(&rows(dy)?, mlp.down.weight.dense()?, 1.0, None, dtype)?;
        let [d_gate, d_up] = swiglu::backward(&gate, &up, &d_hidden)?;
        drop((gate, up, d_hidden));
        let d_normed = product(&d_gate, mlp.gate.weight.dense()?, 1.0, None, dtype)?;
        let d_normed = product(&d_up, mlp.up.weight.dense()?, 1.0, Some(d_normed), dtype)?;
        drop((d_gate, d_up));
        let d_normed = d_normed.reshape(dy.shape())?;
        let dx = norm::backward(&self.x, &mlp.norm, mlp.rms_norm_eps, &d_normed, Some(dy))?;
        let mut d_merged = None;
        self.projection.back(&self.merged, &rows(&dx)?, &mut d_merged, true, grads)?;
        let Some(d_merged) = d_merged else {
            return Err(ModelError::Invalid("o_proj has left no gradient".into()));
        };
        let d_attention = d_merged.reshape((batch, tokens, (), layer.head_dim))?.transpose(1, 2)?;
        Ok([dx, d_attention])
    }
}

impl InputsWalk {
    /// From the gradients of queries, keys and values to that of the layer's input, on top of `dx`, the part that came past the
    /// attention; none if it is not `wanted`. Notes the gradients of the updates.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn back(
        self,
        layer: &DecoderLayer,
        [dq, dk, dv]: [&Tensor; 3],
        dx: &Tensor,
        wanted: bool,
        grads: &mut GradStore,
    ) -> Result<Option<Tensor>> {
        let norms = [&layer.q_norm, &layer.k_norm];
        let turned_back = |d: &Tensor, n: usize| -> Result<Tensor> {
            let d = rotate(d, &self.rotation, true)?.transpose(1, 2)?;
            match (norms[n], &self.before_norm[n]) {
                (Some(weight), Some(before)) => {
                    let before = before.reshape(d.shape())?;
                    let eps = layer.rms_norm_eps;
                    Ok(norm::backward(&before, weight, eps, &d.contiguous()?, None)?)
                }
                _ => Ok(d),
            }
        };
        let gradients = [turned_back(dq, 0)?, turned_back(dk, 1)?, dv.transpose(1, 2)?];
        let mut d_normed = None;
        for (projection, d) in self.projections.iter().zip(&gradients) {
            let tokens = self.normed.dim(0)?;
            let d = d.contiguous()?.reshape((tokens, ()))?;
            projection.back(&self.normed, &d, &mut d_normed, wanted, grads)?;
        }
        let Some(d_normed) = d_normed else { return Ok(None) };
        let (weight, d_normed) = (&layer.input_layernorm, d_normed.reshape(self.x.shape())?);
        Ok(Some(norm::backward(&self.x, weight, layer.rms_norm_eps, &d_normed, Some(dx))?))
    }
}
