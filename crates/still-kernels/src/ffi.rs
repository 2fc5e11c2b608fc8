//! `src/cuda/still.h`, by hand.

use std::ffi::{c_int, c_void};

/// A `cudaStream_t`.
pub type Stream = *mut c_void;

/// Queries, keys and all that is not said to be f32 are float32.
pub const STILL_F32: i32 = 0;
/// The same in bfloat16.
pub const STILL_BF16: i32 = 1;

/// A state keeps rows as they come.
pub const STILL_PLAIN: i32 = 0;
/// A state keeps rows in 8 bits a value.
pub const STILL_INT8: i32 = 1;
/// A state keeps rows in 4 bits a value.
pub const STILL_INT4: i32 = 2;

/// Flags of [`Shape`]: the softmax map in place of the NP-Map.
pub const STILL_SOFTMAX_MAP: i32 = 1;
/// The linear branch's scale is not divided by the tokens in the state.
pub const STILL_SUM: i32 = 2;
/// Of its own chunk and the one before a query sees its own token alone.
pub const STILL_NO_WINDOW: i32 = 4;
/// No query sees kept tokens outside its window.
pub const STILL_NO_SALIENT: i32 = 8;
/// The linear branch weighs nothing.
pub const STILL_NO_LINEAR: i32 = 16;

/// Kinds of [`Router`].
pub const STILL_SELF_SALIENCY: i32 = 0;
/// Attention received from later tokens.
pub const STILL_RECEIVED_ATTENTION: i32 = 1;
/// The error of recalling a value from the linear state.
pub const STILL_SELF_RECALL: i32 = 2;
/// The earlier, the better.
pub const STILL_FIRST_TOKENS: i32 = 3;
/// A hash.
pub const STILL_RANDOM: i32 = 4;
/// Nothing is kept.
pub const STILL_NO_ROUTER: i32 = 5;

/// Tokens of a chunk, in every kernel.
pub const CHUNK: usize = 64;
/// Head dimensions that have kernels.
pub const HEAD_DIMS: [usize; 4] = [64, 80, 96, 128];
/// The one that has them in bf16 alone, without `STILL_SELF_RECALL` and the backward pass.
pub const WIDE_HEAD_DIM: usize = 256;
/// `STILL_NO_CAP`: no cap on a head's salient tokens.
pub const NO_CAP: i32 = i32::MAX;
/// The largest cap that the router `STILL_SELF_RECALL` has a kernel for; others have none.
pub const MAX_RECALL_CAP: usize = 8192;
/// Query heads that may share a KV head while decoding.
pub const MAX_DECODE_GROUP: usize = 16;

/// `StillShape`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Sequences.
    pub batch: i32,
    /// Query heads.
    pub heads: i32,
    /// KV heads, which are the selection heads.
    pub kv_heads: i32,
    /// Tokens of every sequence.
    pub tokens: i32,
    /// Channels of a head.
    pub head_dim: i32,
    /// [`STILL_F32`] or [`STILL_BF16`].
    pub dtype: i32,
    /// [`STILL_SOFTMAX_MAP`] and its like.
    pub flags: i32,
}

/// `StillRows`: rows of `head_dim` adjacent elements, 16-byte aligned; strides in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// The first row.
    pub data: *mut c_void,
    /// From a sequence to the next.
    pub batch: i64,
    /// From a head to the next.
    pub head: i64,
    /// From a token to the next.
    pub token: i64,
}

/// `StillRouter`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "still.h has them")]
pub struct Router {
    pub kind: i32,
    pub layer: i32,
    pub seed: u64,
}

/// `StillPast`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "still.h has them")]
pub struct Past {
    pub retired: *const i32,
    pub ring: *const i32,
    pub tokens: *const i32,
    pub stored: i32,
    pub stored_score: *mut f32,
    pub stored_token: *mut i32,
    pub stored_place: *mut i32,
    pub stored_k: *const c_void,
    pub stored_v: *const c_void,
    pub s: *const f32,
    pub z: *const f32,
}

impl Rows {
    /// No rows.
    pub const NONE: Self = Self { data: std::ptr::null_mut(), batch: 0, head: 0, token: 0 };
}

/// `StillRouting`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "still.h has them")]
pub struct Routing {
    pub budgets: *const i32,
    pub selected: *const u64,
    pub salient: *const i32,
    pub retired: *const i32,
    pub stored: i32,
    pub rounded: i32,
    pub cap: i32,
    pub absorbed_at: *const u32,
    pub visible: *const i32,
    pub order: *const i32,
}

/// `StillForward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "still.h has them")]
pub struct Forward {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub out: Rows,
    pub w_q: *const c_void,
    pub log_scale: *const f32,
    pub routing: Routing,
    pub s: *const c_void,
    pub z: *const f32,
    pub denominator: *mut f32,
    pub maximum: *mut f32,
    pub arg_max: *mut i32,
    pub first_chunk: i32,
    pub gate: Rows,
    pub gate_from: *const i32,
    pub gate_until: *const i32,
    pub linear: Rows,
}

/// `StillBackward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "still.h has them")]
pub struct Backward {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub out: Rows,
    pub d_out: Rows,
    pub d_q: Rows,
    pub d_k: Rows,
    pub d_v: Rows,
    pub w_q: *const c_void,
    pub w_k: *const c_void,
    pub log_scale: *const f32,
    pub routing: Routing,
    pub phi: *const c_void,
    pub s: *const c_void,
    pub z: *const f32,
    pub denominator: *const f32,
    pub maximum: *const f32,
    pub arg_max: *const i32,
    pub d_w_q: *mut f32,
    pub d_w_k: *mut f32,
    pub d_log_scale: *mut f32,
    pub host_budgets: *const i32,
    pub linear: Rows,
    pub d_linear: Rows,
    pub d_gate: Rows,
    pub scratch: *mut c_void,
}

/// `StillSequenceState`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "still.h has them")]
pub struct SequenceState {
    pub w_q: *const c_void,
    pub w_k: *const c_void,
    pub log_scale: *const f32,
    pub budgets: *const i32,
    pub ring_k: *mut c_void,
    pub ring_v: *mut c_void,
    pub ring_score: *mut f32,
    pub store: *const Store,
    pub s: *mut f32,
    pub z: *mut f32,
}

impl SequenceState {
    /// Its bytes, as a table of states has them.
    pub fn words(self) -> [u64; size_of::<Self>() / size_of::<u64>()] {
        // SAFETY: all fields are addresses, so that there is no padding.
        unsafe { std::mem::transmute(self) }
    }
}

/// `StillDecode`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "still.h has them")]
pub struct Decode {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub out: Rows,
    pub w_q: *const c_void,
    pub w_k: *const c_void,
    pub log_scale: *const f32,
    pub budgets: *const i32,
    pub cap: i32,
    pub positions: *const i32,
    pub ring_k: *mut c_void,
    pub ring_v: *mut c_void,
    pub ring_score: *mut f32,
    pub store: *const Store,
    pub coding: i32,
    pub key_scale: *const f32,
    pub admitted: *mut u64,
    pub s: *mut f32,
    pub z: *mut f32,
    pub partial: *mut f32,
    pub arrived: *mut u32,
    pub splits: i32,
    pub gate: Rows,
    pub router: Router,
    pub cos: *const f32,
    pub sin: *const f32,
    pub rotary: i32,
    pub states: *const SequenceState,
}

/// `StillStore`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "still.h has them")]
pub struct Store {
    pub k: *mut c_void,
    pub v: *mut c_void,
    pub score: *mut f32,
    pub token: *mut i32,
    pub offset: *const i64,
    pub entries: i64,
}

#[expect(missing_docs, reason = "still.h has them")]
#[rustfmt::skip] // one a line, as in still.h
unsafe extern "C" {
    pub fn still_segments(shape: *const Shape) -> c_int;
    pub fn still_saliency(shape: *const Shape, q: Rows, k: Rows, score: *mut f32, stream: Stream) -> c_int;
    pub fn still_scores(shape: *const Shape, router: *const Router, q: Rows, k: Rows, past: *const Past, state: *const Decode, partial: *mut f32, score: *mut f32, stream: Stream) -> c_int;
    pub fn still_recall(shape: *const Shape, k: Rows, v: Rows, w: *const c_void, routing: *const Routing, past: *const Past, s: *mut f32, z: *mut f32, score: *mut f32, stream: Stream) -> c_int;
    pub fn still_fold(shape: *const Shape, w_q: *const f32, w_k: *const f32, u_q: *const f32, u_k: *const f32, folded_q: *mut c_void, folded_k: *mut c_void, stream: Stream) -> c_int;
    pub fn still_select(shape: *const Shape, score: *const f32, budgets: *const i32, selected: *mut u64, salient: *mut i32, absorbed_at: *mut u32, stream: Stream) -> c_int;
    pub fn still_demote(shape: *const Shape, score: *const f32, budgets: *const i32, selected: *const u64, salient: *const i32, cap: i32, absorbed_at: *mut u32, visible: *mut i32, order: *mut i32, past: *const Past, stream: Stream) -> c_int;
    pub fn still_map_keys(shape: *const Shape, k: Rows, w: *const c_void, routing: *const Routing, phi: *mut c_void, stream: Stream) -> c_int;
    pub fn still_states(shape: *const Shape, phi: *const c_void, v: Rows, routing: *const Routing, totals: *mut f32, s: *mut c_void, z: *mut f32, s_last: *mut f32, z_last: *mut f32, past: *const Past, stream: Stream) -> c_int;
    pub fn still_forward(shape: *const Shape, args: *const Forward, stream: Stream) -> c_int;
    pub fn still_linear_forward(shape: *const Shape, args: *const Forward, stream: Stream) -> c_int;
    pub fn still_exact_forward(shape: *const Shape, args: *const Forward, stream: Stream) -> c_int;
    pub fn still_backward_bytes(shape: *const Shape, host_budgets: *const i32) -> i64;
    pub fn still_backward(shape: *const Shape, args: *const Backward, stream: Stream) -> c_int;
    pub fn still_backward_step(shape: *const Shape, args: *const Backward, step: i32, stream: Stream) -> c_int;
    pub fn still_grow_store(batch: i32, kv_heads: i32, row_bytes: i32, row_words: i32, budgets: *const i32, cap: i32, retired: i32, from: Store, to: Store, stream: Stream) -> c_int;
    pub fn still_decode_floats(shape: *const Shape, splits: i32) -> i64;
    pub fn still_decode(shape: *const Shape, args: *const Decode, stream: Stream) -> c_int;
    pub fn still_decode_fill(shape: *const Shape, k: Rows, v: Rows, score: *const f32, routing: *const Routing, args: *const Decode, stream: Stream) -> c_int;
    pub fn still_past_rows(shape: *const Shape, past: *const Past, state: *const Decode, q: Rows, k: Rows, v: Rows, rounded: i32, stream: Stream) -> c_int;
    pub fn still_past_select(shape: *const Shape, past: *const Past, state: *const Decode, score: *mut f32, selected: *mut u64, salient: *mut i32, stream: Stream) -> c_int;
    pub fn still_past_fill(shape: *const Shape, past: *const Past, state: *const Decode, k: Rows, v: Rows, score: *const f32, routing: *const Routing, stream: Stream) -> c_int;
    pub fn still_features(rows: i64, width: i32, d: i32, f: *const f32, x: *const f32, phi: *mut f32, stream: Stream) -> c_int;
    pub fn still_features_backward(rows: i64, width: i32, d: i32, f: *const f32, x: *const f32, phi: *const f32, d_phi: *const f32, d_f: *mut f32, d_x: *mut f32, stream: Stream) -> c_int;
}
