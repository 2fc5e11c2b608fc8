//! The recurrent state and the dense cache on a CUDA GPU against the CPU's.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it. It runs on a machine without
//! Rust or the checkout.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{flat, random_input, relative_rms, some_exponents, tensors};
use half::bf16;
use still_attention::{
    AttentionRows, AttentionState, Branches, CudaHybridState, CudaKvCache, CudaWeights, FeatureMap,
    GraphState, GraphStep, HeadGeometry, HybridConfig, HybridState, HybridWeights, KvCache,
    LinearNorm, PreparedWeights, Router, RowDtype, SelectionHead, StepRotation, StillConfig,
    hybrid_attention, naive,
};
use still_compute::cuda::StepMemory;

/// The GPU; a test that asks for one and finds none has failed.
fn gpu() -> Device {
    let device = Device::new_cuda(0);
    let device = device.unwrap_or_else(|error| panic!("these tests need a CUDA GPU: {error}"));
    // What is allocated next is likely to lie here: whatever a kernel leaves out then shows.
    drop(Tensor::full(f32::NAN, 1 << 24, &device).unwrap());
    device
}

/// Query heads, KV heads, head dimension, budgets and scale: groups of 1, 2, 3, 4 and 8.
type Shape = (usize, usize, usize, &'static [usize], LinearNorm);
const SHAPES: [Shape; 8] = [
    (2, 2, 64, &[4, 0], LinearNorm::Mean),
    (3, 1, 128, &[5], LinearNorm::Sum),
    (8, 2, 128, &[64, 4], LinearNorm::Mean),
    (4, 1, 64, &[0], LinearNorm::Sum),
    (6, 3, 96, &[4, 64, 1], LinearNorm::Mean),
    (8, 1, 64, &[11], LinearNorm::Mean),
    (4, 2, 80, &[4, 9], LinearNorm::Mean),
    (4, 2, 64, &[64, 2], LinearNorm::Mean),
];

fn layer((num_heads, num_key_value_heads, head_dim, budgets, linear_norm): Shape) -> Layer {
    let geometry = HeadGeometry { num_heads, num_key_value_heads, head_dim };
    let config = StillConfig::uniform(1, geometry, 64, 0).layer(0).unwrap();
    Layer { geometry, config: HybridConfig { budgets: budgets.to_vec(), linear_norm, ..config } }
}

/// The same under a cap: below a budget and of 0, reached by some heads and by none, of full heads.
const CAPPED: [(Shape, usize); 7] = [
    ((2, 2, 64, &[4, 0], LinearNorm::Mean), 6),
    ((3, 1, 128, &[5], LinearNorm::Sum), 2),
    ((8, 2, 128, &[64, 4], LinearNorm::Mean), 9),
    ((6, 3, 96, &[4, 64, 1], LinearNorm::Mean), 100),
    ((8, 1, 64, &[11], LinearNorm::Mean), 0),
    ((4, 2, 64, &[4, 2], LinearNorm::Sum), 1000),
    ((4, 2, 80, &[4, 64], LinearNorm::Mean), 7),
];

fn capped((shape, cap): (Shape, usize)) -> Layer {
    let Layer { geometry, config } = layer(shape);
    Layer { geometry, config: HybridConfig { cap: Some(cap), ..config } }
}

/// The same with keys whose channels differ a hundredfold, and exponents that make them alike.
fn scaled(Layer { geometry, config }: Layer) -> Layer {
    Layer { geometry, config: HybridConfig { key_exponents: some_exponents(geometry), ..config } }
}

#[derive(Clone)]
struct Layer {
    geometry: HeadGeometry,
    config: HybridConfig,
}

/// What a float type may differ from the CPU's f32.
fn limit(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 5e-3 } else { 1e-5 }
}

/// Sequences on the CPU in f32, of values that `dtype` holds exactly.
struct Sequences {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: HybridWeights,
    dtype: DType,
    /// What outputs and the linear state may be off by.
    limit: f64,
}

impl Sequences {
    fn new(layer: &Layer, batch: usize, tokens: usize, dtype: DType) -> Self {
        Self::rounded(layer, batch, tokens, dtype, dtype)
    }

    /// Of values that `round` holds exactly too.
    fn rounded(layer: &Layer, batch: usize, tokens: usize, dtype: DType, round: DType) -> Self {
        let to = |x: f64| match round {
            DType::BF16 => bf16::from_f64(x).to_f32(),
            _ => x as f32,
        };
        let Layer { geometry, config } = layer;
        let one =
            |n: usize| tensors(&random_input(*geometry, config, tokens, 50 + n as u64), config, to);
        let all: Vec<_> = (0..batch).map(one).collect();
        let stack = |part: fn(&common::Tensors) -> &Tensor| {
            Tensor::cat(&all.iter().map(part).collect::<Vec<_>>(), 0).unwrap()
        };
        Self {
            q: stack(|x| &x.q),
            k: stack(|x| &x.k),
            v: stack(|x| &x.v),
            weights: all[0].weights.clone(),
            dtype,
            limit: limit(dtype),
        }
    }

    /// `lengths` tokens of each sequence from `starts` on, padded with what must not be looked at.
    fn rows(&self, starts: &[usize], lengths: &[usize]) -> [Tensor; 3] {
        let tokens = lengths.iter().copied().max().unwrap();
        [&self.q, &self.k, &self.v].map(|x| {
            let (_, heads, _, d) = x.dims4().unwrap();
            let one = |(sequence, (&start, &length)): (usize, (&usize, &usize))| {
                let padding = (1, heads, tokens - length, d);
                let padding = Tensor::full(f32::NAN, padding, &Device::Cpu).unwrap();
                if length == 0 {
                    return padding;
                }
                let own = x.narrow(0, sequence, 1).unwrap().narrow(2, start, length).unwrap();
                if length == tokens { own } else { Tensor::cat(&[&own, &padding], 2).unwrap() }
            };
            let all: Vec<_> = starts.iter().zip(lengths).enumerate().map(one).collect();
            Tensor::cat(&all, 0).unwrap().contiguous().unwrap()
        })
    }

    /// Makes the calls, each so many tokens of every sequence, to both sides and compares what they answer.
    fn compare(
        &self,
        device: &Device,
        starts: &mut [usize],
        calls: &[Vec<usize>],
        mut cpu: impl FnMut([&Tensor; 3], Option<&[usize]>) -> Tensor,
        mut gpu: impl FnMut([&Tensor; 3], Option<&[usize]>) -> Tensor,
        case: &str,
    ) {
        let limit = self.limit;
        let (mut all_got, mut all_expected) = (Vec::new(), Vec::new());
        for (n, lengths) in calls.iter().enumerate() {
            let rows = self.rows(starts, lengths);
            let there =
                rows.each_ref().map(|x| x.to_device(device).unwrap().to_dtype(self.dtype).unwrap());
            let even = lengths.iter().all(|length| *length == lengths[0]);
            let given = (!even).then_some(lengths.as_slice());
            let expected = cpu(rows.each_ref(), given);
            let answer = gpu(there.each_ref(), given);
            assert_eq!((answer.dims(), answer.dtype()), (expected.dims(), self.dtype), "{case}");
            let (mut got, mut wanted) = (Vec::new(), Vec::new());
            for (sequence, (start, &length)) in starts.iter_mut().zip(lengths).enumerate() {
                let own = |x: &Tensor, from: usize, to: usize| {
                    let x = x.narrow(0, sequence, 1).unwrap();
                    if from == to {
                        Vec::new()
                    } else {
                        flat(&x.narrow(2, from, to - from).unwrap())
                    }
                };
                got.extend(own(&answer, 0, length));
                wanted.extend(own(&expected, 0, length));
                let padding = own(&answer, length, answer.dim(2).unwrap());
                assert!(padding.iter().all(|&x| x == 0.0), "{case}: call {n} wrote to padding");
                *start += length;
            }
            let error = relative_rms(&got, &wanted);
            assert!(
                error <= 5.0 * limit,
                "{case}: relative RMS {error:e} of call {n}, {lengths:?}"
            );
            all_got.extend(got);
            all_expected.extend(wanted);
        }
        let error = relative_rms(&all_got, &all_expected);
        println!("{error:.1e} {case}");
        assert!(error <= limit, "{case}: relative RMS {error:e}");
    }
}

/// Both states of a layer.
struct States {
    layer: Layer,
    sequences: Sequences,
    device: Device,
    positions: Vec<usize>,
    cpu: HybridState,
    gpu: CudaHybridState,
}

impl States {
    fn new(layer: &Layer, batch: usize, tokens: usize, dtype: DType) -> Self {
        let Layer { geometry, config } = layer.clone();
        let sequences = Sequences::new(layer, batch, tokens, dtype);
        let device = gpu();
        let weights = PreparedWeights::new(geometry, &config, &sequences.weights).unwrap();
        let cpu = HybridState::new(weights, batch, RowDtype::F32);
        let weights =
            CudaWeights::new(geometry, &config, &sequences.weights, &device, dtype).unwrap();
        let gpu = CudaHybridState::new(weights, batch).unwrap();
        let layer = layer.clone();
        Self { layer, sequences, device, positions: vec![0; batch], cpu, gpu }
    }

    /// Both keep salient rows as `rows`. On the CPU the window is bf16 then: what comes in is exact there.
    fn of_rows(
        layer: &Layer,
        batch: usize,
        tokens: usize,
        (dtype, rows): (DType, RowDtype),
    ) -> Self {
        let Layer { geometry, config } = layer.clone();
        let sequences = Sequences::rounded(layer, batch, tokens, dtype, DType::BF16);
        let device = gpu();
        let weights = PreparedWeights::new(geometry, &config, &sequences.weights).unwrap();
        let cpu = HybridState::new(weights, batch, rows);
        let weights =
            CudaWeights::new(geometry, &config, &sequences.weights, &device, dtype).unwrap();
        let gpu = CudaHybridState::with_rows(weights, batch, rows).unwrap();
        let layer = layer.clone();
        Self { layer, sequences, device, positions: vec![0; batch], cpu, gpu }
    }

    fn feed(&mut self, calls: &[Vec<usize>], what: &str) {
        let Self { layer, sequences, device, positions, cpu, gpu } = self;
        let case = format!(
            "{what}: {:?} {:?} {:?}, {} bytes",
            sequences.dtype,
            layer.geometry,
            layer.config,
            gpu.size_bytes()
        );
        let on_cpu = |[q, k, v]: [&Tensor; 3], lengths: Option<&[usize]>| {
            cpu.advance(q, k, v, None, lengths).unwrap()
        };
        let on_gpu = |[q, k, v]: [&Tensor; 3], lengths: Option<&[usize]>| {
            gpu.advance(q, k, v, lengths).unwrap()
        };
        sequences.compare(device, positions, calls, on_cpu, on_gpu, &case);
        for (sequence, &position) in positions.iter().enumerate() {
            assert_eq!((gpu.position(sequence), cpu.position(sequence)), (position, position));
            for head in 0..layer.config.budgets.len() {
                let (got, expected) =
                    (gpu.linear(sequence, head).unwrap(), cpu.linear(sequence, head));
                assert_eq!(got.count, expected.count, "{case}");
                for (got, expected) in [(&got.s, &expected.s), (&got.z, &expected.z)] {
                    let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
                    let error = relative_rms(&wide(got), &wide(expected));
                    println!("{error:.1e} state, {case}");
                    assert!(error <= sequences.limit, "{case}: a state is off by {error:e}");
                }
            }
        }
    }
}

/// So many calls of one token for each of `batch` sequences.
fn singles(batch: usize, tokens: usize) -> Vec<Vec<usize>> {
    vec![vec![1; batch]; tokens]
}

#[test]
fn decoding_from_the_start() {
    for dtype in [DType::F32, DType::BF16] {
        for shape in SHAPES {
            States::new(&layer(shape), 1, 260, dtype).feed(&singles(1, 260), "decoded");
        }
    }
}

/// What is read at once ends before, at and behind the borders of chunks; what is decoded crosses one or two more.
#[test]
fn reading_and_then_decoding() {
    for dtype in [DType::F32, DType::BF16] {
        for shape in SHAPES {
            for read in [1, 2, 63, 64, 65, 127, 128, 129, 130, 200] {
                let mut states = States::new(&layer(shape), 1, read + 70, dtype);
                states.feed(&[vec![read]], &format!("{read} read"));
                states.feed(&singles(1, 70), &format!("decoded after {read}"));
            }
        }
    }
}

#[test]
fn a_cap_from_the_start() {
    for dtype in [DType::F32, DType::BF16] {
        for case in CAPPED {
            States::new(&capped(case), 1, 400, dtype).feed(&singles(1, 400), "decoded");
        }
    }
}

#[test]
fn a_cap_after_reading() {
    for dtype in [DType::F32, DType::BF16] {
        for case in CAPPED {
            for read in [2, 128, 129, 192, 193, 320, 450] {
                let mut states = States::new(&capped(case), 1, read + 200, dtype);
                states.feed(&[vec![read]], &format!("{read} read"));
                states.feed(&singles(1, 200), &format!("decoded after {read}"));
            }
        }
    }
}

#[test]
fn a_cap_on_sequences_of_different_lengths() {
    for dtype in [DType::F32, DType::BF16] {
        for case in CAPPED {
            let mut states = States::new(&capped(case), 4, 700, dtype);
            states.feed(&[vec![130, 1, 0, 290]], "read unevenly");
            states.feed(&[vec![1, 1, 1, 0], vec![0, 1, 0, 1]], "decoded by turns");
            states.feed(&singles(4, 140), "decoded together");
            states.feed(&[vec![3, 70, 0, 129], vec![5; 4]], "continued");
        }
    }
}

/// What is kept is more than shared memory holds when tokens are read onto it.
#[test]
fn a_large_cap() {
    let own = capped(((2, 1, 64, &[64], LinearNorm::Mean), 8300));
    let mut states = States::new(&own, 1, 9000, DType::F32);
    states.feed(&[vec![8200], vec![500]], "read");
    states.feed(&singles(1, 130), "decoded");
}

/// The store of a head under a cap grows to it and no further.
#[test]
fn a_capped_store_stops_growing() {
    let mut states =
        States::new(&capped(((4, 2, 64, &[4, 64], LinearNorm::Mean), 90)), 2, 3000, DType::F32);
    states.feed(&singles(2, 300), "before");
    let moves = states.gpu.moves();
    states.feed(&[vec![1300, 1111]], "while it grows");
    assert!(states.gpu.moves() > moves);
    let full = (states.gpu.size_bytes(), states.gpu.moves());
    states.feed(&[vec![1200, 1300]], "full");
    states.feed(&singles(2, 70), "after");
    assert_eq!((states.gpu.size_bytes(), states.gpu.moves()), full);
}

/// A long prefix has several segments of chunks, whose sums meet in the last state.
#[test]
fn a_long_sequence() {
    let mut states = States::new(&layer(SHAPES[2]), 1, 2300, DType::F32);
    states.feed(&[vec![2222]], "2222 read");
    states.feed(&singles(1, 78), "decoded after 2222");
}

#[test]
fn sequences_of_different_lengths() {
    for dtype in [DType::F32, DType::BF16] {
        for shape in SHAPES {
            let mut states = States::new(&layer(shape), 4, 420, dtype);
            states.feed(&[vec![130, 1, 0, 64]], "read unevenly");
            states.feed(&[vec![1, 1, 1, 0], vec![0, 1, 0, 1]], "decoded by turns");
            states.feed(&singles(4, 70), "decoded together");
            states.feed(&[vec![3, 70, 0, 129], vec![5; 4]], "continued");
        }
    }
}

/// The first sequences have something, the last is read at once in the same call.
#[test]
fn one_sequence_joins_late() {
    let mut states = States::new(&layer(SHAPES[4]), 3, 300, DType::F32);
    states.feed(&[vec![100, 129, 0], vec![2, 3, 200], vec![9; 3]], "joined");
}

#[test]
fn equal_sequences_are_read_together() {
    for dtype in [DType::F32, DType::BF16] {
        let mut states = States::new(&layer(SHAPES[4]), 3, 330, dtype);
        states.feed(&[vec![257; 3]], "read together");
        states.feed(&singles(3, 73), "decoded together");
    }
}

/// Sizes of calls that begin and end before, at and behind the borders of chunks.
const SPLITS: [&[usize]; 6] = [
    &[2, 3, 59, 2, 62, 2, 64, 3, 127, 129, 130],
    &[1, 200, 1, 65, 63, 128],
    &[127, 3, 190, 2, 2],
    &[128, 2, 320],
    &[64, 64, 2, 254, 3],
    &[300, 61, 2, 3, 1, 140],
];

/// Reading on from any place, by any number of tokens, and decoding from there.
#[test]
fn any_split_is_read_alike() {
    for dtype in [DType::F32, DType::BF16] {
        for split in SPLITS {
            let calls: Vec<_> = split.iter().map(|&tokens| vec![tokens]).collect();
            let tokens = split.iter().sum::<usize>() + 70;
            let layers = SHAPES.map(layer).into_iter().chain(CAPPED.map(capped));
            for layer in layers {
                let mut states = States::new(&layer, 1, tokens, dtype);
                states.feed(&calls, &format!("{split:?}"));
                states.feed(&singles(1, 70), &format!("decoded after {split:?}"));
            }
        }
    }
}

/// In every call each sequence has a length of its own, from nothing to several chunks, and stands somewhere else.
#[test]
fn different_lengths_are_read_together() {
    let calls = [
        vec![130, 1, 0, 64, 2],
        vec![3, 200, 1, 129, 0],
        vec![70, 0, 320, 2, 61],
        vec![2, 64, 3, 0, 65],
        vec![190, 1, 64, 260, 128],
    ];
    for dtype in [DType::F32, DType::BF16] {
        for layer in SHAPES.map(layer).into_iter().chain(CAPPED.map(capped)) {
            let mut states = States::new(&layer, 5, 560, dtype);
            states.feed(&calls, "read unevenly");
            states.feed(&singles(5, 70), "decoded after");
        }
    }
}

/// What is read onto a long state has several segments of chunks, the first of which begins with the state's sums.
#[test]
fn long_pieces() {
    for own in [layer(SHAPES[2]), capped(CAPPED[2]), capped(CAPPED[3])] {
        let mut states = States::new(&own, 1, 4200, DType::F32);
        states.feed(&[vec![1100], vec![2000], vec![1030]], "in three");
        states.feed(&singles(1, 70), "decoded after");
    }
}

/// Rows in few bits, and the dtypes of activations.
const CODED: [(DType, RowDtype); 4] = [
    (DType::F32, RowDtype::Int8),
    (DType::BF16, RowDtype::Int8),
    (DType::F32, RowDtype::Int4),
    (DType::BF16, RowDtype::Int4),
];

fn all_layers() -> impl Iterator<Item = Layer> {
    SHAPES.map(layer).into_iter().chain(CAPPED.map(capped))
}

/// Those and some whose keys are scaled.
fn coded_layers() -> impl Iterator<Item = Layer> {
    let plain = [SHAPES[2], SHAPES[4], SHAPES[6], SHAPES[7]].map(layer).into_iter();
    all_layers().chain(plain.chain([CAPPED[0], CAPPED[2]].map(capped)).map(scaled))
}

#[test]
fn rows_in_few_bits_are_decoded() {
    for coded in CODED {
        for layer in coded_layers() {
            let mut states = States::of_rows(&layer, 1, 400, coded);
            states.feed(&singles(1, 400), &format!("{:?} decoded", coded.1));
        }
    }
}

#[test]
fn rows_in_few_bits_are_read_alike_at_any_split() {
    for coded in CODED {
        for split in SPLITS {
            let calls: Vec<_> = split.iter().map(|&tokens| vec![tokens]).collect();
            let tokens = split.iter().sum::<usize>() + 140;
            for layer in coded_layers() {
                let mut states = States::of_rows(&layer, 1, tokens, coded);
                states.feed(&calls, &format!("{:?} {split:?}", coded.1));
                states.feed(&singles(1, 140), &format!("{:?} after {split:?}", coded.1));
            }
        }
    }
}

#[test]
fn rows_in_few_bits_of_sequences_of_different_lengths() {
    let calls = [
        vec![130, 1, 0, 64, 2],
        vec![3, 200, 1, 129, 0],
        vec![70, 0, 320, 2, 61],
        vec![2, 64, 3, 0, 65],
    ];
    for coded in CODED {
        for layer in coded_layers() {
            let mut states = States::of_rows(&layer, 5, 560, coded);
            states.feed(&calls, &format!("{:?} read unevenly", coded.1));
            states.feed(&singles(5, 70), &format!("{:?} decoded after", coded.1));
        }
    }
}

/// They have kernels in bf16: rows as they come and in few bits, decoded from the start, read in pieces and of several lengths.
#[test]
fn heads_of_256_channels() {
    let wide = [
        layer((4, 2, 256, &[4, 64], LinearNorm::Mean)),
        layer((3, 1, 256, &[5], LinearNorm::Sum)),
        layer((8, 1, 256, &[0], LinearNorm::Mean)),
        capped(((6, 3, 256, &[4, 64, 1], LinearNorm::Mean), 100)),
        capped(((2, 1, 256, &[5], LinearNorm::Sum), 9)),
    ];
    let calls = [vec![130, 1, 0, 64], vec![3, 200, 1, 129], vec![70, 0, 320, 2]];
    for own in wide {
        for rows in [RowDtype::Bf16, RowDtype::Int8, RowDtype::Int4] {
            let states = |batch, tokens| match rows {
                RowDtype::Bf16 => States::new(&own, batch, tokens, DType::BF16),
                _ => States::of_rows(&own, batch, tokens, (DType::BF16, rows)),
            };
            states(1, 260).feed(&singles(1, 260), &format!("{rows:?} decoded"));
            let mut split = states(1, 520);
            let pieces = [1, 200, 1, 65, 63, 120].map(|tokens| vec![tokens]);
            split.feed(&pieces, &format!("{rows:?} in pieces"));
            split.feed(&singles(1, 70), &format!("{rows:?} decoded after"));
            let mut uneven = states(4, 500);
            uneven.feed(&calls, &format!("{rows:?} read unevenly"));
            uneven.feed(&singles(4, 70), &format!("{rows:?} decoded after that"));
        }
    }
}

/// The store moves with codes and scales in it.
#[test]
fn a_store_in_few_bits_grows() {
    for coded in CODED {
        let shape = (4, 2, 64, [4, 64].as_slice(), LinearNorm::Mean);
        let mut states = States::of_rows(&layer(shape), 2, 1500, coded);
        states.feed(&singles(2, 200), "before");
        let before = states.gpu.moves();
        states.feed(&[vec![1200, 1111]], "while it grows");
        states.feed(&singles(2, 70), "after");
        assert!(states.gpu.moves() > before);
    }
}

/// Each format's rows take as many bytes as it says.
#[test]
fn rows_in_few_bits_take_fewer_bytes() {
    let own = layer((2, 1, 128, &[64], LinearNorm::Mean));
    let sizes = [RowDtype::Bf16, RowDtype::Int8, RowDtype::Int4].map(|rows| {
        let x = Sequences::new(&own, 1, 3, DType::F32);
        let weights =
            CudaWeights::new(own.geometry, &own.config, &x.weights, &gpu(), DType::BF16).unwrap();
        let mut state = CudaHybridState::with_rows(weights, 1, rows).unwrap();
        let empty = state.size_bytes();
        state.reserve(64 * 1002).unwrap();
        (state.size_bytes() - empty) / 2 / 64
    });
    let rows = [RowDtype::Bf16, RowDtype::Int8, RowDtype::Int4].map(|rows| rows.row_bytes(128));
    // With what there is room for beyond: 16 chunks of a thousand.
    for (size, row) in sizes.into_iter().zip(rows) {
        assert!(size.abs_diff(1016 * row) <= row, "{size} bytes for 1016 rows of {row}");
    }
}

#[test]
fn rows_without_a_kernel_are_named() {
    let own = layer(SHAPES[0]);
    let x = Sequences::new(&own, 1, 3, DType::F32);
    let weights =
        CudaWeights::new(own.geometry, &own.config, &x.weights, &gpu(), DType::F32).unwrap();
    for rows in [RowDtype::Bf16, RowDtype::F16] {
        let error = CudaHybridState::with_rows(weights.clone(), 1, rows).unwrap_err().to_string();
        assert!(error.contains("rows") && error.contains(rows.name()), "{error}");
    }
}

/// Outputs of a sequence that is read in pieces, compared with the definition in float64, which is told what a whole pass on the
/// device selects.
#[test]
fn pieces_equal_the_definition() {
    for (dtype, limit) in [(DType::F32, 1e-5), (DType::BF16, 5e-3)] {
        for split in SPLITS {
            for layer in SHAPES.map(layer).into_iter().chain(CAPPED.map(capped)) {
                let Layer { geometry, config } = layer.clone();
                let tokens = split.iter().sum();
                let case = format!("{dtype:?} {split:?} {geometry:?} {config:?}");
                let mut sequences = Sequences::new(&layer, 1, tokens, dtype);
                let mut input = random_input(geometry, &config, tokens, 50);
                if dtype == DType::BF16 {
                    // Maps are rounded too, so that both sides see the same numbers.
                    let round = |x: &mut f64| *x = bf16::from_f64(*x).to_f64();
                    for values in [
                        &mut input.q,
                        &mut input.k,
                        &mut input.v,
                        &mut input.feature_map_q,
                        &mut input.feature_map_k,
                    ] {
                        values.iter_mut().for_each(round);
                    }
                    sequences.weights = tensors(&input, &config, |x| x as f32).weights;
                }
                let device = gpu();
                let there = |x: &Tensor| x.to_device(&device).unwrap().to_dtype(dtype).unwrap();
                let [q, k, v] = [&sequences.q, &sequences.k, &sequences.v].map(there);
                let w = &sequences.weights;
                let placed = HybridWeights {
                    feature_map_q: w.feature_map_q.to_device(&device).unwrap(),
                    feature_map_k: w.feature_map_k.to_device(&device).unwrap(),
                    log_lambda: w.log_lambda.as_ref().map(|x| x.to_device(&device).unwrap()),
                    ..w.clone()
                };
                let whole = hybrid_attention(&q, &k, &v, &placed, None, &config, None).unwrap();
                let selection = whole.routing.selection().unwrap();
                let expected = naive::hybrid_attention(&input, &config, Some(&selection)).out;

                let weights = CudaWeights::new(geometry, &config, w, &device, dtype).unwrap();
                let mut state = CudaHybridState::new(weights, 1).unwrap();
                let mut start = 0;
                let pieces = split.iter().map(|&length| {
                    let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(2, start, length).unwrap());
                    start += length;
                    state.advance(&q, &k, &v, None).unwrap()
                });
                let got = Tensor::cat(&pieces.collect::<Vec<_>>(), 2).unwrap();
                let error = relative_rms(&flat(&got), &expected);
                println!("{error:.1e} {case}");
                assert!(error <= limit, "{case}: relative RMS {error:e}");
            }
        }
    }
}

/// Enough tokens for the store to move, with something in it.
#[test]
fn the_store_grows() {
    for budgets in [&[4, 64], &[0, 0]] {
        let shape = (4, 2, 64, budgets.as_slice(), LinearNorm::Mean);
        let mut states = States::new(&layer(shape), 2, 1500, DType::F32);
        states.feed(&singles(2, 200), "before");
        let before = (states.gpu.size_bytes(), states.gpu.moves());
        states.feed(&[vec![1200, 1111]], "while it grows");
        states.feed(&singles(2, 70), "after");
        assert!(states.gpu.moves() > before.1);
        let (kept, grown) = (budgets[0] + budgets[1] > 0, states.gpu.size_bytes() > before.0);
        assert_eq!(grown, kept);
    }
}

#[test]
fn variants() {
    let plain = layer((4, 2, 64, &[4, 0], LinearNorm::Mean));
    let config = plain.config.clone();
    let exact = Branches { linear: false, ..Branches::default() };
    let variants = [
        HybridConfig { feature_map: FeatureMap::NpMap { householder: true }, ..config.clone() },
        HybridConfig { window_factor: true, ..config.clone() },
        HybridConfig { router: Router::None, ..config.clone() },
        HybridConfig {
            selection_head: SelectionHead::QueryHead,
            budgets: vec![4, 0, 64, 2],
            ..config.clone()
        },
        HybridConfig {
            selection_head: SelectionHead::QueryHead,
            budgets: vec![4, 0, 64, 2],
            cap: Some(5),
            ..config.clone()
        },
        HybridConfig { router: Router::None, branches: exact, ..config.clone() },
        HybridConfig { linear_norm: LinearNorm::Sum, branches: exact, cap: Some(5), ..config },
    ];
    for config in variants {
        let mut states = States::new(&Layer { config, ..plain.clone() }, 2, 330, DType::F32);
        states.feed(&[vec![150, 200]], "read");
        states.feed(&singles(2, 130), "decoded");
    }
}

#[test]
fn a_copy_goes_its_own_way() {
    let mut states = States::new(&layer(SHAPES[0]), 1, 400, DType::F32);
    states.feed(&[vec![190]], "read");
    let (cpu, gpu) = (states.cpu.clone(), states.gpu.clone());
    states.feed(&singles(1, 75), "the original");
    (states.cpu, states.gpu, states.positions) = (cpu, gpu, vec![190]);
    // Other tokens than the original was fed.
    states.sequences.q = states.sequences.q.affine(0.7, 0.1).unwrap();
    states.sequences.k = states.sequences.k.affine(0.7, 0.1).unwrap();
    states.feed(&singles(1, 140), "the copy");
}

/// What a graph would replay: positions from the device, counted by the caller.
#[test]
fn single_steps_equal_advance() {
    let batch = 2;
    let mut states = States::new(&layer(SHAPES[2]), batch, 300, DType::BF16);
    states.feed(&[vec![100, 120]], "read");
    let mut copy = states.gpu.clone();
    copy.reserve(200).unwrap();
    assert_eq!((copy.moves(), states.gpu.moves()), (1, 0));
    for _ in 0..40 {
        let rows = states.sequences.rows(&states.positions, &[1, 1]);
        let there =
            |x: &Tensor| x.to_device(&states.device).unwrap().to_dtype(DType::BF16).unwrap();
        let [q, k, v] = rows.each_ref().map(there);
        let positions: Vec<u32> = states.positions.iter().map(|&p| p as u32).collect();
        let positions = Tensor::from_vec(positions, batch, &states.device).unwrap();
        let rows = AttentionRows { q: &q, k: &k, v: &v, gate: None };
        // SAFETY: they are where the copy's sequences are, and there is room up to 200.
        let stepped = unsafe { copy.step(rows, &positions) }.unwrap();
        copy.count();
        let advanced = states.gpu.advance(&q, &k, &v, None).unwrap();
        assert_eq!(flat(&stepped), flat(&advanced));
        states.positions.iter_mut().for_each(|position| *position += 1);
    }
    assert_eq!((copy.position(0), copy.position(1)), (140, 160));
}

/// Queries and keys that go through RoPE on their way, and keys into the ring so, against rows that were rotated before.
#[test]
fn steps_that_rotate() {
    let formats = [
        (DType::F32, RowDtype::F32),
        (DType::BF16, RowDtype::Bf16),
        (DType::BF16, RowDtype::Int8),
        (DType::BF16, RowDtype::Int4),
    ];
    let cases =
        [(SHAPES[0], 64), (SHAPES[2], 128), (SHAPES[4], 64), (SHAPES[6], 80), (SHAPES[5], 16)];
    let wide =
        formats[1..].iter().map(|&f| (f, ((4, 2, 256, [4, 64].as_slice(), LinearNorm::Mean), 256)));
    let all = formats.into_iter().flat_map(|f| cases.map(|case| (f, case)));
    for (format, (shape, rotary)) in all.chain(wide) {
        let (dtype, rows) = format;
        let own = if rows.is_coded() { scaled(layer(shape)) } else { layer(shape) };
        let (device, batch) = (gpu(), 2);
        let x = Sequences::rounded(&own, batch, 300, dtype, DType::BF16);
        let weights =
            CudaWeights::new(own.geometry, &own.config, &x.weights, &device, dtype).unwrap();
        let empty = || CudaHybridState::with_rows(weights.clone(), batch, rows).unwrap();
        let (mut before, mut inside) = (empty(), empty());
        for state in [&mut before, &mut inside] {
            let there = |x: Tensor| x.to_device(&device).unwrap().to_dtype(dtype).unwrap();
            let [q, k, v] = x.rows(&[0, 0], &[185, 120]).map(there);
            state.advance(&q, &k, &v, Some(&[185, 120])).unwrap();
            state.reserve(300).unwrap();
        }
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        for _ in 0..80 {
            let positions = [before.position(0), before.position(1)];
            let there = |x: Tensor| x.to_device(&device).unwrap().to_dtype(dtype).unwrap();
            let [q, k, v] = x.rows(&positions, &[1, 1]).map(there);
            let angle = |position: usize, i: usize| {
                position as f64 * 1e4_f64.powf(-2.0 * i as f64 / rotary as f64)
            };
            let both = |f: fn(f64) -> f64| {
                let all = positions
                    .iter()
                    .flat_map(|&p| (0..rotary / 2).map(move |i| f(angle(p, i)) as f32));
                let all: Vec<f32> = all.collect();
                Tensor::from_vec(all, (batch, 1, 1, rotary / 2), &device).unwrap()
            };
            let (cos, sin) = (both(f64::cos), both(f64::sin));
            let rotated = |x: &Tensor| {
                let wide = x.to_dtype(DType::F32).unwrap();
                let part = |from, length| wide.narrow(3, from, length).unwrap();
                let half = rotary / 2;
                let (low, high) = (part(0, half), part(half, half));
                let times = |x: &Tensor, y: &Tensor| x.broadcast_mul(y).unwrap();
                let new_low = (times(&low, &cos) - times(&high, &sin)).unwrap();
                let new_high = (times(&high, &cos) + times(&low, &sin)).unwrap();
                let mut parts = vec![new_low, new_high];
                if rotary < own.geometry.head_dim {
                    parts.push(part(rotary, own.geometry.head_dim - rotary));
                }
                Tensor::cat(&parts, 3).unwrap().to_dtype(dtype).unwrap()
            };
            let own_positions = positions.map(|p| p as u32).to_vec();
            let own_positions = Tensor::from_vec(own_positions, batch, &device).unwrap();
            let raw = AttentionRows { q: &q, k: &k, v: &v, gate: None };
            let rotation = Some(StepRotation { cos: &cos, sin: &sin });
            assert!(inside.rotates(rotary));
            // SAFETY: the positions are the sequences' own, and there is room.
            let out = unsafe {
                GraphStep::step(&inside, raw, &own_positions, rotation, &StepMemory::default())
            };
            let out = out.unwrap();
            inside.count();
            got.extend(flat(&out));
            expected.extend(flat(&before.advance(&rotated(&q), &rotated(&k), &v, None).unwrap()));
        }
        // A value may be rounded the other way; so may a code.
        let limit = if dtype == DType::BF16 { 3e-3 } else { 1e-5 };
        let error = relative_rms(&got, &expected);
        println!("{error:.1e} {dtype:?} {rows:?} {shape:?} rotated {rotary}");
        assert!(error <= limit, "{dtype:?} {rows:?} {shape:?}, {rotary} rotated: {error:e}");
    }
}

#[test]
fn what_a_state_does_not_take_is_named() {
    let Layer { geometry, config } = layer((4, 2, 64, &[4, 4], LinearNorm::Mean));
    let device = gpu();
    let made = |geometry: HeadGeometry, config: HybridConfig, dtype, device: &Device| {
        let own = Layer { geometry, config };
        let x = Sequences::new(&own, 1, 3, DType::F32);
        CudaWeights::new(geometry, &own.config, &x.weights, device, dtype)
    };
    let large = HybridConfig { router: Router::SelfRecall, cap: Some(9000), ..config.clone() };
    let error = made(geometry, large, DType::F32, &device).unwrap_err().to_string();
    assert!(error.contains("cap"), "{error}");
    let wide = HeadGeometry { num_heads: 34, ..geometry };
    let error = made(wide, config.clone(), DType::F32, &device).unwrap_err().to_string();
    assert!(error.contains("16 query heads"), "{error}");
    let error = made(geometry, config.clone(), DType::F16, &device).unwrap_err().to_string();
    assert!(error.contains("f16"), "{error}");
    assert!(made(geometry, config.clone(), DType::F32, &Device::Cpu).is_err());

    let weights = made(geometry, config.clone(), DType::F32, &device).unwrap();
    assert!(CudaHybridState::new(weights.clone(), 0).is_err());
    let mut state = CudaHybridState::new(weights, 1).unwrap();
    let x = Sequences::new(&Layer { geometry, config }, 1, 3, DType::F32);
    let there = |x: &Tensor, dtype| x.to_device(&device).unwrap().to_dtype(dtype).unwrap();
    let wrong = [&x.q, &x.k, &x.v].map(|x| there(x, DType::BF16));
    let error = state.advance(&wrong[0], &wrong[1], &wrong[2], None).unwrap_err().to_string();
    assert!(error.contains("the rows are f32"), "{error}");
    assert!(state.advance(&x.q, &x.k, &x.v, None).is_err());
    let right = [&x.q, &x.k, &x.v].map(|x| there(x, DType::F32));
    assert!(state.advance(&right[0], &right[1], &right[2], Some(&[4])).is_err());
    assert!(state.advance(&right[0], &right[1], &right[0], None).is_err());
    assert_eq!(state.position(0), 0);
    state.advance(&right[0], &right[1], &right[2], None).unwrap();
    assert_eq!(state.position(0), 3);
}

/// Calls to the dense caches of both sides.
fn compare_dense(shape: Shape, batch: usize, dtype: DType, calls: &[Vec<usize>]) {
    let own = layer(shape);
    let tokens = (0..batch).map(|b| calls.iter().map(|call| call[b]).sum::<usize>()).max();
    let sequences = Sequences::new(&own, batch, tokens.unwrap(), dtype);
    let device = gpu();
    let mut cpu = KvCache::new(own.geometry, batch, RowDtype::F32);
    let mut gpu = CudaKvCache::new(own.geometry, batch, &device, dtype).unwrap();
    // A copy that goes on alone must not disturb it.
    let mut copies = Vec::new();
    let mut positions = vec![0; batch];
    sequences.compare(
        &device,
        &mut positions,
        calls,
        |[q, k, v], lengths| cpu.advance(q, k, v, lengths).unwrap(),
        |[q, k, v], lengths| {
            let mut copy = gpu.clone();
            let out = gpu.advance(q, k, v, lengths).unwrap();
            copy.advance(&q.affine(2.0, 1.0).unwrap(), &v.affine(2.0, 1.0).unwrap(), k, lengths)
                .unwrap();
            copies.push(copy);
            out
        },
        &format!("dense {dtype:?} {:?}", own.geometry),
    );
    for (sequence, &position) in positions.iter().enumerate() {
        assert_eq!((gpu.position(sequence), cpu.position(sequence)), (position, position));
    }
}

#[test]
fn the_dense_cache() {
    for dtype in [DType::F32, DType::BF16] {
        for shape in SHAPES {
            compare_dense(shape, 1, dtype, &[65, 1, 1, 30, 1].map(|n| vec![n]));
        }
    }
}

#[test]
fn the_dense_cache_of_uneven_sequences() {
    for dtype in [DType::F32, DType::BF16] {
        let calls = [vec![70, 0, 3], vec![1, 1, 1], vec![0, 1, 4], vec![1; 3], vec![5; 3]];
        compare_dense(SHAPES[4], 3, dtype, &calls);
    }
}

/// More query rows than are answered together, and more keys than there was room for.
#[test]
fn the_dense_cache_grows() {
    compare_dense(SHAPES[0], 1, DType::F32, &[vec![100], vec![1200], vec![1]]);
    compare_dense(SHAPES[2], 2, DType::BF16, &[vec![100, 40], vec![600, 1100], vec![1; 2]]);
}
