//! Reading onto a state: the tokens of its ring and the new ones become one sequence for the kernels of whole sequences, what
//! was stored lies before it, and the state's sums are the first of its prefix states.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Tensor};
use still_compute::cuda::{Launch, on_cuda};
use still_kernels::{
    CHUNK, Decode, Forward, NO_CAP, Past, Routing, Rows, STILL_PLAIN, Shape, Stream, check,
    still_demote, still_past_fill, still_past_rows, still_past_select, still_recall, still_scores,
    still_segments,
};

use super::super::forward::{Scan, queue};
use super::super::layout::{by_token, flags, shape, tensor_by_token, uninit};
use super::super::routing::{reached_cap, received, retired};
use super::step::StepState;
use super::{CudaHybridState, Fed, GraphState, kept};
use crate::{Result, Router};

/// Where the sequences of a call stand, each counted from the first token of its ring that has not retired.
struct Spans {
    /// Chunks that had retired.
    retired: Vec<usize>,
    /// Tokens of the ring that had not.
    ring: Vec<usize>,
    /// Those and the new ones.
    ends: Vec<usize>,
}

impl Spans {
    fn new(positions: &[usize], lengths: &[usize]) -> Self {
        let retired: Vec<usize> = positions.iter().map(|&position| retired(position)).collect();
        let ring: Vec<usize> = positions
            .iter()
            .zip(&retired)
            .map(|(position, retired)| position - retired * CHUNK)
            .collect();
        let ends = ring.iter().zip(lengths).map(|(ring, length)| ring + length).collect();
        Self { retired, ring, ends }
    }

    /// Tokens of the longest sequence.
    fn tokens(&self) -> usize {
        self.ends.iter().copied().max().unwrap_or(0)
    }

    /// The first chunk that has a new token.
    fn first_chunk(&self) -> usize {
        self.ring.iter().copied().min().unwrap_or(0) / CHUNK
    }

    /// All three, one after another.
    fn upload(&self, device: &CudaDevice) -> candle_core::Result<CudaSlice<i32>> {
        let all = [&self.retired, &self.ring, &self.ends].into_iter().flatten();
        device.clone_htod(&all.map(|&count| count as i32).collect::<Vec<_>>())
    }
}

/// What a call's kernels leave for each other. `N`: tokens of the longest sequence; `M`: the most rows that a head had stored.
struct Scratch {
    /// `[B, H, N, D]`
    q: CudaSlice<u8>,
    /// `[B, K, M + N, D]`, and `v`; where rows are kept as codes `[B, K, N + M + N, D]`.
    k: CudaSlice<u8>,
    v: CudaSlice<u8>,
    /// `[B, K, N]`
    score: CudaSlice<f32>,
    /// `[B, K, C]`
    selected: CudaSlice<u64>,
    /// `[B, K, M + N]`
    salient: CudaSlice<i32>,
    capped: Option<Capped>,
    /// `[B, K, N, 2D]`
    phi: CudaSlice<u8>,
    totals: CudaSlice<f32>,
    /// `[B, K, R + 1, 2D, D]`
    s: CudaSlice<u8>,
    z: CudaSlice<f32>,
    /// `[B, H, N]`
    denominator: CudaSlice<f32>,
    /// The state's sums, where the call changes them.
    copies: Option<[CudaSlice<f32>; 2]>,
    /// Others, where a router follows them from chunk to chunk.
    recalled: Option<[CudaSlice<f32>; 2]>,
    /// What a router leaves from one kernel to the next.
    received: Option<CudaSlice<f32>>,
    /// The state's rows, where they are codes that change places.
    codes: Option<[CudaSlice<u8>; 2]>,
}

/// Under a cap that is reached.
struct Capped {
    cap: i32,
    /// `[B, K, C, cap]`
    visible: CudaSlice<i32>,
    /// `[B, K, R, 64]`
    order: CudaSlice<i32>,
    /// `[B, K, M]`, and the next two: what was stored, by rank.
    score: CudaSlice<f32>,
    token: CudaSlice<i32>,
    place: CudaSlice<i32>,
}

impl Scratch {
    fn new(
        state: &CudaHybridState,
        shape: &Shape,
        stored: usize,
        cap: Option<i32>,
    ) -> candle_core::Result<Self> {
        let weights = &*state.weights;
        let (device, bytes) = (&weights.device, weights.dtype.size_in_bytes());
        let [heads, kv_heads] =
            [shape.heads, shape.kv_heads].map(|heads| (shape.batch * heads) as usize);
        let (tokens, d) = (shape.tokens as usize, shape.head_dim as usize);
        let (chunks, retired) = (tokens.div_ceil(CHUNK), retired(tokens));
        let coded = state.store.kind() != STILL_PLAIN;
        let rows = stored + if coded { 2 * tokens } else { tokens };
        // SAFETY: only reads the shape.
        let segments = unsafe { still_segments(shape) } as usize;
        let capped = |cap| {
            Ok::<_, candle_core::Error>(Capped {
                cap,
                visible: uninit(device, kv_heads * chunks * cap as usize)?,
                order: uninit(device, kv_heads * retired * CHUNK)?,
                score: uninit(device, kv_heads * stored)?,
                token: uninit(device, kv_heads * stored)?,
                place: uninit(device, kv_heads * stored)?,
            })
        };
        Ok(Self {
            q: uninit(device, heads * tokens * d * bytes)?,
            k: uninit(device, kv_heads * rows * d * bytes)?,
            v: uninit(device, kv_heads * rows * d * bytes)?,
            score: uninit(device, kv_heads * tokens)?,
            selected: uninit(device, kv_heads * chunks)?,
            salient: uninit(device, kv_heads * (stored + tokens))?,
            capped: cap.map(capped).transpose()?,
            phi: uninit(device, kv_heads * tokens * 2 * d * bytes)?,
            totals: uninit(device, segments * kv_heads * 2 * d * (d + 1))?,
            s: uninit(device, kv_heads * (retired + 1) * 2 * d * d * bytes)?,
            z: uninit(device, kv_heads * (retired + 1) * 2 * d)?,
            denominator: uninit(device, heads * tokens)?,
            copies: match retired {
                0 => None,
                _ => Some([copy(device, &state.s)?, copy(device, &state.z)?]),
            },
            recalled: match weights.config.router {
                Router::SelfRecall => Some([copy(device, &state.s)?, copy(device, &state.z)?]),
                _ => None,
            },
            received: received(device, shape, &weights.config)?,
            codes: match coded && cap.is_some() {
                true => Some(state.store.copies(device)?),
                false => None,
            },
        })
    }
}

fn copy(device: &CudaDevice, from: &CudaSlice<f32>) -> candle_core::Result<CudaSlice<f32>> {
    let mut to = uninit(device, from.len())?;
    device.memcpy_dtod(from, &mut to)?;
    Ok(to)
}

/// Rows `[B, heads, before + N + behind, D]` in a buffer, from token 0 on.
fn rows(
    data: *mut u8,
    shape: &Shape,
    heads: i32,
    (before, behind): (usize, usize),
    bytes: usize,
) -> Rows {
    let d = shape.head_dim as usize;
    let head = (before + shape.tokens as usize + behind) * d;
    Rows {
        data: data.wrapping_add(before * d * bytes).cast(),
        batch: (heads as usize * head) as i64,
        head: head as i64,
        token: d as i64,
    }
}

impl CudaHybridState {
    /// Reads the first `lengths` tokens of each sequence onto what it has, all in the same kernels; of sequences of different
    /// lengths as many are computed as of the longest.
    pub(super) fn read_onto(&mut self, rows: &Fed, lengths: &[usize]) -> Result<Tensor> {
        let fed: Vec<usize> = self
            .positions
            .iter()
            .zip(lengths)
            .map(|(position, length)| position + length)
            .collect();
        let longest = fed.iter().copied().max().unwrap_or(0);
        self.reserve(longest)?;
        let spans = Spans::new(&self.positions, lengths);
        let out = self.queue_onto(rows, &spans, longest)?;
        self.positions = fed;
        // The new tokens' outputs: where all sequences have theirs at the same place, a view.
        let (_, _, tokens, _) = rows.q.dims4()?;
        let first = spans.ring[0];
        if spans.ends.iter().all(|&end| end == first + tokens)
            && spans.ring.iter().all(|&ring| ring == first)
        {
            return Ok(out.narrow(2, first, tokens)?);
        }
        let own = Tensor::zeros(rows.q.shape(), out.dtype(), out.device())?;
        for (sequence, (&ring, &length)) in spans.ring.iter().zip(lengths).enumerate() {
            if length > 0 {
                let new = out.narrow(0, sequence, 1)?.narrow(2, ring, length)?.contiguous()?;
                own.narrow(0, sequence, 1)?.slice_set(&new, 2, 0)?;
            }
        }
        Ok(own)
    }

    /// Queues everything; the output `[B, H, N, D]` of all tokens of `spans`. Sequences are `longest` tokens long at most when
    /// they have been read.
    fn queue_onto(
        &self,
        Fed { q, k, v, gate }: &Fed,
        spans: &Spans,
        longest: usize,
    ) -> candle_core::Result<Tensor> {
        let weights = &*self.weights;
        let (device, config, bytes) =
            (&weights.device, &weights.config, weights.dtype.size_in_bytes());
        let (batch, heads, _, d) = q.dims4()?;
        let dims = (batch, heads, spans.tokens(), d);
        let shape = Shape {
            tokens: i32::try_from(spans.tokens()).map_err(candle_core::Error::wrap)?,
            ..shape(q, weights.heads(), flags(config))?
        };
        let most = spans.retired.iter().copied().max().unwrap_or(0);
        let of_head = |&budget: &i32| kept(config.cap, budget, most);
        let stored = weights.host_budgets.iter().map(of_head).max().unwrap_or(0);
        let cap = reached_cap(config, &weights.host_budgets, longest);
        let scratch = Scratch::new(self, &shape, stored, cap)?;
        let counts = spans.upload(device)?;
        // SAFETY: the forward pass fills it, but for chunks before the first new token, which nothing reads.
        let out = unsafe { device.alloc_uninit(&dims.into(), q.dtype())? };

        let stream = device.cuda_stream();
        let held = [q, k, v, &weights.map_q, &weights.map_k].map(Tensor::storage_and_layout);
        let held_scale = weights.log_scale.as_ref().map(Tensor::storage_and_layout);
        let held_gate = gate.as_ref().map(Tensor::storage_and_layout);
        let mut launch = Launch::new(&stream)?;
        let [q, k, v, map_q, map_k] = &held;
        let state = Decode {
            q: launch.rows(on_cuda(&q.0)?, q.1)?,
            k: launch.rows(on_cuda(&k.0)?, k.1)?,
            v: launch.rows(on_cuda(&v.0)?, v.1)?,
            ..self.args(&mut launch)
        };
        // What codes give back of the tokens' rows lies behind the rows, and before it what was stored.
        let (around, rounded) = match state.coding {
            STILL_PLAIN => ((stored, 0), 0),
            _ => ((0, stored + spans.tokens()), shape.tokens + stored as i32),
        };
        let q = rows(launch.at(&scratch.q), &shape, shape.heads, (0, 0), bytes);
        let k = rows(launch.at(&scratch.k), &shape, shape.kv_heads, around, bytes);
        let v = rows(launch.at(&scratch.v), &shape, shape.kv_heads, around, bytes);
        let counts: *mut i32 = launch.at(&counts);
        let capped = scratch.capped.as_ref();
        let (s, z) = match &scratch.copies {
            Some([s, z]) => (launch.at(s), launch.at(z)),
            None => (state.s, state.z),
        };
        let codes = scratch.codes.as_ref();
        let stored_k: *mut c_void = launch.at_optional(codes.map(|[k, _]| k));
        let stored_v: *mut c_void = launch.at_optional(codes.map(|[_, v]| v));
        let past = Past {
            retired: counts,
            ring: counts.wrapping_add(batch),
            tokens: counts.wrapping_add(2 * batch),
            stored: stored as i32,
            stored_score: launch.at_optional(capped.map(|capped| &capped.score)),
            stored_token: launch.at_optional(capped.map(|capped| &capped.token)),
            stored_place: launch.at_optional(capped.map(|capped| &capped.place)),
            stored_k,
            stored_v,
            s,
            z,
        };
        let (score, selected) = (launch.at(&scratch.score), launch.at(&scratch.selected));
        let salient = launch.at(&scratch.salient);
        let visible = launch.at_optional(capped.map(|capped| &capped.visible));
        let order = launch.at_optional(capped.map(|capped| &capped.order));
        let routing = Routing {
            budgets: state.budgets,
            selected,
            salient,
            retired: past.retired,
            stored: past.stored,
            rounded,
            cap: capped.map_or(NO_CAP, |capped| capped.cap),
            absorbed_at: null(),
            visible,
            order,
        };
        let map_k: *mut c_void = launch.values(on_cuda(&map_k.0)?, map_k.1)?;
        let scan = Scan {
            map_k,
            phi: launch.at(&scratch.phi),
            totals: launch.at(&scratch.totals),
            s_last: state.s,
            z_last: state.z,
            past: &raw const past,
        };
        let args = Forward {
            q,
            k,
            v,
            out: launch.rows(&out, &by_token(dims))?,
            w_q: launch.values(on_cuda(&map_q.0)?, map_q.1)?,
            log_scale: match &held_scale {
                Some((storage, layout)) => launch.values(on_cuda(storage)?, layout)?,
                None => null_mut(),
            },
            routing,
            s: launch.at(&scratch.s),
            z: launch.at(&scratch.z),
            denominator: launch.at(&scratch.denominator),
            maximum: null_mut(),
            arg_max: null_mut(),
            first_chunk: spans.first_chunk() as i32,
            gate: match &held_gate {
                Some((storage, layout)) => launch.rows(on_cuda(storage)?, layout)?,
                None => Rows::NONE,
            },
            gate_from: past.ring,
            gate_until: past.tokens,
            linear: Rows::NONE,
        };
        let received = launch.at_optional(scratch.received.as_ref());
        let recalled = match &scratch.recalled {
            Some([s, z]) => Some((launch.at(s), launch.at(z))),
            None => None,
        };
        let on = launch.stream();
        let onto = Onto { shape: &shape, past: &past, state: &state, score, received, recalled };
        // SAFETY: the buffers are as large as still.h says for `shape` and `stored`, there is room in the store for what is fed,
        // and all live until the launch is dropped.
        unsafe {
            onto.route([q, k, v], map_k, &routing, on)?;
            queue(&shape, &args, &scan, on)?;
            let code = still_past_fill(&shape, &past, &state, k, v, score, &routing, on);
            checked("still_past_fill", code)?;
        }
        drop(launch);
        tensor_by_token(out, dims)
    }
}

fn checked(call: &'static str, code: i32) -> candle_core::Result<()> {
    check(call, code).map_err(candle_core::Error::wrap)
}

/// What is routed of tokens that are read onto states.
#[derive(Clone, Copy)]
struct Onto<'a> {
    shape: &'a Shape,
    past: &'a Past,
    state: &'a Decode,
    score: *mut f32,
    /// Scratch of the router `received_attention`, else null.
    received: *mut f32,
    /// States that the router `self_recall` goes through.
    recalled: Option<(*mut f32, *mut f32)>,
}

impl Onto<'_> {
    /// Queues the sequence of ring and new tokens, its scores, and the selection into the buffers of `routing`.
    ///
    /// # Safety
    /// Every address is of memory as large as still.h says, valid until the stream has passed.
    unsafe fn route(
        &self,
        [q, k, v]: [Rows; 3],
        map_k: *const c_void,
        routing: &Routing,
        on: Stream,
    ) -> candle_core::Result<()> {
        let Self { shape, past, state, score, received, recalled } = *self;
        let (selected, salient) = (routing.selected.cast_mut(), routing.salient.cast_mut());
        // SAFETY: the caller's.
        unsafe {
            let code = still_past_rows(shape, past, state, q, k, v, routing.rounded, on);
            checked("still_past_rows", code)?;
            if let Some((s, z)) = recalled {
                let code = still_recall(shape, k, v, map_k, routing, past, s, z, score, on);
                return checked("still_recall", code);
            }
            let router = &state.router;
            let code = still_scores(shape, router, q, k, past, state, received, score, on);
            checked("still_scores", code)?;
            let code = still_past_select(shape, past, state, score, selected, salient, on);
            checked("still_past_select", code)?;
            if routing.cap == NO_CAP {
                return Ok(());
            }
            let (visible, order) = (routing.visible.cast_mut(), routing.order.cast_mut());
            let code = still_demote(
                shape,
                score,
                state.budgets,
                selected,
                salient,
                routing.cap,
                null_mut(),
                visible,
                order,
                past,
                on,
            );
            checked("still_demote", code)
        }
    }
}
