//! From rows of tokens to heads, rotated on the way, and back.

use candle_core::{DType, Result, Shape, Tensor};
use still_compute::Real;
use still_compute::rows::HeadSizes;

use super::{Rotation, composed, device, with_values};

/// `x` `[B, N, H·D]` → `[B, H, N, D]`, each head rotated if a rotation is given. Differentiable.
///
/// # Errors
/// A width that `head_dim` does not divide, a rotation of other sizes, a dtype without a kernel.
pub fn split_heads(x: &Tensor, head_dim: usize, rotation: Option<&Rotation>) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    let fits = rotation.is_none_or(|rotation| rotation.fits(batch, tokens, head_dim));
    if head_dim == 0 || !width.is_multiple_of(head_dim) || !fits {
        candle_core::bail!("split_heads: x is {:?}, heads have {head_dim} channels", x.dims())
    }
    if !x.device().is_cpu() {
        return device::split_heads(x, head_dim, rotation);
    }
    let sizes = HeadSizes { tokens, heads: width / head_dim, head_dim };
    apply(x, Step { batch, sizes, split: true, rotation: rotation.cloned() })
}

/// `x` `[B, H, N, D]` → `[B, N, H·D]`. Differentiable.
///
/// # Errors
/// A dtype without a kernel.
pub fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, tokens, head_dim) = x.dims4()?;
    if !x.device().is_cpu() {
        return x.transpose(1, 2)?.reshape((batch, tokens, heads * head_dim));
    }
    let sizes = HeadSizes { tokens, heads, head_dim };
    apply(x, Step { batch, sizes, split: false, rotation: None })
}

/// The way back of [`split_heads`] with a rotation, which is orthogonal: `x` `[B, H, N, D]` on the CPU → `[B, N, H·D]`.
pub(super) fn merge_rotated_back(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    let (batch, heads, tokens, head_dim) = x.dims4()?;
    let sizes = HeadSizes { tokens, heads, head_dim };
    apply(x, Step { batch, sizes, split: false, rotation: Some(rotation.clone()) })
}

/// A rotation is orthogonal: the gradient takes the way back.
fn apply(x: &Tensor, step: Step) -> Result<Tensor> {
    let run = match x.dtype() {
        DType::F32 => run::<f32>,
        DType::F64 => run::<f64>,
        other => candle_core::bail!("heads: no kernel for {other:?}, expected f32 or f64"),
    };
    let x = x.contiguous()?;
    let y = run(&x, &step)?;
    composed::of_one(&x, y, move |x, dy| {
        run(dy, &Step { split: !step.split, ..step.clone() })?.reshape(x.shape())
    })
}

fn run<T: Real>(x: &Tensor, step: &Step) -> Result<Tensor> {
    Tensor::from_vec(with_values(x, |x: &[T]| step.run(x))?, step.shape(), x.device())
}

/// One of the two directions. A rotation comes after a split, and is undone before a merge.
#[derive(Clone)]
struct Step {
    batch: usize,
    sizes: HeadSizes,
    split: bool,
    rotation: Option<Rotation>,
}

impl Step {
    fn shape(&self) -> Shape {
        let HeadSizes { tokens, heads, head_dim } = self.sizes;
        if self.split {
            (self.batch, heads, tokens, head_dim).into()
        } else {
            (self.batch, tokens, heads * head_dim).into()
        }
    }

    fn run<T: Real>(&self, x: &[T]) -> Vec<T> {
        let angles = self.rotation.as_ref().map(Rotation::angles);
        if self.split {
            T::par_split_heads(x, self.sizes, angles)
        } else {
            T::par_merge_heads(x, self.sizes, angles)
        }
    }
}
