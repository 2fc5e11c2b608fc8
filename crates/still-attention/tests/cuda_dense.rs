//! Dense attention and its cache on a CUDA GPU, compared with the float64 twin.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it. It runs on a machine without
//! Rust or the checkout.

mod common;

use candle_core::{DType, Device, Tensor};
use common::codes::kept;
use common::{flat, relative_rms};
use still_attention::{
    AttentionState, CudaKvCache, GraphState, GraphStep, HeadGeometry, IDLE, RowDtype, StepRotation,
    dense_attention, naive,
};
use still_testing::random;

/// The GPU; a test that asks for one and finds none has failed.
fn gpu() -> Device {
    let device = Device::new_cuda(0);
    let device = device.unwrap_or_else(|error| panic!("these tests need a CUDA GPU: {error}"));
    // What is allocated next is likely to lie here: whatever a kernel leaves out then shows.
    drop(Tensor::full(f32::NAN, 1 << 24, &device).unwrap());
    device
}

/// Query heads, KV heads and head dimension: groups of 1, 2, 3, 4, 8 and 20, of which a block takes 16.
const SHAPES: [(usize, usize, usize); 9] = [
    (2, 2, 64),
    (3, 1, 128),
    (8, 2, 128),
    (4, 1, 80),
    (6, 3, 96),
    (8, 1, 64),
    (9, 3, 64),
    (20, 1, 96),
    (4, 2, 256),
];

const DTYPES: [DType; 2] = [DType::F32, DType::BF16];

/// Rows in few bits, and the dtype that they come in.
const CODES: [(DType, RowDtype); 3] =
    [(DType::F32, RowDtype::Int8), (DType::F32, RowDtype::Int4), (DType::BF16, RowDtype::Int8)];

/// Of [`SHAPES`], those that rows in few bits are tested with: every head dimension, and a group that two blocks share.
const CODED_SHAPES: [(usize, usize, usize); 6] =
    [(3, 1, 128), (4, 1, 80), (6, 3, 96), (9, 3, 64), (20, 1, 96), (4, 2, 256)];

fn geometry((num_heads, num_key_value_heads, head_dim): (usize, usize, usize)) -> HeadGeometry {
    HeadGeometry { num_heads, num_key_value_heads, head_dim }
}

/// Relative RMS that a dtype may be off by.
fn limit(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 5e-3 } else { 1e-5 }
}

/// The same of thousands of tokens: f32 kernels multiply 16 of a value's bits, which makes logits differ by 1e-5.
fn limit_of_many(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 5e-3 } else { 1.5e-5 }
}

/// Q, K and V of a batch in f64, of values that `dtype` holds exactly.
fn sequences(geometry: HeadGeometry, batch: usize, tokens: usize, dtype: DType) -> [Tensor; 3] {
    let HeadGeometry { num_heads, num_key_value_heads: kv_heads, head_dim } = geometry;
    [(num_heads, 7), (kv_heads, 8), (kv_heads, 9)].map(|(heads, seed)| {
        let values = random(&[batch, heads, tokens, head_dim], seed);
        (values * 1.3).unwrap().to_dtype(dtype).unwrap().to_dtype(DType::F64).unwrap()
    })
}

/// The twin's output of the last `queries` of a sequence's `tokens`, `[H, queries, D]`.
fn definition(
    geometry: HeadGeometry,
    rows: &[Tensor; 3],
    sequence: usize,
    (queries, tokens): (usize, usize),
) -> Vec<f64> {
    let own = |x: &Tensor, from: usize, length: usize| {
        flat(&x.get(sequence).unwrap().narrow(1, from, length).unwrap())
    };
    let q = own(&rows[0], tokens - queries, queries);
    let [k, v] = [&rows[1], &rows[2]].map(|x| own(x, 0, tokens));
    naive::dense_attention(geometry, (queries, tokens), [&q, &k, &v])
}

/// Feeds a cache and keeps what it answers.
struct Fed {
    geometry: HeadGeometry,
    rows: [Tensor; 3],
    dtype: DType,
    /// In few bits; none: rows are kept as they come.
    codes: Option<RowDtype>,
    device: Device,
    cache: CudaKvCache,
    /// Of each sequence `[H, tokens, D]` so far, in f64.
    answers: Vec<Vec<Tensor>>,
}

impl Fed {
    fn new(shape: (usize, usize, usize), batch: usize, tokens: usize, dtype: DType) -> Self {
        let (geometry, device) = (geometry(shape), gpu());
        let rows = sequences(geometry, batch, tokens, dtype);
        let cache = CudaKvCache::new(geometry, batch, &device, dtype).unwrap();
        let answers = vec![Vec::new(); batch];
        Self { geometry, rows, dtype, codes: None, device, cache, answers }
    }

    fn coded(
        shape: (usize, usize, usize),
        batch: usize,
        tokens: usize,
        (dtype, rows): (DType, RowDtype),
    ) -> Self {
        let plain = Self::new(shape, batch, tokens, dtype);
        let (geometry, device) = (plain.geometry, &plain.device);
        let cache = CudaKvCache::with_rows(geometry, batch, device, dtype, rows).unwrap();
        Self { cache, codes: Some(rows), ..plain }
    }

    /// Queries, and the keys and values that they meet.
    fn met(&self) -> [Tensor; 3] {
        let Some(rows) = self.codes else { return self.rows.clone() };
        let [q, k, v] = &self.rows;
        let lengths: Vec<usize> = (0..self.answers.len()).map(|n| self.cache.position(n)).collect();
        let [k, v] = kept(&self.cache.save().unwrap(), [k, v], &lengths, rows);
        [q.clone(), k, v]
    }

    /// The next `lengths` tokens of each sequence on the device, padded with what must not be looked at.
    fn next(&self, lengths: &[usize]) -> [Tensor; 3] {
        let tokens = lengths.iter().copied().max().unwrap();
        self.rows.each_ref().map(|x| {
            let (_, heads, _, d) = x.dims4().unwrap();
            let one = |(sequence, &length): (usize, &usize)| {
                let start = self.cache.position(sequence);
                let padding = (1, heads, tokens - length, d);
                let padding = Tensor::full(f64::NAN, padding, &Device::Cpu).unwrap();
                if length == 0 {
                    return padding;
                }
                let own = x.narrow(0, sequence, 1).unwrap().narrow(2, start, length).unwrap();
                if length == tokens { own } else { Tensor::cat(&[&own, &padding], 2).unwrap() }
            };
            let all: Vec<_> = lengths.iter().enumerate().map(one).collect();
            let all = Tensor::cat(&all, 0).unwrap().to_dtype(self.dtype).unwrap();
            all.to_device(&self.device).unwrap()
        })
    }

    fn feed(&mut self, lengths: &[usize]) {
        let [q, k, v] = self.next(lengths);
        let even = lengths.iter().all(|&length| length == lengths[0]);
        let out = self.cache.advance(&q, &k, &v, (!even).then_some(lengths)).unwrap();
        assert_eq!((out.dims(), out.dtype()), (q.dims(), self.dtype));
        self.keep(&out, lengths);
    }

    fn keep(&mut self, out: &Tensor, lengths: &[usize]) {
        let out = out.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        for (sequence, &length) in lengths.iter().enumerate() {
            let own = out.get(sequence).unwrap();
            let tokens = own.dim(1).unwrap();
            if length < tokens {
                let padding = flat(&own.narrow(1, length, tokens - length).unwrap());
                assert!(padding.iter().all(|&x| x == 0.0), "padding was written");
            }
            if length > 0 {
                self.answers[sequence].push(own.narrow(1, 0, length).unwrap());
            }
        }
    }

    /// Compares the last `queries` answers of each sequence.
    fn check(&self, queries: usize, what: &str) {
        self.check_to(limit(self.dtype), queries, what);
    }

    fn check_to(&self, limit: f64, queries: usize, what: &str) {
        let (mut got, mut expected, met) = (Vec::new(), Vec::new(), self.met());
        for (sequence, answers) in self.answers.iter().enumerate() {
            let tokens = self.cache.position(sequence);
            let queries = queries.min(tokens);
            if tokens == 0 {
                continue;
            }
            let all = Tensor::cat(answers, 1).unwrap();
            assert_eq!(all.dim(1).unwrap(), tokens, "{what}");
            got.extend(flat(&all.narrow(1, tokens - queries, queries).unwrap()));
            expected.extend(definition(self.geometry, &met, sequence, (queries, tokens)));
        }
        let error = relative_rms(&got, &expected);
        let case = (self.dtype, self.codes, self.geometry);
        println!("{error:.1e} {what}: {case:?}");
        assert!(error <= limit, "{what}: {case:?}: relative RMS {error:e}");
    }

    fn feed_all(&mut self, calls: &[&[usize]]) {
        calls.iter().for_each(|lengths| self.feed(lengths));
    }
}

#[test]
fn whole_sequences() {
    let device = gpu();
    for dtype in DTYPES {
        for shape in SHAPES {
            for tokens in [1, 63, 64, 65, 129, 321] {
                let geometry = geometry(shape);
                let rows = sequences(geometry, 2, tokens, dtype);
                let [q, k, v] =
                    rows.each_ref().map(|x| x.to_dtype(dtype).unwrap().to_device(&device).unwrap());
                let got = flat(&dense_attention(&q, &k, &v, None).unwrap());
                let expected = |n| definition(geometry, &rows, n, (tokens, tokens));
                let error = relative_rms(&got, &[expected(0), expected(1)].concat());
                let limit = limit(dtype);
                println!("{error:.1e} whole: {dtype:?} {shape:?}, {tokens} tokens");
                assert!(error <= limit, "{dtype:?} {shape:?}, {tokens} tokens: {error:e}");
            }
        }
    }
}

/// From nothing across the first borders of tiles.
#[test]
fn steps_from_the_start() {
    for dtype in DTYPES {
        for shape in SHAPES {
            let mut fed = Fed::new(shape, 1, 200, dtype);
            (0..200).for_each(|_| fed.feed(&[1]));
            fed.check(200, "decoded");
        }
    }
}

/// Blocks share the tokens: from one tile each to several.
#[test]
fn steps_after_a_long_prefix() {
    for dtype in DTYPES {
        for (shape, prefix) in
            [((9, 3, 64), 4095), ((8, 2, 128), 3000), ((4, 1, 96), 9000), ((2, 1, 256), 700)]
        {
            let mut fed = Fed::new(shape, 1, prefix + 4, dtype);
            fed.feed_all(&[&[prefix], &[1], &[1], &[1], &[1]]);
            fed.check_to(limit_of_many(dtype), 5, &format!("decoded after {prefix}"));
        }
    }
}

#[test]
fn sequences_of_different_lengths() {
    let calls: [&[usize]; 10] = [
        &[130, 1, 0, 64, 2],
        &[1, 1, 1, 0, 0],
        &[3, 200, 1, 129, 0],
        &[0, 1, 0, 0, 1],
        &[70, 0, 320, 2, 61],
        &[1; 5],
        &[2, 64, 3, 0, 65],
        &[5; 5],
        &[1; 5],
        &[300; 5],
    ];
    for dtype in DTYPES {
        for shape in SHAPES {
            let mut fed = Fed::new(shape, 5, 700, dtype);
            fed.feed_all(&calls);
            fed.check(700, "unevenly");
        }
    }
}

/// Calls that begin and end before, at and behind the borders of tiles of 64 and of 128 keys.
#[test]
fn any_split() {
    let splits: [&[usize]; 4] = [
        &[2, 3, 59, 2, 62, 2, 64, 3, 127, 129, 130],
        &[1, 200, 1, 65, 63, 128],
        &[128, 2, 320],
        &[300, 61, 2, 3, 1, 140],
    ];
    for dtype in DTYPES {
        for shape in SHAPES {
            for split in splits {
                let mut fed = Fed::new(shape, 1, split.iter().sum(), dtype);
                split.iter().for_each(|&length| fed.feed(&[length]));
                fed.check(usize::MAX, &format!("{split:?}"));
            }
        }
    }
}

/// Rows move, a copy goes another way, and both say what they hold.
#[test]
fn a_cache_grows_and_is_copied() {
    for dtype in DTYPES {
        let mut fed = Fed::new((4, 2, 64), 2, 2600, dtype);
        fed.feed(&[1000, 900]);
        let (moves, size) = (fed.cache.moves(), fed.cache.size_bytes());
        let mut copy = fed.cache.clone();
        let [q, k, v] = fed.next(&[1, 1]);
        copy.advance(&q, &v, &k, None).unwrap();
        fed.feed(&[1500, 1600]);
        assert!(fed.cache.moves() > moves && fed.cache.size_bytes() > size);
        (0..3).for_each(|_| fed.feed(&[1, 1]));
        fed.check_to(limit_of_many(dtype), 20, "grown");
        let row = 2 * 2 * 64 * dtype.size_in_bytes();
        assert_eq!(fed.cache.used_bytes(), (2503 + 2503) * row);
        assert!(fed.cache.size_bytes() >= fed.cache.used_bytes());
        assert_eq!((copy.position(0), copy.position(1)), (1001, 901));
    }
}

/// As a captured graph feeds it: an idle sequence is left alone.
#[test]
fn steps_by_position() {
    for dtype in DTYPES {
        for shape in SHAPES {
            feed_by_position(Fed::new(shape, 3, 210, dtype));
        }
    }
    for (format, shape) in coded() {
        feed_by_position(Fed::coded(shape, 3, 210, format));
    }
}

fn feed_by_position(mut fed: Fed) {
    fed.feed(&[200, 3, 64]);
    GraphState::reserve(&mut fed.cache, 210).unwrap();
    let idle = Tensor::from_vec(vec![IDLE; 3], 3, &fed.device).unwrap();
    let [q, k, v] = fed.next(&[1; 3]);
    // SAFETY: nothing is fed.
    unsafe { fed.cache.step([&q, &k, &v], &idle, None) }.unwrap();
    for _ in 0..5 {
        let positions: Vec<u32> =
            (0..3).map(|sequence| fed.cache.position(sequence) as u32).collect();
        let positions = Tensor::from_vec(positions, 3, &fed.device).unwrap();
        let [q, k, v] = fed.next(&[1; 3]);
        // SAFETY: the positions are the sequences' own, and there is room.
        let out = unsafe { fed.cache.step([&q, &k, &v], &positions, None) }.unwrap();
        fed.keep(&out, &[1; 3]);
        fed.cache.count();
    }
    fed.check(70, "by position");
}

/// Radians of each rotated pair of channels at a position, as f32 cosines and sines of them are given to a step.
fn angles(position: usize, rotary: usize) -> Vec<f64> {
    let frequency = |i: usize| 1e4_f64.powf(-2.0 * i as f64 / rotary as f64);
    (0..rotary / 2).map(|i| position as f64 * frequency(i)).collect()
}

/// `[B, heads, T, D]` after RoPE of the first `rotary` channels, rounded to `dtype`.
fn rotated(x: &Tensor, rotary: usize, dtype: DType) -> Tensor {
    let (tokens, d) = (x.dim(2).unwrap(), x.dim(3).unwrap());
    let mut values = flat(x);
    for (n, row) in values.chunks_exact_mut(d).enumerate() {
        let (low, rest) = row.split_at_mut(rotary / 2);
        let angles = angles(n % tokens, rotary);
        for ((low, high), angle) in low.iter_mut().zip(rest).zip(angles) {
            let (sin, cos) = angle.sin_cos();
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }
    let rotated = Tensor::from_vec(values, x.shape(), &Device::Cpu).unwrap();
    rotated.to_dtype(dtype).unwrap().to_dtype(DType::F64).unwrap()
}

/// Queries and keys go through RoPE on their way, and keys into the cache so.
#[test]
fn steps_that_rotate() {
    let cases = [
        ((9, 3, 64), 64),
        ((8, 2, 128), 128),
        ((4, 1, 80), 80),
        ((6, 3, 96), 64),
        ((2, 1, 256), 256),
        ((2, 2, 64), 16),
        ((20, 1, 96), 96),
    ];
    for (shape, rotary) in cases {
        DTYPES.into_iter().for_each(|dtype| feed_rotated(Fed::new(shape, 3, 210, dtype), rotary));
        CODES
            .into_iter()
            .for_each(|format| feed_rotated(Fed::coded(shape, 3, 210, format), rotary));
    }
}

fn feed_rotated(mut fed: Fed, rotary: usize) {
    let (raw, dtype) = (fed.rows.clone(), fed.dtype);
    let [q, k, v] = &raw;
    fed.rows = [rotated(q, rotary, dtype), rotated(k, rotary, dtype), v.clone()];
    fed.feed(&[195, 3, 63]);
    fed.cache.reserve(210).unwrap();
    assert!(GraphStep::rotates(&fed.cache, rotary));
    for _ in 0..9 {
        let positions: Vec<usize> = (0..3).map(|sequence| fed.cache.position(sequence)).collect();
        let both = |f: fn(f64) -> f64| {
            let angles = positions.iter().flat_map(|&p| angles(p, rotary));
            let values: Vec<f32> = angles.map(|angle| f(angle) as f32).collect();
            Tensor::from_vec(values, (3, 1, rotary / 2), &fed.device).unwrap()
        };
        let (cos, sin) = (both(f64::cos), both(f64::sin));
        let rotation = Some(StepRotation { cos: &cos, sin: &sin });
        let own: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
        let own = Tensor::from_vec(own, 3, &fed.device).unwrap();
        let rotated_rows = std::mem::replace(&mut fed.rows, raw.clone());
        let [q, k, v] = fed.next(&[1; 3]);
        fed.rows = rotated_rows;
        // SAFETY: the positions are the sequences' own, and there is room.
        let out = unsafe { fed.cache.step([&q, &k, &v], &own, rotation) }.unwrap();
        fed.keep(&out, &[1; 3]);
        fed.cache.count();
    }
    fed.check(9, &format!("{rotary} channels rotated"));
    // Those that came later see rotated keys.
    fed.feed(&[3, 2, 1]);
    fed.check(12, &format!("after {rotary} channels were rotated"));
}

fn coded() -> impl Iterator<Item = ((DType, RowDtype), (usize, usize, usize))> {
    CODES.into_iter().flat_map(|format| CODED_SHAPES.map(|shape| (format, shape)))
}

/// Rows in few bits: a token meets its own as they are kept, in a step as in a piece of any length.
#[test]
fn rows_in_few_bits() {
    for (format, shape) in coded() {
        let mut fed = Fed::coded(shape, 1, 400, format);
        (0..70).for_each(|_| fed.feed(&[1]));
        fed.feed_all(&[&[59], &[1], &[2], &[129], &[1], &[1], &[64], &[1]]);
        fed.check(usize::MAX, "in few bits");

        let mut fed = Fed::coded(shape, 4, 500, format);
        fed.feed_all(&[&[130, 1, 0, 64], &[1, 1, 1, 0], &[3, 200, 1, 129], &[0, 1, 0, 1], &[1; 4]]);
        fed.feed_all(&[&[5; 4], &[1; 4], &[70, 0, 320, 2], &[1; 4]]);
        fed.check(500, "in few bits, unevenly");
    }
}

/// Blocks share the tokens, and the rows move with what scales them.
#[test]
fn rows_in_few_bits_after_a_long_prefix() {
    for format in CODES {
        for (shape, prefix) in [((9, 3, 64), 4095), ((8, 2, 128), 3000), ((2, 1, 256), 700)] {
            let mut fed = Fed::coded(shape, 1, prefix + 204, format);
            fed.feed_all(&[&[200], &[prefix], &[1], &[1], &[1], &[1]]);
            fed.check_to(limit_of_many(format.0), 5, &format!("in few bits after {prefix}"));
            let row = 2 * shape.1 * format.1.row_bytes(shape.2);
            assert_eq!(fed.cache.used_bytes(), (prefix + 204) * row);
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let device = gpu();
    let geometry = geometry((4, 2, 64));
    assert!(CudaKvCache::new(geometry, 0, &device, DType::F32).is_err());
    assert!(CudaKvCache::new(geometry, 1, &Device::Cpu, DType::F32).is_err());
    assert!(CudaKvCache::new(geometry, 1, &device, DType::F16).is_err());
    let in_bf16 = CudaKvCache::with_rows(geometry, 1, &device, DType::BF16, RowDtype::Int4);
    let error = in_bf16.unwrap_err().to_string();
    assert!(error.contains("int4 in bf16"), "{error}");
    let of = |geometry, rows| CudaKvCache::with_rows(geometry, 1, &device, DType::F32, rows);
    assert!(of(geometry, RowDtype::Bf16).is_err());
    let odd = HeadGeometry { head_dim: 72, ..geometry };
    let error = of(odd, RowDtype::Int8).unwrap_err().to_string();
    assert!(error.contains("head_dim") && error.contains("int8 or int4"), "{error}");
    let cache = CudaKvCache::new(geometry, 1, &device, DType::F32).unwrap();
    let [q, k, v] = sequences(geometry, 1, 1, DType::F32)
        .map(|x| x.to_dtype(DType::F32).unwrap().to_device(&device).unwrap());
    let idle = Tensor::from_vec(vec![IDLE], 1, &device).unwrap();
    // SAFETY: nothing is queued.
    let error = unsafe { cache.step([&q, &k, &v], &idle, None) }.unwrap_err().to_string();
    assert!(error.contains("reserve"), "{error}");
}
