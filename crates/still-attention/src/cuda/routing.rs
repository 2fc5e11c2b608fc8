//! Routing on the device: which tokens of each chunk are kept.

use std::sync::Arc;

use candle_core::cuda::CudaStorageSlice;
use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Storage, Tensor};
use still_kernels::{CHUNK, Shape, check, still_saliency, still_select};

use super::launch::{Launch, on_cuda, uninit};
use crate::hybrid::OP;
use crate::linear_branch::bits;
use crate::{AttentionError, HybridConfig, Result, Router, Selection, router};

/// What was decided for one call.
#[derive(Clone, Debug)]
pub(crate) struct DeviceRouting(Arc<Decided>);

#[derive(Debug)]
struct Decided {
    device: CudaDevice,
    /// `[sequences, selection heads, tokens]`.
    dims: (usize, usize, usize),
    scores: CudaSlice<f32>,
    budgets: CudaSlice<i32>,
    host_budgets: Vec<i32>,
    selected: CudaSlice<u64>,
    salient: CudaSlice<i32>,
}

/// Queues the scores of `[B, K, N]` tokens.
fn queue_scores(
    device: &CudaDevice,
    shape: &Shape,
    [q, k]: [&Tensor; 2],
    config: &HybridConfig,
) -> candle_core::Result<CudaSlice<f32>> {
    let (batch, heads, tokens) = dims(shape);
    match config.router {
        Router::Random { seed } => {
            let score = |head, token| router::random_score(seed, config.layer, head, token) as f32;
            let row = |head| (0..tokens).map(move |token| score(head, token));
            let all = (0..batch).flat_map(|_| (0..heads).flat_map(row));
            device.clone_htod(&all.collect::<Vec<f32>>())
        }
        Router::None => device.alloc_zeros(batch * heads * tokens),
        Router::SelfSaliency
        | Router::ReceivedAttention
        | Router::SelfRecall
        | Router::FirstTokens => {
            let scores = uninit(device, batch * heads * tokens)?;
            let ((q, q_layout), (k, k_layout)) = (q.storage_and_layout(), k.storage_and_layout());
            let stream = device.cuda_stream();
            let mut launch = Launch::new(&stream)?;
            let q = launch.rows(on_cuda(&q)?, q_layout)?;
            let k = launch.rows(on_cuda(&k)?, k_layout)?;
            let to = launch.at(&scores);
            // SAFETY: rows and buffer are as large as `shape` says, and live until the launch is dropped.
            let code = unsafe { still_saliency(shape, q, k, to, launch.stream()) };
            check("still_saliency", code).map_err(candle_core::Error::wrap)?;
            drop(launch);
            Ok(scores)
        }
    }
}

fn dims(shape: &Shape) -> (usize, usize, usize) {
    (shape.batch as usize, shape.kv_heads as usize, shape.tokens as usize)
}

impl DeviceRouting {
    /// The router's own decision.
    pub fn decide(
        device: &CudaDevice,
        shape: &Shape,
        query_and_key: [&Tensor; 2],
        config: &HybridConfig,
    ) -> Result<Self> {
        let (batch, heads, tokens) = dims(shape);
        let scores = queue_scores(device, shape, query_and_key, config)?;
        let host_budgets: Vec<i32> =
            (0..heads).map(|head| router::effective_budget(config, head) as i32).collect();
        let budgets = device.clone_htod(&host_budgets)?;
        let selected = uninit(device, batch * heads * tokens.div_ceil(CHUNK))?;
        let salient = uninit(device, batch * heads * tokens)?;
        let stream = device.cuda_stream();
        let mut launch = Launch::new(&stream)?;
        // SAFETY: the buffers are as large as `shape` says, and live until the launch is dropped.
        let code = unsafe {
            let (from, budgets) = (launch.at(&scores), launch.at(&budgets));
            let (selected, salient) = (launch.at(&selected), launch.at(&salient));
            still_select(shape, from, budgets, selected, salient, launch.stream())
        };
        check("still_select", code).map_err(candle_core::Error::wrap)?;
        drop(launch);
        let dims = (batch, heads, tokens);
        let device = device.clone();
        Ok(Self(Arc::new(Decided {
            device,
            dims,
            scores,
            budgets,
            host_budgets,
            selected,
            salient,
        })))
    }

    /// A selection that was made elsewhere; scores are the router's own.
    ///
    /// # Errors
    /// The kernels keep equally many tokens of each retired chunk of a head, for good.
    pub fn given(
        device: &CudaDevice,
        shape: &Shape,
        query_and_key: [&Tensor; 2],
        config: &HybridConfig,
        selection: &Selection,
    ) -> Result<Self> {
        let (batch, heads, tokens) = dims(shape);
        let budget = |head| router::effective_budget(config, head);
        let mut budgets: Vec<usize> = (0..heads).map(budget).collect();
        let (chunks, retired) =
            (tokens.div_ceil(CHUNK), (tokens.div_ceil(CHUNK)).saturating_sub(2));
        let mut selected = vec![0_u64; batch * heads * chunks];
        let mut salient = vec![0_i32; batch * heads * tokens];
        for row in 0..batch * heads {
            let (sequence, head) = (row / heads, row % heads);
            let absorbed_at = selection.row(sequence, head);
            for chunk in 0..retired {
                let span = chunk * CHUNK..(chunk + 1) * CHUNK;
                let kept: Vec<usize> =
                    span.clone().filter(|&t| absorbed_at[t] == Selection::NEVER).collect();
                let absorbed = span.filter(|&t| absorbed_at[t] as usize == chunk + 2).count();
                if (sequence, chunk) == (0, 0) {
                    budgets[head] = kept.len();
                }
                if kept.len() != budgets[head] || kept.len() + absorbed != CHUNK {
                    return Err(uneven(head, chunk));
                }
                for (place, &token) in kept.iter().enumerate() {
                    selected[row * chunks + chunk] |= 1 << (token % CHUNK);
                    salient[row * tokens + chunk * kept.len() + place] = token as i32;
                }
            }
        }
        let scores = queue_scores(device, shape, query_and_key, config)?;
        let host_budgets: Vec<i32> = budgets.into_iter().map(|budget| budget as i32).collect();
        Ok(Self(Arc::new(Decided {
            device: device.clone(),
            dims: (batch, heads, tokens),
            scores,
            budgets: device.clone_htod(&host_budgets)?,
            host_budgets,
            selected: device.clone_htod(&selected)?,
            salient: device.clone_htod(&salient)?,
        })))
    }

    /// `[sequences, selection heads, tokens]`.
    pub fn dims(&self) -> (usize, usize, usize) {
        self.0.dims
    }

    pub fn device(&self) -> &CudaDevice {
        &self.0.device
    }

    /// Tokens kept of each retired chunk, by selection head.
    pub fn budgets(&self) -> &CudaSlice<i32> {
        &self.0.budgets
    }

    /// [`DeviceRouting::budgets`] where the host can read them.
    pub fn host_budgets(&self) -> &[i32] {
        &self.0.host_budgets
    }

    /// `[B, K, C]`: a bit for each token of a chunk.
    pub fn selected(&self) -> &CudaSlice<u64> {
        &self.0.selected
    }

    /// `[B, K, N]`: the kept tokens in order, of whole chunks.
    pub fn salient(&self) -> &CudaSlice<i32> {
        &self.0.salient
    }

    /// `[B, K, N]`: what the tokens were ranked by.
    pub fn scores_on_device(&self) -> &CudaSlice<f32> {
        &self.0.scores
    }

    /// `[B, K, C · 64]` f32: 1 for tokens that enter the state when their chunk retires, 0 for those that are kept.
    pub fn absorbed(&self) -> candle_core::Result<Tensor> {
        let (batch, heads, tokens) = self.dims();
        let chunks = tokens.div_ceil(CHUNK);
        let (device, bytes) = (self.device(), CHUNK / 8);
        let mut copy: CudaSlice<u8> = uninit(device, batch * heads * chunks * bytes)?;
        // SAFETY: any bytes are u8, and there are eight in each u64; the device has its lowest bits first.
        let selected = unsafe { self.selected().transmute::<u8>(batch * heads * chunks * bytes) };
        let Some(selected) = selected else { candle_core::bail!("fewer bits than tokens") };
        device.memcpy_dtod(&selected, &mut copy)?;
        let storage = CudaStorage { slice: CudaStorageSlice::U8(copy), device: device.clone() };
        let shape = (batch, heads, chunks * bytes);
        let none = BackpropOp::none();
        let selected = Tensor::from_storage(Storage::Cuda(storage), shape, none, false);
        bits(&selected)?.affine(-1.0, 1.0)
    }

    /// Copies the selection, once the device has made it.
    pub fn selection(&self) -> Result<Selection> {
        let (batch, heads, tokens) = self.dims();
        let chunks = tokens.div_ceil(CHUNK);
        let selected = self.device().clone_dtoh(self.selected())?;
        let absorbed_at = (0..batch * heads * tokens).map(|i| {
            let (row, token) = (i / tokens, i % tokens);
            let (chunk, bit) = (token / CHUNK, token % CHUNK);
            let kept = selected[row * chunks + chunk] >> bit & 1 == 1;
            if kept || chunk + 2 >= chunks { Selection::NEVER } else { chunk as u32 + 2 }
        });
        let absorbed_at = absorbed_at.collect();
        Ok(Selection { chunk: CHUNK, batch, heads, tokens, absorbed_at })
    }

    /// Copies the scores `[B, K, N]`, once the device has made them.
    pub fn scores(&self) -> Result<Vec<f32>> {
        let (batch, heads, tokens) = self.dims();
        let mut scores = self.device().clone_dtoh(&self.0.scores)?;
        scores.truncate(batch * heads * tokens);
        Ok(scores)
    }
}

fn uneven(head: usize, chunk: usize) -> AttentionError {
    AttentionError::Unsupported {
        op: OP,
        tensor: "routing",
        expected: "equally many tokens kept of each retired chunk of a head, for good, on CUDA",
        got: format!("another selection at head {head}, chunk {chunk}"),
    }
}
