//! `src/cuda/dense.h`, by hand: dense attention onto a cache.

use std::ffi::{c_int, c_void};

use crate::{Rows, Shape, Stream};

/// `STILL_DENSE_SPLITS`.
pub const DENSE_SPLITS: usize = 64;

/// Head dimensions that [`still_dense_decode`] has kernels for.
pub const DENSE_DECODE_HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];

/// Head dimensions that [`still_dense_forward`] has kernels for.
pub const DENSE_FORWARD_HEAD_DIMS: [usize; 4] = [64, 80, 96, 128];

/// Those that it has kernels for in bf16 alone.
pub const DENSE_FORWARD_HEAD_DIMS_BF16: [usize; 1] = [256];

/// `StillDenseCache`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "dense.h has them")]
pub struct DenseCache {
    pub k: Rows,
    pub v: Rows,
    pub k_words: *mut u32,
    pub v_words: *mut u32,
    pub coding: i32,
}

/// `StillDenseSequence`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "dense.h has them")]
pub struct DenseSequence {
    pub k: *mut c_void,
    pub v: *mut c_void,
    pub k_words: *mut u32,
    pub v_words: *mut u32,
    pub head: i64,
}

impl DenseSequence {
    /// Its bytes, as a table of caches has them.
    pub fn words(self) -> [u64; size_of::<Self>() / size_of::<u64>()] {
        // SAFETY: all fields are addresses or integers of 64 bits, so that there is no padding.
        unsafe { std::mem::transmute(self) }
    }
}

/// `StillDenseDecode`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "dense.h has them")]
pub struct DenseDecode {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub out: Rows,
    pub cache: DenseCache,
    pub cos: *const f32,
    pub sin: *const f32,
    pub rotary: i32,
    pub positions: *const i32,
    pub partial: *mut f32,
    pub arrived: *mut u32,
    pub splits: i32,
    pub caches: *const DenseSequence,
}

/// `StillDenseAppend`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "dense.h has them")]
pub struct DenseAppend {
    pub k: Rows,
    pub v: Rows,
    pub cache: DenseCache,
    pub starts: *const i32,
    pub lengths: *const i32,
}

/// `StillDenseForward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "dense.h has them")]
pub struct DenseForward {
    pub q: Rows,
    pub cache_k: Rows,
    pub cache_v: Rows,
    pub out: Rows,
    pub starts: *const i32,
    pub lengths: *const i32,
}

#[expect(missing_docs, reason = "dense.h has them")]
#[rustfmt::skip] // one a line, as in dense.h
unsafe extern "C" {
    pub fn still_dense_decode_floats(shape: *const Shape, splits: i32) -> i64;
    pub fn still_dense_decode(shape: *const Shape, args: *const DenseDecode, stream: Stream) -> c_int;
    pub fn still_dense_append(shape: *const Shape, args: *const DenseAppend, stream: Stream) -> c_int;
    pub fn still_dense_widen(shape: *const Shape, args: *const DenseAppend, stream: Stream) -> c_int;
    pub fn still_dense_forward(shape: *const Shape, args: *const DenseForward, stream: Stream) -> c_int;
}
