//! The forward pass.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Result, Tensor};
use still_kernels::{
    CHUNK, Forward, Past, Rows, Shape, Stream, check, still_forward, still_map_keys,
    still_segments, still_states,
};

use super::layout::{by_token, rows_aligned, tensor_by_token, uninit};
use super::routing::DeviceRouting;
use still_compute::cuda::{Launch, on_cuda};

/// What the kernels read: `q`, `k`, `v` with aligned rows, the rest contiguous; of one dtype but for `log_scale`, f32.
#[derive(Debug)]
pub(super) struct Operands {
    pub shape: Shape,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub map_q: Tensor,
    pub map_k: Tensor,
    pub log_scale: Option<Tensor>,
    /// `[B, H, N, D]`
    pub gate: Option<Tensor>,
    pub routing: DeviceRouting,
}

impl Operands {
    /// Of rows as [`rows_aligned`](super::layout::rows_aligned) leaves them; maps and scale may still be in their graphs.
    pub fn new(
        shape: Shape,
        [q, k, v]: [Tensor; 3],
        maps: [&Tensor; 2],
        log_scale: Option<&Tensor>,
        gate: Option<&Tensor>,
        routing: DeviceRouting,
    ) -> Result<Self> {
        let dtype = q.dtype();
        let [map_q, map_k] = maps.map(|map| map.detach().to_dtype(dtype)?.contiguous());
        let log_scale = log_scale.map(|scale| scale.detach().contiguous()).transpose()?;
        let gate = gate.map(rows_aligned).transpose()?;
        Ok(Self { shape, q, k, v, map_q: map_q?, map_k: map_k?, log_scale, gate, routing })
    }
}

/// What the backward pass reads besides the operands.
#[derive(Debug)]
pub(super) struct Saved {
    /// `φ(k)`, `[B, K, N, 2D]`.
    pub phi: CudaSlice<u8>,
    /// Prefix states `[B, K, R, 2D, D]`.
    pub s: CudaSlice<u8>,
    /// `[B, K, R, 2D]`.
    pub z: CudaSlice<f32>,
    /// `[B, H, N]`.
    pub denominator: CudaSlice<f32>,
    /// `[B, H, N]`, as `arg_max`: only where there is something to train.
    pub maximum: Option<CudaSlice<f32>>,
    pub arg_max: Option<CudaSlice<i32>>,
    /// `[B, H, N, D]`, contiguous: the linear branch's numerator without its gate. Where there is something to train and a gate.
    pub linear: Option<CudaSlice<u8>>,
}

impl Saved {
    /// Rows of [`Saved::linear`], of `[B, H, N, D]`.
    pub fn linear_rows<'a>(
        &'a self,
        launch: &mut Launch<'a>,
        (_, heads, tokens, d): (usize, usize, usize, usize),
    ) -> Rows {
        let Some(linear) = &self.linear else { return Rows::NONE };
        Rows {
            data: launch.at(linear),
            batch: (heads * tokens * d) as i64,
            head: (tokens * d) as i64,
            token: d as i64,
        }
    }
}

/// What the states are made of, and where they are left, besides what [`Forward`] has of them.
pub(super) struct Scan {
    pub map_k: *const c_void,
    pub phi: *mut c_void,
    pub totals: *mut f32,
    /// Null if nothing is decoded from them.
    pub s_last: *mut f32,
    pub z_last: *mut f32,
    /// Null if sequences begin.
    pub past: *const Past,
}

/// Queues the three kernels' launches of a forward pass whose tokens are routed.
///
/// # Safety
/// Every address is of memory as large as still.h says for `shape`, valid until the stream has passed.
pub(super) unsafe fn queue(
    shape: &Shape,
    args: &Forward,
    scan: &Scan,
    stream: Stream,
) -> Result<()> {
    let Forward { k, v, routing, s, z, .. } = args;
    let Scan { map_k, phi, totals, s_last, z_last, past } = *scan;
    let (s, z) = (s.cast_mut(), z.cast_mut());
    let wrap = candle_core::Error::wrap;
    // SAFETY: the caller's.
    unsafe {
        let code = still_map_keys(shape, *k, map_k, routing, phi, stream);
        check("still_map_keys", code).map_err(wrap)?;
        let code =
            still_states(shape, phi, *v, routing, totals, s, z, s_last, z_last, past, stream);
        check("still_states", code).map_err(wrap)?;
        check("still_forward", still_forward(shape, args, stream)).map_err(wrap)
    }
}

/// Where the states are left that decoding starts from: memory that is there until the stream has passed.
#[derive(Clone, Copy)]
pub(super) struct Last {
    /// `[B, K, 2D, D]`
    pub s: *mut f32,
    /// `[B, K, 2D]`
    pub z: *mut f32,
}

/// Queues the forward pass. The output `[B, H, N, D]` lies token by token: no head has to be moved for what comes next.
pub(super) fn forward(
    device: &CudaDevice,
    operands: &Operands,
    trains: bool,
    last: Option<Last>,
) -> Result<(Tensor, Saved)> {
    let Operands { shape, q, k, v, map_q, map_k, log_scale, gate, routing } = operands;
    let dims = q.dims4()?;
    let (batch, heads, tokens, d) = dims;
    let kv_heads = shape.kv_heads as usize;
    let retired = tokens.div_ceil(CHUNK).saturating_sub(2);
    let (rows, states, bytes) =
        (batch * heads * tokens, batch * kv_heads * retired, q.dtype().size_in_bytes());
    // SAFETY: only reads the shape.
    let segments = unsafe { still_segments(shape) } as usize;

    let totals: CudaSlice<f32> = uninit(device, segments * batch * kv_heads * 2 * d * (d + 1))?;
    let saved = Saved {
        phi: uninit(device, batch * kv_heads * tokens * 2 * d * bytes)?,
        s: uninit(device, states * 2 * d * d * bytes)?,
        z: uninit(device, states * 2 * d)?,
        denominator: uninit(device, rows)?,
        maximum: trains.then(|| uninit(device, rows)).transpose()?,
        arg_max: trains.then(|| uninit(device, rows)).transpose()?,
        linear: match (trains, gate) {
            (true, Some(_)) => Some(uninit(device, rows * d * bytes)?),
            _ => None,
        },
    };
    // SAFETY: the last kernel fills it.
    let out = unsafe { device.alloc_uninit(q.shape(), q.dtype())? };

    let stream = device.cuda_stream();
    let held = [q, k, v, map_q, map_k].map(Tensor::storage_and_layout);
    let held_scale = log_scale.as_ref().map(Tensor::storage_and_layout);
    let held_gate = gate.as_ref().map(Tensor::storage_and_layout);
    let mut launch = Launch::new(&stream)?;
    let [q, k, v, map_q, map_k] = &held;
    let log_scale = launch.optional_values(&held_scale)?;
    let map_k: *mut c_void = launch.values(on_cuda(&map_k.0)?, map_k.1)?;
    let args = Forward {
        q: launch.rows(on_cuda(&q.0)?, q.1)?,
        k: launch.rows(on_cuda(&k.0)?, k.1)?,
        v: launch.rows(on_cuda(&v.0)?, v.1)?,
        out: launch.rows(&out, &by_token(dims))?,
        w_q: launch.values(on_cuda(&map_q.0)?, map_q.1)?,
        log_scale,
        routing: routing.args(&mut launch),
        s: launch.at(&saved.s),
        z: launch.at(&saved.z),
        denominator: launch.at(&saved.denominator),
        maximum: launch.at_optional(saved.maximum.as_ref()),
        arg_max: launch.at_optional(saved.arg_max.as_ref()),
        first_chunk: 0,
        gate: launch.optional_rows(&held_gate)?,
        gate_from: null(),
        gate_until: null(),
        linear: saved.linear_rows(&mut launch, dims),
    };
    let last = last.unwrap_or(Last { s: null_mut(), z: null_mut() });
    let scan = Scan {
        map_k,
        phi: launch.at(&saved.phi),
        totals: launch.at(&totals),
        s_last: last.s,
        z_last: last.z,
        past: null(),
    };
    // SAFETY: every buffer is as large as still.h says for `shape`, and lives until the launch is dropped.
    unsafe { queue(shape, &args, &scan, launch.stream())? };
    drop(launch);
    Ok((tensor_by_token(out, dims)?, saved))
}
