//! Reading onto a state: the tokens of its ring and the new ones become one sequence for the kernels of whole sequences, what
//! was stored lies before it, and the state's sums are the first of its prefix states.

use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::CudaStream;
use candle_core::{DType, Tensor};
use still_compute::cuda::{Launch, PassScratch, on_cuda};
use still_kernels::{
    CHUNK, Decode, Forward, NO_CAP, Past, Routing, Rows, STILL_PLAIN, Shape, Stream, check,
    still_demote, still_past_fill, still_past_rows, still_past_select, still_recall, still_scores,
    still_segments,
};

use super::super::forward::{Scan, queue};
use super::super::layout::{Cursor, by_token, flags, shape, tensor_by_token};
use super::super::routing::{reached_cap, received_floats, retired};
use super::super::store;
use super::step::StepState;
use super::{CudaHybridState, Fed, GraphState, S, Z, kept};
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
    fn counts(&self) -> Vec<i32> {
        let all = [&self.retired, &self.ring, &self.ends].into_iter().flatten();
        all.map(|&count| count as i32).collect()
    }
}

/// How much a call computes.
struct Sizes {
    /// Of as many tokens as the longest sequence has, from its ring on.
    shape: Shape,
    /// The most rows that a head had stored.
    stored: usize,
    /// The cap, if it is reached.
    cap: Option<i32>,
}

impl Sizes {
    /// Sequences are `longest` tokens long at most when they have been read.
    fn new(
        state: &CudaHybridState,
        q: &Tensor,
        spans: &Spans,
        longest: usize,
    ) -> candle_core::Result<Self> {
        let (weights, config) = (&*state.weights, &state.weights.config);
        let shape = Shape {
            tokens: i32::try_from(spans.tokens()).map_err(candle_core::Error::wrap)?,
            ..shape(q, weights.heads(), flags(config))?
        };
        let most = spans.retired.iter().copied().max().unwrap_or(0);
        let of_head = |&budget: &i32| kept(config.cap, budget, most);
        let stored = weights.host_budgets.iter().map(of_head).max().unwrap_or(0);
        let cap = reached_cap(config, &weights.host_budgets, longest);
        Ok(Self { shape, stored, cap })
    }
}

/// What a call's kernels leave for each other, in one buffer. `N`: tokens of the longest sequence; `M`: the most rows that a head
/// had stored.
struct Scratch {
    /// `[B, H, N, D]`
    q: *mut u8,
    /// `[B, K, M + N, D]`, and `v`; where rows are kept as codes `[B, K, N + M + N, D]`.
    k: *mut u8,
    v: *mut u8,
    /// `[B, K, N]`
    score: *mut f32,
    /// `[B, K, C]`
    selected: *mut u64,
    /// `[B, K, M + N]`
    salient: *mut i32,
    capped: Capped,
    /// `[B, K, N, 2D]`
    phi: *mut c_void,
    totals: *mut f32,
    /// `[B, K, R + 1, 2D, D]`
    s: *mut c_void,
    z: *mut f32,
    /// `[B, H, N]`
    denominator: *mut f32,
    /// The state's sums, where one segment of the scan leaves the last while another reads the first. A lone segment reads what
    /// it goes on from before it writes.
    copies: Option<[*mut f32; 2]>,
    /// Others, where a router follows them from chunk to chunk.
    recalled: Option<[*mut f32; 2]>,
    /// What a router leaves from one kernel to the next, if anything.
    received: *mut f32,
    /// The state's rows, where they are codes that change places.
    codes: Option<[*mut u8; 2]>,
}

/// Under a cap that is reached; else null.
struct Capped {
    /// `[B, K, C, cap]`
    visible: *mut i32,
    /// `[B, K, R, 64]`
    order: *mut i32,
    /// `[B, K, M]`, and the next two: what was stored, by rank.
    score: *mut f32,
    token: *mut i32,
    place: *mut i32,
}

impl Capped {
    const NONE: Self = Self {
        visible: null_mut(),
        order: null_mut(),
        score: null_mut(),
        token: null_mut(),
        place: null_mut(),
    };
}

impl Scratch {
    /// Where everything lies in a buffer that begins at `base`, and how many bytes it has.
    fn new(state: &CudaHybridState, sizes: &Sizes, base: *mut u8) -> (Self, usize) {
        let &Sizes { ref shape, stored, cap } = sizes;
        let weights = &*state.weights;
        let bytes = weights.dtype.size_in_bytes();
        let [heads, kv_heads] =
            [shape.heads, shape.kv_heads].map(|heads| (shape.batch * heads) as usize);
        let (tokens, d) = (shape.tokens as usize, shape.head_dim as usize);
        let (chunks, retired) = (tokens.div_ceil(CHUNK), retired(tokens));
        let coded = state.store.kind() != STILL_PLAIN;
        let rows = stored + if coded { 2 * tokens } else { tokens };
        let states = kv_heads * (retired + 1) * 2 * d;
        // SAFETY: only reads the shape.
        let segments = unsafe { still_segments(shape) } as usize;
        let received = received_floats(shape, &weights.config);
        let recalls = weights.config.router == Router::SelfRecall;
        let mut buffer = Cursor { base, used: 0 };
        let sums = |buffer: &mut Cursor| [S, Z].map(|array| buffer.take(state.held.bytes(array)));
        let scratch = Self {
            q: buffer.take(heads * tokens * d * bytes),
            k: buffer.take(kv_heads * rows * d * bytes),
            v: buffer.take(kv_heads * rows * d * bytes),
            score: buffer.take(4 * kv_heads * tokens),
            selected: buffer.take(8 * kv_heads * chunks),
            salient: buffer.take(4 * kv_heads * (stored + tokens)),
            capped: cap.map_or(Capped::NONE, |cap| Capped {
                visible: buffer.take(4 * kv_heads * chunks * cap as usize),
                order: buffer.take(4 * kv_heads * retired * CHUNK),
                score: buffer.take(4 * kv_heads * stored),
                token: buffer.take(4 * kv_heads * stored),
                place: buffer.take(4 * kv_heads * stored),
            }),
            phi: buffer.take(kv_heads * tokens * 2 * d * bytes),
            totals: buffer.take(4 * segments * kv_heads * 2 * d * (d + 1)),
            s: buffer.take(states * d * bytes),
            z: buffer.take(4 * states),
            denominator: buffer.take(4 * heads * tokens),
            copies: (segments > 1).then(|| sums(&mut buffer)),
            recalled: recalls.then(|| sums(&mut buffer)),
            received: match received {
                0 => null_mut(),
                floats => buffer.take(4 * floats),
            },
            codes: (coded && cap.is_some()).then(|| {
                [store::K, store::V].map(|rows| buffer.take(state.store.held.bytes(rows)))
            }),
        };
        (scratch, buffer.used)
    }

    /// Rows of queries, keys and values from token 0 on, and how far behind a token's rows those lie that its codes give back, if
    /// there are codes: before those lies what was stored.
    fn rows(&self, sizes: &Sizes, coding: i32, dtype: DType) -> ([Rows; 3], i32) {
        let (shape, stored, bytes) = (&sizes.shape, sizes.stored, dtype.size_in_bytes());
        let (around, rounded) = match coding {
            STILL_PLAIN => ((stored, 0), 0),
            _ => ((0, stored + shape.tokens as usize), shape.tokens + stored as i32),
        };
        let q = rows(self.q, shape, shape.heads, (0, 0), bytes);
        let [k, v] = [self.k, self.v].map(|data| rows(data, shape, shape.kv_heads, around, bytes));
        ([q, k, v], rounded)
    }

    /// What the states had before the call; `counts` are those of [`Spans::counts`].
    fn past(&self, state: &Decode, sizes: &Sizes, counts: *mut i32) -> Past {
        let batch = sizes.shape.batch as usize;
        let Capped { score, token, place, .. } = self.capped;
        let [s, z] = self.copies.unwrap_or([state.s, state.z]);
        let [stored_k, stored_v] = self.codes.unwrap_or([null_mut(); 2]);
        Past {
            retired: counts,
            ring: counts.wrapping_add(batch),
            tokens: counts.wrapping_add(2 * batch),
            stored: sizes.stored as i32,
            stored_score: score,
            stored_token: token,
            stored_place: place,
            stored_k: stored_k.cast(),
            stored_v: stored_v.cast(),
            s,
            z,
        }
    }

    /// Where the tokens that a state keeps are listed; `rounded` is that of [`Scratch::rows`].
    fn routing(&self, state: &Decode, past: &Past, cap: Option<i32>, rounded: i32) -> Routing {
        Routing {
            budgets: state.budgets,
            selected: self.selected,
            salient: self.salient,
            retired: past.retired,
            stored: past.stored,
            rounded,
            cap: cap.unwrap_or(NO_CAP),
            absorbed_at: null(),
            visible: self.capped.visible,
            order: self.capped.order,
        }
    }

    /// Queues the copies of what the call changes.
    fn copy_from(
        &self,
        state: &CudaHybridState,
        stream: &Arc<CudaStream>,
    ) -> candle_core::Result<()> {
        let mut launch = Launch::new(stream)?;
        // SAFETY: `new` has made room for them.
        unsafe {
            for [s, z] in [self.copies, self.recalled].into_iter().flatten() {
                state.held.copy(&mut launch, S, s)?;
                state.held.copy(&mut launch, Z, z)?;
            }
            if let Some([k, v]) = self.codes {
                state.store.held.copy(&mut launch, store::K, k)?;
                state.store.held.copy(&mut launch, store::V, v)?;
            }
        }
        Ok(())
    }
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
    pub(super) fn read_onto(
        &mut self,
        rows: &Fed,
        lengths: &[usize],
        shared: &PassScratch,
    ) -> Result<Tensor> {
        let fed: Vec<usize> = self
            .positions
            .iter()
            .zip(lengths)
            .map(|(position, length)| position + length)
            .collect();
        let longest = fed.iter().copied().max().unwrap_or(0);
        self.reserve(longest)?;
        let spans = Spans::new(&self.positions, lengths);
        let out = self.queue_onto(rows, &spans, longest, shared)?;
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
        shared: &PassScratch,
    ) -> candle_core::Result<Tensor> {
        let weights = &*self.weights;
        let device = &weights.device;
        let (batch, heads, _, d) = q.dims4()?;
        let dims = (batch, heads, spans.tokens(), d);
        let sizes = Sizes::new(self, q, spans, longest)?;
        let shape = &sizes.shape;
        let room = shared.memory(device, Scratch::new(self, &sizes, null_mut()).1)?;
        let counts = shared.counts(device, spans.counts())?;
        // SAFETY: the forward pass fills it, but for chunks before the first new token, which nothing reads.
        let out = unsafe { device.alloc_uninit(&dims.into(), q.dtype())? };

        let stream = device.cuda_stream();
        let held = [q, k, v, &weights.map_q, &weights.map_k].map(Tensor::storage_and_layout);
        let held_scale = weights.log_scale.as_ref().map(Tensor::storage_and_layout);
        let held_gate = gate.as_ref().map(Tensor::storage_and_layout);
        let mut launch = Launch::new(&stream)?;
        let scratch = Scratch::new(self, &sizes, launch.at(&room)).0;
        scratch.copy_from(self, &stream)?;
        let [q, k, v, map_q, map_k] = &held;
        let state = Decode {
            q: launch.rows(on_cuda(&q.0)?, q.1)?,
            k: launch.rows(on_cuda(&k.0)?, k.1)?,
            v: launch.rows(on_cuda(&v.0)?, v.1)?,
            ..self.args(&mut launch)
        };
        let ([q, k, v], rounded) = scratch.rows(&sizes, state.coding, weights.dtype);
        let past = scratch.past(&state, &sizes, launch.at(&counts));
        let routing = scratch.routing(&state, &past, sizes.cap, rounded);
        let map_k: *mut c_void = launch.values(on_cuda(&map_k.0)?, map_k.1)?;
        let scan = Scan {
            map_k,
            phi: scratch.phi,
            totals: scratch.totals,
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
            log_scale: launch.optional_values(&held_scale)?,
            routing,
            s: scratch.s,
            z: scratch.z,
            denominator: scratch.denominator,
            maximum: null_mut(),
            arg_max: null_mut(),
            first_chunk: spans.first_chunk() as i32,
            gate: launch.optional_rows(&held_gate)?,
            gate_from: past.ring,
            gate_until: past.tokens,
            linear: Rows::NONE,
        };
        let on = launch.stream();
        let Scratch { score, received, recalled, .. } = scratch;
        let onto = Onto { shape, past: &past, state: &state, score, received, recalled };
        // SAFETY: the buffers are as large as still.h says for `shape` and `stored`, there is room in the store for what is fed,
        // and all live until the launch is dropped.
        unsafe {
            onto.route([q, k, v], map_k, &routing, on)?;
            queue(shape, &args, &scan, on)?;
            let code = still_past_fill(shape, &past, &state, k, v, score, &routing, on);
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
    recalled: Option<[*mut f32; 2]>,
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
            if let Some([s, z]) = recalled {
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
