//! Dense causal attention. Whole sequences by the hybrid's exact pass, which keeps every token; queries that continue one through
//! the tensor library's ops, a block at a time.

use std::ptr::{null, null_mut};

use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{D, DType, Device, Tensor};
use still_kernels::{CHUNK, Forward, HEAD_DIMS, NO_CAP, Routing, check, still_exact_forward};

use super::layout::{by_token, rows_aligned, shape, tensor_by_token, uninit};
use crate::Result;
use still_compute::cuda::{Gemm, gemm};
use still_compute::cuda::{Launch, on_cuda};

/// Query rows of a sequence answered together, at most.
const BLOCK: usize = 512;

/// Logits held at a time, in f32 half a gigabyte a copy: fewer query rows are answered together where keys are many.
const LOGITS: usize = 1 << 27;

/// [`crate::dense_attention`] on CUDA, its shapes checked; logits and their softmax in f32.
pub(crate) fn dense_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    attend(q, &k.detach(), &v.detach(), &[0])
}

/// Attention from `q` `[B, H, T, D]` to keys and values `[B, K, P + T, D]`, of which query `t` of a sequence sees those up to
/// `start + t`. `starts` has one for each sequence, or one for all. Keys and values may be a narrowed view along tokens.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, starts: &[usize]) -> Result<Tensor> {
    let known = HEAD_DIMS.contains(&q.dim(3)?) && matches!(q.dtype(), DType::F32 | DType::BF16);
    if known && starts == [0] { Ok(whole(q, k, v)?) } else { continued(q, k, v, starts) }
}

/// By the exact pass: every token of every chunk is salient.
fn whole(q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
    let Device::Cuda(device) = q.device() else { candle_core::bail!("expected a tensor on CUDA") };
    let dims = q.dims4()?;
    let (batch, heads, tokens, _) = dims;
    let kv_heads = k.dim(1)?;
    let shape = shape(q, kv_heads)?;
    let rows = [rows_aligned(q)?, rows_aligned(k)?, rows_aligned(v)?];
    let salient = Tensor::arange(0_u32, tokens as u32, q.device())?;
    let salient = salient.broadcast_as((batch, kv_heads, tokens))?.contiguous()?;
    let budgets = device.clone_htod(&vec![CHUNK as i32; kv_heads])?;
    let denominator: CudaSlice<f32> = uninit(device, batch * heads * tokens)?;
    // SAFETY: the kernel fills it.
    let out = unsafe { device.alloc_uninit(q.shape(), q.dtype())? };

    let stream = device.cuda_stream();
    let held = rows.each_ref().map(Tensor::storage_and_layout);
    let held_salient = salient.storage_and_layout();
    let mut launch = Launch::new(&stream)?;
    let [q_rows, k_rows, v_rows] = &held;
    let args = Forward {
        q: launch.rows(on_cuda(&q_rows.0)?, q_rows.1)?,
        k: launch.rows(on_cuda(&k_rows.0)?, k_rows.1)?,
        v: launch.rows(on_cuda(&v_rows.0)?, v_rows.1)?,
        out: launch.rows(&out, &by_token(dims))?,
        w_q: null_mut(),
        log_scale: null_mut(),
        routing: Routing {
            budgets: launch.at(&budgets),
            selected: null(),
            salient: launch.values(on_cuda(&held_salient.0)?, held_salient.1)?,
            retired: null(),
            stored: 0,
            cap: NO_CAP,
            absorbed_at: null(),
            visible: null(),
            order: null(),
        },
        s: null_mut(),
        z: null_mut(),
        denominator: launch.at(&denominator),
        maximum: null_mut(),
        arg_max: null_mut(),
        first_chunk: 0,
    };
    // SAFETY: rows and buffers are as large as `shape` says and live until the launch is dropped; of a head that keeps
    // everything, nothing of the linear branch is read.
    let code = unsafe { still_exact_forward(&shape, &args, launch.stream()) };
    check("still_exact_forward", code).map_err(candle_core::Error::wrap)?;
    drop(launch);
    tensor_by_token(out, dims)
}

/// By the tensor library's ops.
fn continued(q: &Tensor, k: &Tensor, v: &Tensor, starts: &[usize]) -> Result<Tensor> {
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
