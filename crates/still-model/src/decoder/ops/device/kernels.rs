//! The decoder's own kernels as functions of tensors. None has a graph.

use candle_core::{DType, Device, Result, Tensor, bail};
use still_compute::cuda::{Launch, kind, queue};
use still_kernels::Rows;
use still_kernels::decoder::{
    Rotation as RotationArgs, still_residual, still_rms_norm, still_rms_norm_backward,
    still_rope_angles, still_rotate, still_swiglu, still_swiglu_backward,
};

use crate::decoder::Rotation;

fn alike(tensors: &[&Tensor]) -> Result<()> {
    match tensors.windows(2).all(|two| two[0].dtype() == two[1].dtype()) {
        true => Ok(()),
        false => {
            bail!("different dtypes: {:?}", tensors.iter().map(|x| x.dtype()).collect::<Vec<_>>())
        }
    }
}

/// `silu(gate) ⊙ up`, of equal shapes and dtypes.
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    alike(&[gate, up])?;
    let (kind, count) = (kind(gate.dtype())?, gate.elem_count() as i64);
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let outputs = [(gate.shape().clone(), gate.dtype())];
    let [hidden] = queue("still_swiglu", [&gate, &up], outputs, |[gate, up], [hidden], stream| {
        // SAFETY: all are contiguous, of `count` values.
        unsafe { still_swiglu(kind, count, gate, up, hidden, stream) }
    })?;
    Ok(hidden)
}

/// Gradients of `gate` and `up` in [`swiglu`].
pub(crate) fn swiglu_backward(
    gate: &Tensor,
    up: &Tensor,
    d_hidden: &Tensor,
) -> Result<[Tensor; 2]> {
    alike(&[gate, up, d_hidden])?;
    let (kind, count) = (kind(gate.dtype())?, gate.elem_count() as i64);
    let inputs = [gate.contiguous()?, up.contiguous()?, d_hidden.contiguous()?];
    let like = (gate.shape().clone(), gate.dtype());
    queue(
        "still_swiglu_backward",
        inputs.each_ref(),
        [like.clone(), like],
        |[gate, up, d_hidden], [d_gate, d_up], stream| {
            // SAFETY: all are contiguous, of `count` values.
            unsafe { still_swiglu_backward(kind, count, gate, up, d_hidden, d_gate, d_up, stream) }
        },
    )
}

/// Whether kernels that take 16 bytes at a time can read a tensor: as it lies, on CUDA.
fn packed(x: &Tensor) -> bool {
    let values = 16 / x.dtype().size_in_bytes();
    x.device().is_cuda()
        && matches!(x.dtype(), DType::F32 | DType::BF16)
        && x.is_contiguous()
        && x.layout().start_offset().is_multiple_of(values)
}

/// `x + y` of equal shapes and dtypes; none if a graph is to be made of it, or the kernel does not take it.
pub(crate) fn residual(x: &Tensor, y: &Tensor) -> Result<Option<Tensor>> {
    let alike = x.dims() == y.dims() && x.dtype() == y.dtype();
    if !alike || x.track_op() || y.track_op() || !packed(x) || !packed(y) || x.elem_count() == 0 {
        return Ok(None);
    }
    let (kind, count) = (kind(x.dtype())?, x.elem_count() as i64);
    let outputs = [(x.shape().clone(), x.dtype())];
    let [sum] = queue("still_residual", [x, y], outputs, |[x, y], [sum], stream| {
        // SAFETY: all are contiguous, of `count` values, and begin at multiples of 16 bytes.
        unsafe { still_residual(kind, count, x, y, sum, stream) }
    })?;
    Ok(Some(sum))
}

/// `x / √(mean(x²) + ε) ⊙ weight` of rows; none if the kernel does not take them.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Option<Tensor>> {
    let width = weight.dims1()?;
    let alike = x.dims().last() == Some(&width) && x.dtype() == weight.dtype();
    if !alike || !width.is_multiple_of(8) || !packed(x) || !packed(weight) || x.elem_count() == 0 {
        return Ok(None);
    }
    let (kind, rows) = (kind(x.dtype())?, (x.elem_count() / width) as i64);
    let outputs = [(x.shape().clone(), x.dtype())];
    let weight = weight.detach();
    let [y] = queue("still_rms_norm", [x, &weight], outputs, |[x, weight], [y], stream| {
        // SAFETY: both are contiguous, `rows` rows of `width` values and one, and begin at multiples of 16 bytes.
        unsafe { still_rms_norm(kind, rows, width as i32, x, weight, eps as f32, y, stream) }
    })?;
    Ok(Some(y))
}

/// `add` plus the gradient of `x` in `rms_norm(x, weight)`, all rows `[…, width]` of one dtype.
pub(crate) fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: &Tensor,
    add: Option<&Tensor>,
) -> Result<Tensor> {
    let kind = kind(x.dtype())?;
    let width = weight.dims1()?;
    if !width.is_multiple_of(8) {
        bail!("rms_norm: rows of {width} values; the kernel takes multiples of 8: use --device cpu")
    }
    let rows = (x.elem_count() / width.max(1)) as i64;
    let inputs = [x, weight, dy, add.unwrap_or(x)];
    alike(&inputs)?;
    let inputs = [x.contiguous()?, weight.contiguous()?, dy.contiguous()?, inputs[3].contiguous()?];
    let outputs = [(x.shape().clone(), x.dtype())];
    let [dx] = queue(
        "still_rms_norm_backward",
        inputs.each_ref(),
        outputs,
        |[x, weight, dy, added], [dx], stream| {
            let added = if add.is_some() { added.cast_const() } else { std::ptr::null() };
            let (width, eps) = (width as i32, eps as f32);
            // SAFETY: all are contiguous, of `rows` rows of `width` values, the weight of one.
            unsafe {
                still_rms_norm_backward(kind, rows, width, x, weight, eps, dy, added, dx, stream)
            }
        },
    )?;
    Ok(dx)
}

/// Cosines and sines `[positions, frequencies]`, f32, of positions times frequencies in radians, times `scale`; angles are f64.
pub(crate) fn rope_angles(
    device: &Device,
    positions: &[u32],
    frequencies: &[f64],
    scale: f64,
) -> Result<[Tensor; 2]> {
    let cuda = device.as_cuda_device()?;
    let (rows, half) = (positions.len(), frequencies.len());
    let positions = Tensor::from_slice(positions, rows, device)?;
    let (frequencies, stream) = (cuda.clone_htod(frequencies)?, cuda.cuda_stream());
    let mut launch = Launch::new(&stream)?;
    let frequencies: *mut f64 = launch.at(&frequencies);
    let like = ((rows, half).into(), DType::F32);
    let (call, outputs) = ("still_rope_angles", [like.clone(), like]);
    queue(call, [&positions], outputs, |[positions], [cos, sin], stream| {
        let (rows, half, positions) = (rows as i64, half as i32, positions.cast_const().cast());
        let (cos, sin) = (cos.cast(), sin.cast());
        // SAFETY: all are contiguous, and as many as they say.
        unsafe { still_rope_angles(rows, half, positions, frequencies, scale, cos, sin, stream) }
    })
}

/// Heads `[B, H, N, D]`, whose channels are adjacent, rotated or rotated back; a view of rows `[B, N, H, D]`.
pub(crate) fn rotate(heads: &Tensor, rotation: &Rotation, back: bool) -> Result<Tensor> {
    let (batch, count, tokens, head_dim) = heads.dims4()?;
    let (cos, sin) = rotation.tensors(heads.device(), DType::F32)?;
    let args = RotationArgs {
        batch: batch as i32,
        heads: count as i32,
        tokens: tokens as i32,
        head_dim: head_dim as i32,
        runs: (cos.elem_count() / (tokens * head_dim / 2)) as i32,
        dtype: kind(heads.dtype())?,
        sign: if back { -1.0 } else { 1.0 },
    };
    let heads = heads.detach();
    let &[sequence, head, token, _] = heads.stride() else { bail!("rotate: not heads") };
    let [sequence, head, token] = [sequence, head, token].map(|stride| stride as i64);
    let outputs = [((batch, tokens, count, head_dim).into(), heads.dtype())];
    let [rotated] =
        queue("still_rotate", [&heads, &cos, &sin], outputs, |[data, cos, sin], [to], stream| {
            let from = Rows { data, batch: sequence, head, token };
            let d = head_dim as i64;
            let token = count as i64 * d;
            let to = Rows { data: to, batch: tokens as i64 * token, head: d, token };
            // SAFETY: rows and angles are as many as `args` says.
            unsafe { still_rotate(&raw const args, from, to, cos.cast(), sin.cast(), stream) }
        })?;
    rotated.transpose(1, 2)
}
