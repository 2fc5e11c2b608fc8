//! The feature map of linear attention alone: one kernel where the tensor library's ops are fourteen, and one back.

use candle_core::{DType, Result, Tensor};
use still_compute::cuda::{queue, queue_any};
use still_kernels::{still_features, still_features_backward};

/// `[softmax(u) ; softmax(−u)]` `[…, 2F]` of `f` `[…, F]`: `u` is `f`, or `‖x‖ f/‖f‖` where `x` `[…, D]` is given. All f32.
pub(crate) fn features(f: &Tensor, x: Option<&Tensor>) -> Result<Tensor> {
    let sizes = Sizes::of(f, x)?;
    let f = f.contiguous()?;
    let outputs = [(sizes.with_width(&f, 2 * sizes.width)?, DType::F32)];
    let x = x.map(Tensor::contiguous).transpose()?;
    let [phi] =
        queue("still_features", [&f, x.as_ref().unwrap_or(&f)], outputs, |from, [phi], stream| {
            let x = if x.is_some() { from[1].cast_const().cast() } else { std::ptr::null() };
            let Sizes { rows, width, d } = sizes;
            // SAFETY: all have the rows and widths that they are said to have, and are contiguous.
            unsafe {
                still_features(rows, width as i32, d as i32, from[0].cast(), x, phi.cast(), stream)
            }
        })?;
    Ok(phi)
}

/// The gradients of `f` and of `x` through its length, from that of `φ`.
pub(crate) fn features_backward(
    f: &Tensor,
    x: Option<&Tensor>,
    phi: &Tensor,
    d_phi: &Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
    let sizes = Sizes::of(f, x)?;
    let (f, d_phi) = (f.contiguous()?, d_phi.contiguous()?);
    let x = x.map(Tensor::contiguous).transpose()?;
    let outputs = [Some(&f), x.as_ref()].into_iter().flatten();
    let outputs = outputs.map(|like| (like.shape().clone(), DType::F32)).collect();
    let inputs = [Some(&f), Some(phi), Some(&d_phi), x.as_ref()];
    let inputs: Vec<&Tensor> = inputs.into_iter().flatten().collect();
    let Sizes { rows, width, d } = sizes;
    let (width, d) = (width as i32, d as i32);
    let mut made = queue_any("still_features_backward", &inputs, outputs, |from, to, stream| {
        let x = from.get(3).map_or(std::ptr::null(), |x| x.cast_const().cast());
        let d_x = to.get(1).map_or(std::ptr::null_mut(), |d_x| d_x.cast());
        let [f, phi, d_phi] = [from[0].cast(), from[1].cast(), from[2].cast()];
        // SAFETY: as in `features`.
        unsafe {
            still_features_backward(rows, width, d, f, x, phi, d_phi, to[0].cast(), d_x, stream)
        }
    })?;
    let d_x = x.is_some().then(|| made.pop()).flatten();
    let d_f = made.pop().ok_or_else(|| candle_core::Error::Msg("no gradient was made".into()))?;
    Ok((d_f, d_x))
}

#[derive(Clone, Copy)]
struct Sizes {
    rows: i64,
    width: usize,
    d: usize,
}

impl Sizes {
    fn of(f: &Tensor, x: Option<&Tensor>) -> Result<Self> {
        let width = f.dim(candle_core::D::Minus1)?;
        let d = x.map_or(Ok(0), |x| x.dim(candle_core::D::Minus1))?;
        for (name, tensor) in [("f", Some(f)), ("x", x)] {
            if tensor.is_some_and(|tensor| tensor.dtype() != DType::F32) {
                candle_core::bail!("the feature map's kernel takes {name} in f32");
            }
        }
        Ok(Self { rows: (f.elem_count() / width) as i64, width, d })
    }

    fn with_width(&self, like: &Tensor, width: usize) -> Result<candle_core::Shape> {
        let mut dims = like.dims().to_vec();
        *dims.last_mut().expect("a width") = width;
        Ok(dims.into())
    }
}
