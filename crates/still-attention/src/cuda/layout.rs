//! How the operator's tensors lie for its kernels, and memory that they fill.

use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Storage, Tensor};
use still_compute::cuda::kind;
use still_kernels::{
    STILL_FIRST_TOKENS, STILL_NO_LINEAR, STILL_NO_ROUTER, STILL_NO_SALIENT, STILL_NO_WINDOW,
    STILL_RANDOM, STILL_RECEIVED_ATTENTION, STILL_SELF_RECALL, STILL_SELF_SALIENCY,
    STILL_SOFTMAX_MAP, STILL_SUM, Shape,
};

use crate::{Branches, FeatureMap, HybridConfig, LinearNorm, Router};

/// Memory that some kernel fills before any reads it.
pub(super) fn uninit<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every user of this module queues what fills a buffer before what reads it. An empty one cannot be had.
    unsafe { device.alloc(len.max(1)) }
}

/// What a section of a buffer begins at a multiple of, as the backward pass wants its scratch.
const ALIGNMENT: usize = 256;

/// Hands out a buffer piece by piece. It may begin at no address: then it counts bytes.
pub(super) struct Cursor {
    pub base: *mut u8,
    pub used: usize,
}

impl Cursor {
    pub fn take<T>(&mut self, bytes: usize) -> *mut T {
        let at = self.base.wrapping_add(self.used).cast();
        self.used += bytes.next_multiple_of(ALIGNMENT);
        at
    }
}

/// What the kernels are told of a configuration besides shapes.
pub(super) fn flags(config: &HybridConfig) -> i32 {
    let Branches { window, salient, linear } = config.branches;
    let map = match config.feature_map {
        FeatureMap::NpMap { .. } => 0,
        FeatureMap::Softmax => STILL_SOFTMAX_MAP,
    };
    let switches: i32 = [
        (config.linear_norm == LinearNorm::Sum, STILL_SUM),
        (!window, STILL_NO_WINDOW),
        (!salient, STILL_NO_SALIENT),
        (!linear, STILL_NO_LINEAR),
    ]
    .into_iter()
    .map(|(holds, flag)| if holds { flag } else { 0 })
    .sum();
    map + switches
}

/// A router as the kernels know it.
pub(super) fn router(config: &HybridConfig) -> still_kernels::Router {
    let (kind, seed) = match config.router {
        Router::SelfSaliency => (STILL_SELF_SALIENCY, 0),
        Router::ReceivedAttention => (STILL_RECEIVED_ATTENTION, 0),
        Router::SelfRecall => (STILL_SELF_RECALL, 0),
        Router::FirstTokens => (STILL_FIRST_TOKENS, 0),
        Router::Random { seed } => (STILL_RANDOM, seed),
        Router::None => (STILL_NO_ROUTER, 0),
    };
    still_kernels::Router { kind, layer: config.layer as i32, seed }
}

/// A shape as the kernels take it.
pub(super) fn shape(q: &Tensor, kv_heads: usize, flags: i32) -> Result<Shape> {
    let (batch, heads, tokens, head_dim) = q.dims4()?;
    let int = |x: usize| i32::try_from(x).map_err(candle_core::Error::wrap);
    Ok(Shape {
        batch: int(batch)?,
        heads: int(heads)?,
        kv_heads: int(kv_heads)?,
        tokens: int(tokens)?,
        head_dim: int(head_dim)?,
        dtype: kind(q.dtype())?,
        flags,
    })
}

/// The tensor apart from its graph, copied if its rows do not lie as the kernels need them: adjacent channels, 16-byte
/// aligned.
pub(super) fn rows_aligned(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.detach();
    let layout = tensor.layout();
    let unit = 16 / tensor.dtype().size_in_bytes();
    let [outer @ .., inner] = layout.stride() else { return Ok(tensor) };
    let aligned = |elements: usize| elements.is_multiple_of(unit);
    if *inner == 1 && aligned(layout.start_offset()) && outer.iter().all(|&s| aligned(s)) {
        return Ok(tensor);
    }
    tensor.force_contiguous()
}

/// The layout of `[B, H, N, D]` whose heads lie next to each other token by token, as an output projection reads them.
pub(super) fn by_token((batch, heads, tokens, d): (usize, usize, usize, usize)) -> Layout {
    let strides = vec![heads * tokens * d, d, heads * d, 1];
    Layout::new((batch, heads, tokens, d).into(), strides, 0)
}

/// The tensor `[B, H, N, D]` of a new storage that lies [`by_token`].
pub(super) fn tensor_by_token(
    storage: CudaStorage,
    (batch, heads, tokens, d): (usize, usize, usize, usize),
) -> Result<Tensor> {
    let (storage, shape) = (Storage::Cuda(storage), (batch, tokens, heads, d));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false).transpose(1, 2)
}
