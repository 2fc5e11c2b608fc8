//! `src/cuda/decoder.h`, by hand: what a decoder does besides attention.

use std::ffi::{c_int, c_void};

use crate::{Rows, Stream};

/// `StillRotation`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Rotation {
    /// Sequences.
    pub batch: i32,
    /// Heads.
    pub heads: i32,
    /// Tokens of every sequence.
    pub tokens: i32,
    /// Channels of a head.
    pub head_dim: i32,
    /// Runs of angles: 1, or one a sequence.
    pub runs: i32,
    /// [`STILL_F32`](crate::STILL_F32) or [`STILL_BF16`](crate::STILL_BF16).
    pub dtype: i32,
    /// 1, or −1 to rotate back.
    pub sign: f32,
}

/// `StillVocabularyLoss`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "decoder.h has them")]
pub struct VocabularyLoss {
    pub rows: i64,
    pub vocab: i32,
    pub dtype: i32,
    pub student: *const f32,
    pub teacher: *const f32,
    pub ids: *const u32,
    pub there: *const f32,
    pub kl_share: f32,
    pub kl_weight: f32,
    pub next_share: f32,
    pub next_weight: f32,
    pub losses: *mut f32,
    pub d_logits: *mut c_void,
}

/// `STILL_SMALL_BATCH_ROWS`.
pub const SMALL_BATCH_ROWS: usize = 3;

/// `STILL_QUANTIZED_ROWS`.
pub const QUANTIZED_ROWS: usize = 8;

/// `STILL_PLAIN`.
pub const PLAIN: i32 = 0;
/// `STILL_Q8_0`.
pub const Q8_0: i32 = 1;
/// `STILL_Q4_0`.
pub const Q4_0: i32 = 2;
/// `STILL_Q4_1`.
pub const Q4_1: i32 = 3;
/// `STILL_Q4_K`.
pub const Q4_K: i32 = 4;
/// `STILL_Q6_K`.
pub const Q6_K: i32 = 5;
/// `STILL_E4M3`.
pub const E4M3: i32 = 6;

/// `STILL_FACTORS`.
pub const FACTORS: usize = 4;

/// `StillSmallBatchProducts`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "decoder.h has them")]
pub struct SmallBatchProducts {
    pub dtype: i32,
    pub weight_dtype: i32,
    pub to_dtype: i32,
    pub rows: i32,
    pub inner: i32,
    pub count: i32,
    pub gated: i32,
    pub eps: f32,
    pub x: *const c_void,
    pub norm: *const c_void,
}

/// `StillFactor`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "decoder.h has them")]
pub struct Factor {
    pub out: i32,
    pub rank: i32,
    pub format: i32,
    pub update_scale: f32,
    pub weight: *const c_void,
    pub bias: *const c_void,
    pub add: *const c_void,
    pub update: *const f32,
    pub low: *const f32,
    pub to: *mut c_void,
}

/// `StillDequantize`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "decoder.h has them")]
pub struct Dequantize {
    pub format: i32,
    pub dtype: i32,
    pub rows: i32,
    pub columns: i32,
    pub first: i32,
    pub count: i32,
    pub matrix: *const c_void,
    pub ids: *const u32,
    pub to: *mut c_void,
}

#[expect(missing_docs, reason = "decoder.h has them")]
#[rustfmt::skip] // one a line, as in decoder.h
unsafe extern "C" {
    pub fn still_swiglu(dtype: i32, count: i64, gate: *const c_void, up: *const c_void, hidden: *mut c_void, stream: Stream) -> c_int;
    pub fn still_swiglu_backward(dtype: i32, count: i64, gate: *const c_void, up: *const c_void, d_hidden: *const c_void, d_gate: *mut c_void, d_up: *mut c_void, stream: Stream) -> c_int;
    pub fn still_residual(dtype: i32, count: i64, x: *const c_void, y: *const c_void, sum: *mut c_void, stream: Stream) -> c_int;
    pub fn still_rms_norm(dtype: i32, rows: i64, width: i32, x: *const c_void, weight: *const c_void, eps: f32, y: *mut c_void, stream: Stream) -> c_int;
    pub fn still_rms_norm_backward(dtype: i32, rows: i64, width: i32, x: *const c_void, weight: *const c_void, eps: f32, d_y: *const c_void, add: *const c_void, d_x: *mut c_void, stream: Stream) -> c_int;
    pub fn still_rotate(rotation: *const Rotation, from: Rows, to: Rows, cos: *const f32, sin: *const f32, stream: Stream) -> c_int;
    pub fn still_rope_angles(rows: i64, half: i32, positions: *const u32, frequencies: *const f64, scale: f64, cos: *mut f32, sin: *mut f32, stream: Stream) -> c_int;
    pub fn still_small_batch_products(args: *const SmallBatchProducts, factors: *const Factor, stream: Stream) -> c_int;
    pub fn still_quantized_words(format: i32, rows: i32, columns: i32) -> i64;
    pub fn still_dequantize(args: *const Dequantize, stream: Stream) -> c_int;
    pub fn still_quantize(format: i32, dtype: i32, rows: i32, columns: i32, from: *const c_void, to: *mut c_void, stream: Stream) -> c_int;
    pub fn still_vocabulary_loss(args: *const VocabularyLoss, stream: Stream) -> c_int;
}
