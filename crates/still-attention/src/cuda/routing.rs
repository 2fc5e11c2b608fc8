//! Routing on the device: which tokens of each chunk are kept.

use std::ptr::{null, null_mut};
use std::sync::Arc;

use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Tensor};
use still_kernels::{
    CHUNK, NO_CAP, Shape, Stream, check, still_demote, still_recall, still_scores, still_select,
};

use super::layout::{router, uninit};
use crate::output::OP;
use crate::{AttentionError, HybridConfig, Result, Router, Selection};
use still_compute::cuda::{Launch, on_cuda};

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
    /// `[B, K, C]`: a bit for each token of a chunk.
    selected: CudaSlice<u64>,
    /// `[B, K, N]`: the kept tokens in order, of whole chunks.
    salient: CudaSlice<i32>,
    /// Where some head reaches its cap.
    capped: Option<Capped>,
}

/// What a cap makes of it.
#[derive(Debug)]
struct Capped {
    cap: i32,
    /// As [`Selection::absorbed_at`].
    absorbed_at: CudaSlice<u32>,
    /// `[B, K, C, cap]`: the salient tokens that each chunk sees.
    visible: CudaSlice<i32>,
    /// `[B, K, R, 64]`: retired chunks' tokens in the order in which they enter the state.
    order: CudaSlice<i32>,
}

impl Capped {
    /// Buffers to be filled.
    fn new(
        device: &CudaDevice,
        (batch, heads, tokens): (usize, usize, usize),
        cap: i32,
    ) -> candle_core::Result<Self> {
        let rows = batch * heads;
        Ok(Self {
            cap,
            absorbed_at: uninit(device, rows * tokens)?,
            visible: uninit(device, rows * tokens.div_ceil(CHUNK) * cap as usize)?,
            order: uninit(device, rows * retired(tokens) * CHUNK)?,
        })
    }
}

/// Queues the scores of `[B, K, N]` tokens, as far as they do not depend on the linear state (else they are 0).
fn queue_scores(
    device: &CudaDevice,
    shape: &Shape,
    [q, k]: [&Tensor; 2],
    config: &HybridConfig,
) -> candle_core::Result<CudaSlice<f32>> {
    let (batch, heads, tokens) = dims(shape);
    if matches!(config.router, Router::None | Router::SelfRecall) {
        return device.alloc_zeros(batch * heads * tokens);
    }
    let scores = uninit(device, batch * heads * tokens)?;
    let partial = received(device, shape, config)?;
    let router = router(config);
    let ((q, q_layout), (k, k_layout)) = (q.storage_and_layout(), k.storage_and_layout());
    let stream = device.cuda_stream();
    let mut launch = Launch::new(&stream)?;
    let q = launch.rows(on_cuda(&q)?, q_layout)?;
    let k = launch.rows(on_cuda(&k)?, k_layout)?;
    let (to, partial) = (launch.at(&scores), launch.at_optional(partial.as_ref()));
    // SAFETY: rows and buffers are as large as `shape` says, and live until the launch is dropped.
    let code =
        unsafe { still_scores(shape, &router, q, k, null(), null(), partial, to, launch.stream()) };
    check("still_scores", code).map_err(candle_core::Error::wrap)?;
    drop(launch);
    Ok(scores)
}

/// Scratch of `still_scores`, where its router wants some.
pub(super) fn received(
    device: &CudaDevice,
    shape: &Shape,
    config: &HybridConfig,
) -> candle_core::Result<Option<CudaSlice<f32>>> {
    match received_floats(shape, config) {
        0 => Ok(None),
        sums => Ok(Some(uninit(device, sums)?)),
    }
}

/// Floats of that scratch.
pub(super) fn received_floats(shape: &Shape, config: &HybridConfig) -> usize {
    let (batch, heads, tokens) = dims(shape);
    match config.router {
        Router::ReceivedAttention => batch * heads * tokens.div_ceil(CHUNK) * 2 * CHUNK,
        _ => 0,
    }
}

pub(super) fn dims(shape: &Shape) -> (usize, usize, usize) {
    (shape.batch as usize, shape.kv_heads as usize, shape.tokens as usize)
}

impl DeviceRouting {
    /// The router's own decision on `q`, `k` and `v`; `map_k` is contiguous and of their dtype.
    pub fn decide(
        device: &CudaDevice,
        shape: &Shape,
        [q, k, v]: [&Tensor; 3],
        map_k: &Tensor,
        config: &HybridConfig,
    ) -> Result<Self> {
        let (batch, heads, tokens) = dims(shape);
        let scores = queue_scores(device, shape, [q, k], config)?;
        let host_budgets = budgets(config, heads);
        let budgets = device.clone_htod(&host_budgets)?;
        let selected = uninit(device, batch * heads * tokens.div_ceil(CHUNK))?;
        let salient = uninit(device, batch * heads * tokens)?;
        let capped = match reached_cap(config, &host_budgets, tokens) {
            Some(cap) => Some(Capped::new(device, (batch, heads, tokens), cap)?),
            None => None,
        };
        let decided = Self(Arc::new(Decided {
            device: device.clone(),
            dims: (batch, heads, tokens),
            scores,
            budgets,
            host_budgets,
            selected,
            salient,
            capped,
        }));
        match config.router {
            Router::SelfRecall => decided.recall(shape, [k, v], map_k)?,
            _ => decided.select(shape)?,
        }
        Ok(decided)
    }

    /// Queues the selection by scores.
    fn select(&self, shape: &Shape) -> candle_core::Result<()> {
        let Decided { device, scores, .. } = &*self.0;
        let stream = device.cuda_stream();
        let mut launch = Launch::new(&stream)?;
        let (from, routing): (*mut f32, _) = (launch.at(scores), self.args(&mut launch));
        // SAFETY: the buffers are as large as `shape` says, and live until the launch is dropped.
        unsafe { queue_selection(shape, from, &routing, launch.stream()) }
    }

    /// Queues the selection where a score depends on the state, chunk by chunk.
    fn recall(
        &self,
        shape: &Shape,
        [k, v]: [&Tensor; 2],
        map_k: &Tensor,
    ) -> candle_core::Result<()> {
        let Decided { device, scores, .. } = &*self.0;
        let states = 2 * (shape.batch * shape.kv_heads * shape.head_dim) as usize;
        let s: CudaSlice<f32> = device.alloc_zeros(states * shape.head_dim as usize)?;
        let z: CudaSlice<f32> = device.alloc_zeros(states)?;
        let stream = device.cuda_stream();
        let held = [k, v, map_k].map(Tensor::storage_and_layout);
        let mut launch = Launch::new(&stream)?;
        let [k, v, map_k] = &held;
        let k = launch.rows(on_cuda(&k.0)?, k.1)?;
        let v = launch.rows(on_cuda(&v.0)?, v.1)?;
        let map_k = launch.values(on_cuda(&map_k.0)?, map_k.1)?;
        let routing = self.args(&mut launch);
        let (s, z, score) = (launch.at(&s), launch.at(&z), launch.at(scores));
        let on = launch.stream();
        // SAFETY: the buffers are as large as `shape` says, and live until the launch is dropped.
        let code = unsafe { still_recall(shape, k, v, map_k, &routing, null(), s, z, score, on) };
        check("still_recall", code).map_err(candle_core::Error::wrap)
    }

    /// A selection that was made elsewhere; scores are the router's own.
    ///
    /// # Errors
    /// The kernels keep equally many tokens of each retired chunk of a head, for good or until the head has as many as the
    /// configuration's cap.
    pub fn given(
        device: &CudaDevice,
        shape: &Shape,
        query_and_key: [&Tensor; 2],
        config: &HybridConfig,
        selection: &Selection,
    ) -> Result<Self> {
        let (batch, heads, tokens) = dims(shape);
        let host_budgets = match tokens.div_ceil(CHUNK) > 2 {
            true => (0..heads).map(|head| visible(selection, 0, head, 2).len() as i32).collect(),
            false => budgets(config, heads),
        };
        let cap = reached_cap(config, &host_budgets, tokens);
        let mut lists = Lists::default();
        for row in 0..batch * heads {
            let budget = host_budgets[row % heads] as usize;
            lists.add(selection, (row / heads, row % heads), budget, cap)?;
        }
        let scores = queue_scores(device, shape, query_and_key, config)?;
        let capped = match cap {
            None => None,
            Some(cap) => Some(Capped {
                cap,
                absorbed_at: device.clone_htod(&selection.absorbed_at)?,
                visible: device.clone_htod(&lists.visible)?,
                order: device.clone_htod(&lists.order)?,
            }),
        };
        Ok(Self(Arc::new(Decided {
            device: device.clone(),
            dims: (batch, heads, tokens),
            scores,
            budgets: device.clone_htod(&host_budgets)?,
            host_budgets,
            selected: device.clone_htod(&lists.selected)?,
            salient: device.clone_htod(&lists.salient)?,
            capped,
        })))
    }

    /// `[sequences, selection heads, tokens]`.
    pub fn dims(&self) -> (usize, usize, usize) {
        self.0.dims
    }

    pub fn device(&self) -> &CudaDevice {
        &self.0.device
    }

    /// What the kernels are told of it.
    pub(super) fn args<'a>(&'a self, launch: &mut Launch<'a>) -> still_kernels::Routing {
        let Decided { budgets, selected, salient, capped, .. } = &*self.0;
        let capped = capped.as_ref();
        still_kernels::Routing {
            budgets: launch.at(budgets),
            selected: launch.at(selected),
            salient: launch.at(salient),
            retired: null(),
            stored: 0,
            rounded: 0,
            cap: capped.map_or(NO_CAP, |capped| capped.cap),
            absorbed_at: launch.at_optional(capped.map(|capped| &capped.absorbed_at)),
            visible: launch.at_optional(capped.map(|capped| &capped.visible)),
            order: launch.at_optional(capped.map(|capped| &capped.order)),
        }
    }

    /// Tokens kept of each retired chunk, by selection head, where the host can read them.
    pub fn host_budgets(&self) -> &[i32] {
        &self.0.host_budgets
    }

    /// `[B, K, N]`: what the tokens were ranked by.
    pub fn scores_on_device(&self) -> &CudaSlice<f32> {
        &self.0.scores
    }

    /// Copies the selection, once the device has made it.
    pub fn selection(&self) -> Result<Selection> {
        let (batch, heads, tokens) = self.dims();
        let selection = |absorbed_at| Selection { chunk: CHUNK, batch, heads, tokens, absorbed_at };
        if let Some(Capped { absorbed_at, .. }) = &self.0.capped {
            return Ok(selection(self.device().clone_dtoh(absorbed_at)?));
        }
        let chunks = tokens.div_ceil(CHUNK);
        let selected = self.device().clone_dtoh(&self.0.selected)?;
        let absorbed_at = (0..batch * heads * tokens).map(|i| {
            let (row, token) = (i / tokens, i % tokens);
            let (chunk, bit) = (token / CHUNK, token % CHUNK);
            let kept = selected[row * chunks + chunk] >> bit & 1 == 1;
            if kept || chunk + 2 >= chunks { Selection::NEVER } else { chunk as u32 + 2 }
        });
        Ok(selection(absorbed_at.collect()))
    }

    /// Copies the scores `[B, K, N]`, once the device has made them.
    pub fn scores(&self) -> Result<Vec<f32>> {
        let (batch, heads, tokens) = self.dims();
        let mut scores = self.device().clone_dtoh(&self.0.scores)?;
        scores.truncate(batch * heads * tokens);
        Ok(scores)
    }
}

/// Queues the selection by scores into the buffers of `routing`.
///
/// # Safety
/// Every address is of memory as large as still.h says for `shape`, valid until the stream has passed.
pub(super) unsafe fn queue_selection(
    shape: &Shape,
    scores: *const f32,
    routing: &still_kernels::Routing,
    stream: Stream,
) -> candle_core::Result<()> {
    let &still_kernels::Routing {
        budgets,
        selected,
        salient,
        cap,
        absorbed_at,
        visible,
        order,
        ..
    } = routing;
    let (kept, list) = (selected.cast_mut(), salient.cast_mut());
    let absorbed_at = absorbed_at.cast_mut();
    // Under a cap the selection is not the last word.
    let last = if cap == NO_CAP { absorbed_at } else { null_mut() };
    // SAFETY: the caller's.
    let code = unsafe { still_select(shape, scores, budgets, kept, list, last, stream) };
    check("still_select", code).map_err(candle_core::Error::wrap)?;
    if cap == NO_CAP {
        return Ok(());
    }
    let (visible, order) = (visible.cast_mut(), order.cast_mut());
    // SAFETY: as above.
    let code = unsafe {
        still_demote(
            shape,
            scores,
            budgets,
            selected,
            salient,
            cap,
            absorbed_at,
            visible,
            order,
            null(),
            stream,
        )
    };
    check("still_demote", code).map_err(candle_core::Error::wrap)
}

/// Tokens that each head keeps of a retired chunk: more than the cap would be demoted at once.
pub(super) fn budgets(config: &HybridConfig, heads: usize) -> Vec<i32> {
    let cap = config.cap.unwrap_or(usize::MAX);
    (0..heads).map(|head| crate::router::effective_budget(config, head).min(cap) as i32).collect()
}

/// The cap, if some head of sequences of `tokens` tokens has more to keep.
pub(super) fn reached_cap(config: &HybridConfig, budgets: &[i32], tokens: usize) -> Option<i32> {
    let most = budgets.iter().max().copied().unwrap_or(0) as usize * retired(tokens);
    config.cap.filter(|&cap| most > cap).map(|cap| cap as i32)
}

/// Chunks that have left the window of a sequence of `tokens` tokens.
pub(super) fn retired(tokens: usize) -> usize {
    tokens.div_ceil(CHUNK).saturating_sub(2)
}

/// The salient tokens that a chunk sees.
fn visible(selection: &Selection, sequence: usize, head: usize, chunk: usize) -> Vec<usize> {
    let absorbed_at = selection.row(sequence, head);
    let candidates = 0..(chunk.saturating_sub(1) * CHUNK).min(absorbed_at.len());
    candidates.filter(|&token| absorbed_at[token] as usize > chunk).collect()
}

/// A selection as `StillRouting` has it, one (sequence, head) after the other.
#[derive(Default)]
struct Lists {
    selected: Vec<u64>,
    salient: Vec<i32>,
    visible: Vec<i32>,
    order: Vec<i32>,
}

impl Lists {
    fn add(
        &mut self,
        selection: &Selection,
        (sequence, head): (usize, usize),
        budget: usize,
        cap: Option<i32>,
    ) -> Result<()> {
        let absorbed_at = selection.row(sequence, head);
        let tokens = absorbed_at.len();
        let (chunks, retired) = (tokens.div_ceil(CHUNK), retired(tokens));
        let most = cap.map_or(usize::MAX, |cap| cap as usize);
        let (first_chosen, first_order) = (self.salient.len(), self.order.len());
        self.selected.resize(self.selected.len() + chunks, 0);
        let selected = self.selected.len() - chunks;
        self.salient.resize(first_chosen + tokens, 0);
        let mut seen = vec![0; cap.map_or(0, |cap| chunks * cap as usize)];
        for chunk in 0..retired {
            let now = chunk + 2;
            let sees = visible(selection, sequence, head, now);
            let kept = |retired: usize| (budget * retired).min(most);
            let entering: Vec<usize> =
                (0..(chunk + 1) * CHUNK).filter(|&t| absorbed_at[t] as usize == now).collect();
            // Those that were salient for a while, and what makes up the budget: demoted on arrival.
            let mut chosen: Vec<usize> = (chunk * CHUNK..(chunk + 1) * CHUNK).collect();
            chosen.sort_by_key(|&token| absorbed_at[token] as usize <= now);
            let salient = chosen.partition_point(|&token| absorbed_at[token] as usize > now);
            if sees.len() != kept(chunk + 1)
                || entering.len() != CHUNK + kept(chunk) - kept(chunk + 1)
                || salient > budget
            {
                return Err(uneven(head, chunk));
            }
            chosen.truncate(budget);
            chosen.sort_unstable();
            for (place, &token) in chosen.iter().enumerate() {
                self.selected[selected + chunk] |= 1 << (token % CHUNK);
                self.salient[first_chosen + chunk * budget + place] = token as i32;
            }
            let Some(cap) = cap else { continue };
            let seen = seen[now * cap as usize..].iter_mut();
            seen.zip(&sees).for_each(|(to, &token)| *to = token as i32);
            self.order.extend(entering.iter().map(|&token| token as i32));
            self.order.resize(first_order + (chunk + 1) * CHUNK, i32::MIN);
        }
        if cap.is_some() {
            let never = visible(selection, sequence, head, chunks - 1).into_iter();
            let places = self.order[first_order..].iter_mut().filter(|place| **place == i32::MIN);
            places.zip(never).for_each(|(place, token)| *place = !(token as i32));
        }
        self.visible.append(&mut seen);
        Ok(())
    }
}

fn uneven(head: usize, chunk: usize) -> AttentionError {
    AttentionError::Unsupported {
        op: OP,
        tensor: "routing",
        expected: "equally many tokens kept of each retired chunk of a head, for good or up to the cap, on CUDA",
        got: format!("another selection at head {head}, chunk {chunk}"),
    }
}
