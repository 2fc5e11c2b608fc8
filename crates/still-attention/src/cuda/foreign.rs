//! The operator in memory of another library (PyTorch's), queued on that library's stream.
//!
//! The tensor library here cannot borrow memory. So this is a level below it: the same kernels, given addresses. Nothing is
//! allocated, copied or waited for; scratch is the caller's too, and is free again for whatever the caller queues next on that stream.
//! The caller has made the device the thread's current one, as the CUDA runtime has it. A null stream is the legacy default stream.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use candle_core::{DType, Device, Tensor};
use still_compute::cuda::kind;
use still_kernels::{
    Backward, CHUNK, Forward, NO_CAP, Rows, Shape, Stream, check, still_backward,
    still_backward_bytes, still_fold, still_recall, still_scores, still_segments,
};

use super::forward::{Scan, queue};
use super::layout::{Cursor, flags, router};
use super::routing::{budgets, dims, queue_selection, reached_cap, received_floats, retired};
use crate::limits::{Asked, Use};
use crate::output::OP;
use crate::saved_attention::Call;
use crate::{AttentionError, HybridConfig, HybridWeights, Mode, Result, Router, limits};

/// Rows `[B, heads, N, D]` on a device: adjacent channels, every row 16-byte aligned; strides in values.
pub use still_kernels::Rows as DeviceRows;

/// Shapes of a call's operands, as [`attention_forward`](crate::attention_forward) takes them.
#[derive(Clone, Copy, Debug)]
pub struct OperandShapes<'a> {
    /// `q`, `k`, `v`.
    pub rows: [&'a [usize]; 3],
    /// The output gate.
    pub gate: Option<&'a [usize]>,
    /// In the order of [`HybridWeights`].
    pub learned: [Option<&'a [usize]>; 6],
}

/// Sizes of a call. Every selection head has keys and values of its own: those of query heads are repeated.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSizes {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Selection heads.
    pub selection_heads: usize,
    /// Tokens of every sequence.
    pub tokens: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Of rows, gate and maps: f32 or bf16.
    pub dtype: DType,
}

/// What both passes read, and what the forward pass writes of it: the last two.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOperands {
    /// `[B, H, N, D]`
    pub q: DeviceRows,
    /// `[B, S, N, D]`
    pub k: DeviceRows,
    /// `[B, S, N, D]`
    pub v: DeviceRows,
    /// `[B, H, N, D]`, none without an output gate.
    pub gate: Option<DeviceRows>,
    /// f32 `[H]`: the logarithm of the linear branch's scale (by `LinearNorm::Mean` before the division); null: 0.
    pub log_scale: *const f32,
    /// i32 `[S]`: [`DeviceAttention::budgets_of`].
    pub budgets: *const i32,
    /// `[B, S, N]` as [`Selection::absorbed_at`](crate::Selection).
    pub absorbed_at: *mut u32,
    /// [`DeviceAttention::saved_bytes`], 256-byte aligned.
    pub saved: *mut u8,
}

/// The maps as they are learned, f32 and contiguous: what the forward pass makes its own of.
#[derive(Clone, Copy, Debug)]
pub struct DeviceMaps {
    /// `[H, D, D]`
    pub map_q: *const f32,
    /// `[S, D, D]`
    pub map_k: *const f32,
    /// `[H, D]`, the vectors that the maps reflect by; null: they do not.
    pub householder_q: *const f32,
    /// `[S, D]`, likewise.
    pub householder_k: *const f32,
}

/// What the backward pass reads besides the operands, and the gradients that it writes.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "gradients are named after what they are of, and have its shape")]
pub struct DeviceGradients {
    /// The forward pass's output.
    pub out: DeviceRows,
    pub d_out: DeviceRows,
    /// `d_out` times the gate, which is `d_out` without one.
    pub d_linear: DeviceRows,
    pub d_q: DeviceRows,
    pub d_k: DeviceRows,
    pub d_v: DeviceRows,
    pub d_gate: Option<DeviceRows>,
    /// f32, as the next two. Of the maps with reflections folded in, as that of `d_map_k`.
    pub d_map_q: *mut f32,
    pub d_map_k: *mut f32,
    /// Null if `log_scale` is.
    pub d_log_scale: *mut f32,
}

/// One layer's hybrid attention of one shape.
#[derive(Debug)]
pub struct DeviceAttention<'a> {
    config: &'a HybridConfig,
    shape: Shape,
    dtype: DType,
    budgets: Vec<i32>,
    cap: Option<i32>,
}

/// Where the sections of `saved` begin. [`DeviceAttention::saved`] has their sizes.
struct Sections {
    selected: *mut u64,
    map_q: *mut c_void,
    map_k: *mut c_void,
    phi: *mut c_void,
    s: *mut c_void,
    z: *mut f32,
    denominator: *mut f32,
    maximum: *mut f32,
    arg_max: *mut i32,
    linear: *mut c_void,
    salient: *mut i32,
    visible: *mut i32,
    order: *mut i32,
}

/// Checks the shapes of a call, its configuration and that there are kernels for both.
///
/// # Errors
/// As [`attention_forward`](crate::attention_forward).
pub fn check_shapes(config: &HybridConfig, shapes: OperandShapes<'_>) -> Result<()> {
    // Views of one zero: only shapes are looked at.
    let zero = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    let shaped = |dims: &[usize]| zero.broadcast_as(dims);
    let [q, k, v] = shapes.rows;
    let (q, k, v) = (shaped(q)?, shaped(k)?, shaped(v)?);
    let gate = shapes.gate.map(shaped).transpose()?;
    let [map_q, map_k, householder_q, householder_k, log_lambda, window_factor] =
        shapes.learned.map(|dims| dims.map(shaped).transpose());
    let needed = |name: &str, tensor: candle_core::Result<Option<Tensor>>| {
        tensor?.ok_or_else(|| AttentionError::Config(format!("{name} is missing")))
    };
    let weights = HybridWeights {
        feature_map_q: needed("feature_map_q", map_q)?,
        feature_map_k: needed("feature_map_k", map_k)?,
        householder_q: householder_q?,
        householder_k: householder_k?,
        log_lambda: log_lambda?,
        window_factor: window_factor?,
    };
    let call =
        Call { rows: [&q, &k, &v], gate: gate.as_ref(), weights: &weights, config, routing: None };
    let geometry = call.check()?;
    // Whoever calls may ask for gradients. What has kernels in bf16 alone has none for those.
    limits::check(Asked { geometry, config, dtype: DType::BF16, used_in: Use::Training })?;
    let unsupported =
        |tensor, expected, got| Err(AttentionError::Unsupported { op: OP, tensor, expected, got });
    if config.mode != Mode::Hybrid {
        let expected = "hybrid in another library's memory on CUDA, where linear attention alone has no kernels";
        return unsupported("mode", expected, format!("{:?}", config.mode));
    }
    match q.elem_count() {
        0 => unsupported("q", "one token or more on CUDA", format!("{:?}", q.dims())),
        _ => Ok(()),
    }
}

impl<'a> DeviceAttention<'a> {
    /// Of shapes that [`check_shapes`] passed.
    ///
    /// # Errors
    /// Another dtype; sizes that the kernels cannot count.
    pub fn new(config: &'a HybridConfig, sizes: DeviceSizes) -> Result<Self> {
        let DeviceSizes { batch, heads, selection_heads, tokens, head_dim, dtype } = sizes;
        let int = |x: usize| i32::try_from(x).map_err(candle_core::Error::wrap);
        let shape = Shape {
            batch: int(batch)?,
            heads: int(heads)?,
            kv_heads: int(selection_heads)?,
            tokens: int(tokens)?,
            head_dim: int(head_dim)?,
            dtype: kind(dtype)?,
            flags: flags(config),
        };
        let budgets = budgets(config, selection_heads);
        let cap = reached_cap(config, &budgets, tokens);
        Ok(Self { config, shape, dtype, budgets, cap })
    }

    /// Tokens that each selection head keeps of a retired chunk.
    pub fn budgets_of(config: &HybridConfig) -> Vec<i32> {
        budgets(config, config.budgets.len())
    }

    /// Bytes of what the forward pass leaves to the backward pass.
    pub fn saved_bytes(&self, gated: bool) -> usize {
        self.saved(null_mut(), gated).1
    }

    /// Bytes of scratch of the forward pass; so many of its first are zeros.
    pub fn forward_scratch(&self) -> (usize, usize) {
        let mut cursor = Cursor { base: null_mut(), used: 0 };
        let [s, z] = self.recall_states();
        cursor.take::<f32>(s);
        cursor.take::<f32>(z);
        let zeros = cursor.used;
        cursor.take::<f32>(self.totals());
        cursor.take::<f32>(4 * received_floats(&self.shape, self.config));
        (cursor.used, zeros)
    }

    /// Bytes of scratch of the backward pass, which nothing is kept in.
    ///
    /// # Errors
    /// No kernels for the shape.
    pub fn backward_scratch(&self) -> Result<usize> {
        // SAFETY: reads the shape and a budget of every selection head.
        let bytes = unsafe { still_backward_bytes(&self.shape, self.budgets.as_ptr()) };
        Ok(usize::try_from(bytes).map_err(candle_core::Error::wrap)?)
    }

    /// Queues routing and forward pass: `out` `[B, H, N, D]`, and `scores`, f32 `[B, S, N]`, which are zeros before. Where nothing
    /// `trains`, no backward pass may follow.
    ///
    /// # Safety
    /// Every address is of memory on the thread's current device that is as large as its description says, and that nobody else
    /// writes before the stream, which is that device's, has passed.
    ///
    /// # Errors
    /// What a kernel's launch returns.
    pub unsafe fn forward(
        &self,
        operands: &DeviceOperands,
        maps: &DeviceMaps,
        (out, trains): (DeviceRows, bool),
        scores: *mut f32,
        scratch: *mut u8,
        stream: Stream,
    ) -> Result<()> {
        let stream = as_the_caller_means(stream);
        let Self { config, shape, .. } = self;
        let sections = self.saved(operands.saved, operands.gate.is_some()).0;
        let routing = self.routing(operands, &sections);
        let mut scratch = Cursor { base: scratch, used: 0 };
        let [s_bytes, z_bytes] = self.recall_states();
        let (s, z) = (scratch.take(s_bytes), scratch.take(z_bytes));
        let totals = scratch.take(self.totals());
        let partial = match received_floats(shape, config) {
            0 => null_mut(),
            floats => scratch.take(4 * floats),
        };
        let &DeviceOperands { q, k, v, .. } = operands;
        let &DeviceMaps { map_q, map_k, householder_q, householder_k } = maps;
        let router = router(config);
        // SAFETY: the caller's.
        unsafe {
            let (to_q, to_k) = (sections.map_q, sections.map_k);
            let code =
                still_fold(shape, map_q, map_k, householder_q, householder_k, to_q, to_k, stream);
            launched("still_fold", code)?;
            let map_k = to_k.cast_const();
            match config.router {
                Router::SelfRecall => {
                    let code =
                        still_recall(shape, k, v, map_k, &routing, null(), s, z, scores, stream);
                    launched("still_recall", code)?;
                }
                Router::None => queue_selection(shape, scores, &routing, stream)?,
                _ => {
                    let code =
                        still_scores(shape, &router, q, k, null(), null(), partial, scores, stream);
                    launched("still_scores", code)?;
                    queue_selection(shape, scores, &routing, stream)?;
                }
            }
            let args = Forward {
                q,
                k,
                v,
                out,
                w_q: to_q,
                log_scale: operands.log_scale,
                routing,
                s: sections.s,
                z: sections.z,
                denominator: sections.denominator,
                maximum: wanted(trains, sections.maximum),
                arg_max: wanted(trains, sections.arg_max),
                first_chunk: 0,
                gate: operands.gate.unwrap_or(Rows::NONE),
                gate_from: null(),
                gate_until: null(),
                linear: if trains { self.linear_rows(&sections) } else { Rows::NONE },
            };
            let scan = Scan {
                map_k,
                phi: sections.phi,
                totals,
                s_last: null_mut(),
                z_last: null_mut(),
                past: null(),
            };
            Ok(queue(shape, &args, &scan, stream)?)
        }
    }

    /// Queues the backward pass of what [`DeviceAttention::forward`] left in `operands`.
    ///
    /// # Safety
    /// As there; `scratch` is 256-byte aligned.
    ///
    /// # Errors
    /// As there.
    pub unsafe fn backward(
        &self,
        operands: &DeviceOperands,
        to: &DeviceGradients,
        scratch: *mut u8,
        stream: Stream,
    ) -> Result<()> {
        let stream = as_the_caller_means(stream);
        let sections = self.saved(operands.saved, operands.gate.is_some()).0;
        let args = Backward {
            q: operands.q,
            k: operands.k,
            v: operands.v,
            out: to.out,
            d_out: to.d_out,
            d_q: to.d_q,
            d_k: to.d_k,
            d_v: to.d_v,
            w_q: sections.map_q,
            w_k: sections.map_k,
            log_scale: operands.log_scale,
            routing: self.routing(operands, &sections),
            phi: sections.phi,
            s: sections.s,
            z: sections.z,
            denominator: sections.denominator,
            maximum: sections.maximum,
            arg_max: sections.arg_max,
            d_w_q: to.d_map_q,
            d_w_k: to.d_map_k,
            d_log_scale: to.d_log_scale,
            host_budgets: self.budgets.as_ptr(),
            linear: self.linear_rows(&sections),
            d_linear: to.d_linear,
            d_gate: to.d_gate.unwrap_or(Rows::NONE),
            scratch: scratch.cast(),
        };
        // SAFETY: the caller's.
        launched("still_backward", unsafe { still_backward(&self.shape, &args, stream) })
    }

    /// The sections of `saved`, and its bytes.
    fn saved(&self, base: *mut u8, gated: bool) -> (Sections, usize) {
        let (batch, heads, tokens) = dims(&self.shape);
        let (rows, chunks) = (batch * heads * tokens, tokens.div_ceil(CHUNK));
        let (d, bytes) = (self.shape.head_dim as usize, self.dtype.size_in_bytes());
        let of_queries = batch * self.shape.heads as usize * tokens;
        let states = batch * heads * retired(tokens) * 2 * d;
        let capped = self.cap.map(|cap| cap as usize);
        let mut cursor = Cursor { base, used: 0 };
        let sections = Sections {
            selected: cursor.take(batch * heads * chunks * 8),
            map_q: cursor.take(self.shape.heads as usize * d * d * bytes),
            map_k: cursor.take(heads * d * d * bytes),
            phi: cursor.take(rows * 2 * d * bytes),
            s: cursor.take(states * d * bytes),
            z: cursor.take(states * 4),
            denominator: cursor.take(of_queries * 4),
            maximum: cursor.take(of_queries * 4),
            arg_max: cursor.take(of_queries * 4),
            linear: cursor.take(if gated { of_queries * d * bytes } else { 0 }),
            salient: cursor.take(rows * 4),
            visible: cursor.take(capped.map_or(0, |cap| batch * heads * chunks * cap * 4)),
            order: cursor.take(capped.map_or(0, |_| batch * heads * retired(tokens) * CHUNK * 4)),
        };
        if !gated {
            return (Sections { linear: null_mut(), ..sections }, cursor.used);
        }
        (sections, cursor.used)
    }

    fn routing(&self, operands: &DeviceOperands, sections: &Sections) -> still_kernels::Routing {
        let capped = self.cap.is_some();
        still_kernels::Routing {
            budgets: operands.budgets,
            selected: sections.selected,
            salient: sections.salient,
            retired: null(),
            stored: 0,
            rounded: 0,
            cap: self.cap.unwrap_or(NO_CAP),
            absorbed_at: operands.absorbed_at,
            visible: if capped { sections.visible } else { null() },
            order: if capped { sections.order } else { null() },
        }
    }

    /// The linear branch's numerator without its gate, `[B, H, N, D]`, contiguous.
    fn linear_rows(&self, sections: &Sections) -> Rows {
        let Shape { heads, tokens, head_dim, .. } = self.shape;
        let (heads, tokens, d) = (i64::from(heads), i64::from(tokens), i64::from(head_dim));
        match sections.linear.is_null() {
            true => Rows::NONE,
            false => Rows {
                data: sections.linear,
                batch: heads * tokens * d,
                head: tokens * d,
                token: d,
            },
        }
    }

    /// Bytes of `S` and `z` of the states that the router `self_recall` goes through.
    fn recall_states(&self) -> [usize; 2] {
        let Shape { batch, kv_heads, head_dim, .. } = self.shape;
        let (states, d) = ((batch * kv_heads) as usize, head_dim as usize);
        match self.config.router {
            Router::SelfRecall => [4 * states * 2 * d * d, 4 * states * 2 * d],
            _ => [0, 0],
        }
    }

    /// Bytes of the segments' totals in the scan of states.
    fn totals(&self) -> usize {
        let Shape { batch, kv_heads, head_dim, .. } = self.shape;
        // SAFETY: only reads the shape.
        let segments = unsafe { still_segments(&self.shape) } as usize;
        let d = head_dim as usize;
        4 * segments * (batch * kv_heads) as usize * 2 * d * (d + 1)
    }
}

/// The caller's stream. Null is the legacy default stream to most libraries, PyTorch among them; our kernels are compiled with
/// `--default-stream per-thread`, to which null is a stream of each thread: a forward and a backward pass that come from two threads
/// would not wait for each other there.
fn as_the_caller_means(stream: Stream) -> Stream {
    /// `cudaStreamLegacy`.
    const LEGACY: usize = 1;
    if stream.is_null() { std::ptr::without_provenance_mut(LEGACY) } else { stream }
}

/// An address that a kernel writes to if that is wanted.
fn wanted<T>(is: bool, at: *mut T) -> *mut T {
    if is { at } else { null_mut() }
}

fn launched(call: &'static str, code: i32) -> Result<()> {
    Ok(check(call, code).map_err(candle_core::Error::wrap)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_stream_is_the_legacy_one_and_others_are_themselves() {
        assert_eq!(as_the_caller_means(null_mut()).addr(), 1);
        let other = std::ptr::without_provenance_mut(4096);
        assert_eq!(as_the_caller_means(other), other);
    }
}
