//! Dense causal attention: the kernels of `dense.h`, and the tensor library's ops where they have none for a head dimension.

use std::ffi::c_int;
use std::ptr::null;
use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, D, DType, Device, Tensor};
use still_compute::cuda::{Gemm, Launch, PassScratch, StepMemory, gemm, on_cuda};
use still_kernels::dense::{
    DENSE_DECODE_HEAD_DIMS, DENSE_FORWARD_HEAD_DIMS, DENSE_FORWARD_HEAD_DIMS_BF16, DENSE_SPLITS,
    DenseAppend, DenseDecode, DenseForward, DenseSequence, still_dense_append, still_dense_decode,
    still_dense_decode_floats, still_dense_forward, still_dense_widen,
};
use still_kernels::{Shape, Stream, check};

use super::dense_rows::{DenseRows, in_table};
use super::graph_state::StepRotation;
use super::layout::{by_token, rows_aligned, shape, tensor_by_token};
use crate::{HeadGeometry, Result};

/// Query rows of a sequence answered together by ops, at most.
const BLOCK: usize = 512;

/// Logits held at a time, in f32 half a gigabyte a copy: fewer query rows are answered together where keys are many.
const LOGITS: usize = 1 << 27;

/// Blocks of a decode step, in all: two for every multiprocessor of an H100. More of them have more results to add up.
const BLOCKS: usize = 2 * 132;

/// Blocks that share a sequence's KV head, at the least: sequences may differ in length.
const FEWEST: usize = 4;

/// [`crate::dense_attention`] on CUDA, its shapes checked; logits and their softmax in f32.
pub(crate) fn dense_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    if has_forward(q) { Ok(forward(q, [k, v], None)?) } else { by_ops(q, [k, v], &[0]) }
}

/// Whether [`forward`] has a kernel for such rows.
pub(super) fn has_forward(q: &Tensor) -> bool {
    let head_dim = q.dims().last().copied().unwrap_or(0);
    match q.dtype() {
        DType::F32 => DENSE_FORWARD_HEAD_DIMS.contains(&head_dim),
        DType::BF16 => {
            let mut all = DENSE_FORWARD_HEAD_DIMS.iter().chain(&DENSE_FORWARD_HEAD_DIMS_BF16);
            all.any(|&dim| dim == head_dim)
        }
        _ => false,
    }
}

/// Whether [`decode`] has a kernel for such rows.
pub(super) fn has_decode(head_dim: usize) -> bool {
    DENSE_DECODE_HEAD_DIMS.contains(&head_dim)
}

/// Where sequences stand and how many tokens each is fed, on the device.
pub(super) struct Spans {
    /// `[2, B]`: starts and lengths.
    counts: Arc<CudaSlice<i32>>,
}

impl Spans {
    pub fn new(
        device: &CudaDevice,
        starts: &[usize],
        lengths: &[usize],
        scratch: &PassScratch,
    ) -> candle_core::Result<Self> {
        let counts = starts.iter().chain(lengths).map(|&count| count as i32);
        Ok(Self { counts: scratch.counts(device, counts.collect())? })
    }

    /// Starts and lengths, as kernels take them.
    fn at<'a>(&'a self, launch: &mut Launch<'a>) -> [*const i32; 2] {
        let counts: *mut i32 = launch.at(&self.counts);
        [counts, counts.wrapping_add(self.batch())].map(<*mut i32>::cast_const)
    }

    fn batch(&self) -> usize {
        self.counts.len() / 2
    }
}

/// A kernel between rows and a cache.
type CacheKernel = unsafe extern "C" fn(*const Shape, *const DenseAppend, Stream) -> c_int;

/// Copies the new rows `k`, `v` `[B, K, T, D]` behind what the sequences have in `cache`.
pub(super) fn append(
    [k, v]: [&Tensor; 2],
    cache: &DenseRows,
    spans: &Spans,
) -> candle_core::Result<()> {
    let [k, v] = [rows_aligned(k)?, rows_aligned(v)?];
    // SAFETY: the caller has made room for what each sequence is fed.
    unsafe { queue("still_dense_append", still_dense_append, [&k, &v], cache, spans) }
}

/// What a cache of codes gives back of the first `tokens` tokens of each sequence, K and V `[B, K, tokens, D]` of `dtype`: zeros
/// behind those that it has.
pub(super) fn widen(
    cache: &DenseRows,
    (geometry, tokens): (HeadGeometry, usize),
    dtype: DType,
    spans: &Spans,
) -> candle_core::Result<[Tensor; 2]> {
    let HeadGeometry { num_key_value_heads: heads, head_dim, .. } = geometry;
    let (device, shape) = (cache.device(), (spans.batch(), heads, tokens, head_dim));
    // SAFETY: the kernel fills them.
    let [k, v] =
        unsafe { [Tensor::empty(shape, dtype, device)?, Tensor::empty(shape, dtype, device)?] };
    // SAFETY: no sequence has more tokens than there is room for.
    unsafe { queue("still_dense_widen", still_dense_widen, [&k, &v], cache, spans)? };
    Ok([k, v])
}

/// Queues `kernel` between `rows` and what `cache` has from there on that the spans say.
///
/// # Safety
/// All rows that the spans name have room in the cache.
unsafe fn queue(
    name: &'static str,
    kernel: CacheKernel,
    rows: [&Tensor; 2],
    cache: &DenseRows,
    spans: &Spans,
) -> candle_core::Result<()> {
    let shape = shape(rows[0], rows[0].dim(1)?, 0)?;
    let stream = cache.device().as_cuda_device()?.cuda_stream();
    let (held, held_cache) = (rows.map(Tensor::storage_and_layout), cache.held());
    let mut launch = Launch::new(&stream)?;
    let ([k, v], [starts, lengths]) = (&held, spans.at(&mut launch));
    let args = DenseAppend {
        k: launch.rows(on_cuda(&k.0)?, k.1)?,
        v: launch.rows(on_cuda(&v.0)?, v.1)?,
        cache: held_cache.args(&mut launch)?,
        starts,
        lengths,
    };
    // SAFETY: the caller's; all buffers live until the launch is dropped.
    let code = unsafe { kernel(&shape, &args, launch.stream()) };
    check(name, code).map_err(candle_core::Error::wrap)
}

/// Attention from `q` `[B, H, T, D]` to keys and values `[B, K, room, D]`, of which query `t` of a sequence sees those up to its
/// start + `t`; without spans all start at 0 and have `T` tokens. Output rows of padding are 0.
pub(super) fn forward(
    q: &Tensor,
    [k, v]: [&Tensor; 2],
    spans: Option<&Spans>,
) -> candle_core::Result<Tensor> {
    let Device::Cuda(device) = q.device() else { candle_core::bail!("expected a tensor on CUDA") };
    let dims = q.dims4()?;
    let shape = shape(q, k.dim(1)?, 0)?;
    let rows = [rows_aligned(q)?, rows_aligned(k)?, rows_aligned(v)?];
    // SAFETY: the kernel fills it.
    let out = unsafe { device.alloc_uninit(q.shape(), q.dtype())? };
    let stream = device.cuda_stream();
    let held = rows.each_ref().map(Tensor::storage_and_layout);
    let mut launch = Launch::new(&stream)?;
    let [q, k, v] = &held;
    let [starts, lengths] = spans.map_or([null(); 2], |spans| spans.at(&mut launch));
    let args = DenseForward {
        q: launch.rows(on_cuda(&q.0)?, q.1)?,
        cache_k: launch.rows(on_cuda(&k.0)?, k.1)?,
        cache_v: launch.rows(on_cuda(&v.0)?, v.1)?,
        out: launch.rows(&out, &by_token(dims))?,
        starts,
        lengths,
    };
    // SAFETY: keys and values of all tokens that the spans name are there; all buffers live until the launch is dropped.
    let code = unsafe { still_dense_forward(&shape, &args, launch.stream()) };
    check("still_dense_forward", code).map_err(candle_core::Error::wrap)?;
    drop(launch);
    tensor_by_token(out, dims)
}

/// Blocks that share a sequence's KV head in [`decode`].
pub(super) fn splits(batch: usize, kv_heads: usize) -> i32 {
    (BLOCKS / (batch * kv_heads)).clamp(FEWEST, DENSE_SPLITS) as i32
}

/// Where the sequences of a step have their keys and values.
#[derive(Clone, Copy)]
pub(super) enum StepRows<'a> {
    /// In one cache.
    Cache(&'a DenseRows),
    /// In a cache each: `still_kernels::DenseSequence` of every sequence, and how rows are kept, as kernels name it.
    Table(&'a CudaSlice<u64>, i32),
}

/// Queues attention of one token of each sequence, whose row is added to `cache`: `rows` are `q` and the output
/// `[B, H, 1, D]`, `k` and `v` `[B, K, 1, D]`; `positions` `[B]` u32; `arrived` `[B, H]`, zeros between steps; `rotation`:
/// what `q` and `k` go through first; `memory`: where blocks leave their results.
pub(super) fn decode(
    [q, k, v, out]: [&Tensor; 4],
    cache: StepRows<'_>,
    positions: &Tensor,
    arrived: &CudaSlice<u32>,
    rotation: Option<StepRotation<'_>>,
    memory: &StepMemory,
) -> candle_core::Result<()> {
    let device = q.device().as_cuda_device()?;
    let (batch, kv_heads) = (q.dim(0)?, k.dim(1)?);
    let (shape, splits) = (shape(q, kv_heads, 0)?, splits(batch, kv_heads));
    // SAFETY: only reads the shape.
    let floats = unsafe { still_dense_decode_floats(&shape, splits) };
    let floats = usize::try_from(floats).map_err(candle_core::Error::wrap)?;
    let partial = memory.tensor(("partial results", 0), floats, DType::F32, q.device())?;
    let held_partial = partial.storage_and_layout();
    let rows = [rows_aligned(q)?, rows_aligned(k)?, rows_aligned(v)?];
    let stream = device.cuda_stream();
    let held = rows.each_ref().map(Tensor::storage_and_layout);
    let held_out = [out, positions].map(Tensor::storage_and_layout);
    let held_cache;
    let angles = match rotation {
        Some(StepRotation { cos, sin }) => Some([cos.contiguous()?, sin.contiguous()?]),
        None => None,
    };
    let rotary = angles.as_ref().map_or(0, |[cos, _]| 2 * cos.elem_count() / batch);
    let held_angles = angles.as_ref().map(|both| both.each_ref().map(Tensor::storage_and_layout));
    let mut launch = Launch::new(&stream)?;
    let [cos, sin] = match &held_angles {
        Some([cos, sin]) => [
            launch.values::<f32>(on_cuda(&cos.0)?, cos.1)?.cast_const(),
            launch.values::<f32>(on_cuda(&sin.0)?, sin.1)?.cast_const(),
        ],
        None => [null(), null()],
    };
    let ([q, k, v], [out, positions]) = (&held, &held_out);
    let (cache, caches) = match cache {
        StepRows::Cache(rows) => {
            held_cache = rows.held();
            (held_cache.args(&mut launch)?, null())
        }
        StepRows::Table(table, coding) => {
            (in_table(coding), launch.at::<_, DenseSequence>(table).cast_const())
        }
    };
    let args = DenseDecode {
        q: launch.rows(on_cuda(&q.0)?, q.1)?,
        k: launch.rows(on_cuda(&k.0)?, k.1)?,
        v: launch.rows(on_cuda(&v.0)?, v.1)?,
        out: launch.rows(on_cuda(&out.0)?, out.1)?,
        cache,
        cos,
        sin,
        rotary: rotary as i32,
        positions: launch.values::<i32>(on_cuda(&positions.0)?, positions.1)?,
        partial: launch.values(on_cuda(&held_partial.0)?, held_partial.1)?,
        arrived: launch.at(arrived),
        splits,
        caches,
    };
    // SAFETY: the buffers are as large as dense.h says for `shape`, the cache has room for `positions`, and all live until the
    // launch is dropped.
    let code = unsafe { still_dense_decode(&shape, &args, launch.stream()) };
    check("still_dense_decode", code).map_err(candle_core::Error::wrap)
}

/// [`forward`] by the tensor library's ops, a block of queries at a time. `starts` has one for each sequence, or one for all; keys
/// and values `[B, K, P + T, D]` may be a narrowed view along tokens.
pub(super) fn by_ops(q: &Tensor, [k, v]: [&Tensor; 2], starts: &[usize]) -> Result<Tensor> {
    let (k, v) = (k.detach(), v.detach());
    let (batch, num_heads, tokens, head_dim) = q.dims4()?;
    let (kv_heads, all) = (k.dim(1)?, k.dim(2)?);
    let group = num_heads / kv_heads;
    let scale = (head_dim as f64).powf(-0.5);
    let longest = starts.iter().copied().max().unwrap_or(0);
    let block = (LOGITS / (batch * num_heads * all)).clamp(1, BLOCK);
    let mut blocks = Vec::with_capacity(tokens.div_ceil(block));
    for start in (0..tokens).step_by(block) {
        let length = block.min(tokens - start);
        let end = longest + start + length;
        let (keys, values) = (k.narrow(2, 0, end)?, v.narrow(2, 0, end)?);
        // The group's query heads are rows of one product.
        let queries = q.detach().narrow(2, start, length)?.contiguous()?;
        let queries = queries.reshape((batch, kv_heads, group * length, head_dim))?;
        let logits = (logits(&queries, &keys)? * scale)?;
        let logits = logits.reshape((batch, kv_heads, group, length, end))?;
        // A lone query sees every key, if all sequences are equally long.
        let logits = match starts {
            [_] if length == 1 => logits,
            _ => logits.broadcast_add(&mask(starts, start, length, end, q)?)?,
        };
        let powers = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
        let shares = powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)?.to_dtype(q.dtype())?;
        let out = shares.reshape((batch, kv_heads, group * length, end))?.matmul(&values)?;
        blocks.push(out.reshape((batch, num_heads, length, head_dim))?);
    }
    Ok(Tensor::cat(&blocks, 2)?)
}

/// `queries` `[B, K, rows, D]` times `keys` `[B, K, end, D]` transposed, in f32.
fn logits(queries: &Tensor, keys: &Tensor) -> candle_core::Result<Tensor> {
    if queries.dtype() != DType::BF16 {
        return queries.matmul(&keys.t()?)?.to_dtype(DType::F32);
    }
    let (batch, kv_heads, rows, _) = queries.dims4()?;
    let products = (0..batch).map(|sequence| {
        // Heads of one sequence lie equally far apart, whatever room there is behind their rows.
        gemm(&queries.get(sequence)?, &keys.get(sequence)?.t()?, Gemm::to(DType::F32))
    });
    let products = Tensor::stack(&products.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
    products.reshape((batch, kv_heads, rows, keys.dim(2)?))
}

/// `[starts, 1, 1, length, keys]`: 0 for keys up to the query's own, −∞ after it. The queries are `first..` after each start.
fn mask(
    starts: &[usize],
    first: usize,
    length: usize,
    keys: usize,
    like: &Tensor,
) -> Result<Tensor> {
    let queries = starts.iter().flat_map(|start| start + first..start + first + length);
    let queries: Vec<u32> = queries.map(|position| position as u32).collect();
    let queries = Tensor::from_vec(queries, (starts.len(), 1, 1, length, 1), like.device())?;
    let keys = Tensor::arange(0, keys as u32, like.device())?.reshape((1, 1, 1, 1, keys))?;
    let later = keys.broadcast_gt(&queries)?;
    let never = Tensor::full(f32::NEG_INFINITY, later.shape(), like.device())?;
    Ok(later.where_cond(&never, &never.zeros_like()?)?)
}
