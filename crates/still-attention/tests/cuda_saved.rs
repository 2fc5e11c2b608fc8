//! A state on a CUDA GPU that is saved, restored there or on the CPU, or cut back goes on as if nothing had happened.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it.

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use common::{flat, random_input, relative_rms, some_exponents, tensors};
use half::bf16;
use still_attention::{
    AttentionRows, AttentionState, Branches, CudaHybridState, CudaKvCache, CudaLinearState,
    CudaWeights, HeadGeometry, HybridConfig, HybridState, KvCache, Mode, PreparedWeights, Router,
    RowDtype, SavedState, StillConfig,
};

const BATCH: usize = 2;
const TOKENS: usize = 480;

fn gpu() -> Device {
    let device = Device::new_cuda(0);
    let device = device.unwrap_or_else(|error| panic!("these tests need a CUDA GPU: {error}"));
    // What is allocated next is likely to lie here: whatever is not written then shows.
    drop(Tensor::full(f32::NAN, 1 << 22, &device).unwrap());
    device
}

type Empty = Box<dyn Fn() -> Box<dyn AttentionState>>;

/// The empty state of a layer on either device, and rows to feed.
struct Case {
    name: String,
    dtype: DType,
    device: Device,
    on_cpu: Empty,
    on_gpu: Empty,
    /// Of values that bf16 holds exactly, f32 on the CPU.
    rows: [Tensor; 3],
}

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 6, num_key_value_heads: 3, head_dim: 96 };

fn config(change: impl Fn(&mut HybridConfig)) -> HybridConfig {
    let mut config = StillConfig::uniform(1, GEOMETRY, 64, 0).layer(0).unwrap();
    config.budgets = vec![4, 64, 0];
    change(&mut config);
    config
}

/// What a state's activations and rows may be.
const FORMATS: [(DType, RowDtype); 4] = [
    (DType::F32, RowDtype::F32),
    (DType::BF16, RowDtype::Bf16),
    (DType::BF16, RowDtype::Int8),
    (DType::BF16, RowDtype::Int4),
];

fn hybrid(name: &str, (dtype, rows): (DType, RowDtype), config: HybridConfig) -> Case {
    let device = gpu();
    let round = |x: f64| bf16::from_f64(x).to_f32();
    let one = |seed| tensors(&random_input(GEOMETRY, &config, TOKENS, seed), &config, round);
    let all = [one(7), one(8)];
    let stack = |part: fn(&common::Tensors) -> &Tensor| {
        Tensor::cat(&[part(&all[0]), part(&all[1])], 0).unwrap()
    };
    let weights = all[0].weights.clone();
    let prepared = PreparedWeights::new(GEOMETRY, &config, &weights).unwrap();
    let on_gpu: Empty = match config.mode {
        Mode::LinearOnly => {
            let (config, device) = (config.clone(), device.clone());
            Box::new(move || {
                let state =
                    CudaLinearState::new(GEOMETRY, &config, &weights, &device, dtype, BATCH);
                Box::new(state.unwrap().with_rows(rows))
            })
        }
        Mode::Hybrid => {
            let weights = CudaWeights::new(GEOMETRY, &config, &weights, &device, dtype).unwrap();
            Box::new(move || {
                Box::new(CudaHybridState::with_rows(weights.clone(), BATCH, rows).unwrap())
            })
        }
    };
    Case {
        name: format!("{name}, {dtype:?}, {rows:?}"),
        dtype,
        device,
        on_cpu: Box::new(move || Box::new(HybridState::new(prepared.clone(), BATCH, rows))),
        on_gpu,
        rows: [stack(|x| &x.q), stack(|x| &x.k), stack(|x| &x.v)],
    }
}

fn dense((dtype, rows): (DType, RowDtype)) -> Case {
    let device = gpu();
    let case = hybrid("", (dtype, rows), config(|_| {}));
    let there = device.clone();
    Case {
        name: format!("dense, {dtype:?}, {rows:?}"),
        on_cpu: Box::new(move || Box::new(KvCache::new(GEOMETRY, BATCH, rows))),
        on_gpu: Box::new(move || {
            Box::new(CudaKvCache::with_rows(GEOMETRY, BATCH, &there, dtype, rows).unwrap())
        }),
        device,
        ..case
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for format in FORMATS {
        cases.push(hybrid("hybrid", format, config(|_| {})));
        cases.push(hybrid("under a cap", format, config(|config| config.cap = Some(9))));
        cases.push(hybrid("a cap not reached", format, config(|config| config.cap = Some(900))));
    }
    for format in [FORMATS[2], FORMATS[3]] {
        let scale = |config: &mut HybridConfig| config.key_exponents = some_exponents(GEOMETRY);
        cases.push(hybrid("scaled keys", format, config(scale)));
    }
    let format = FORMATS[0];
    let exact = Branches { linear: false, ..Branches::default() };
    cases.push(hybrid("without the state", format, config(|config| config.branches = exact)));
    for router in [Router::ReceivedAttention, Router::SelfRecall, Router::FirstTokens] {
        let name = format!("{router:?}");
        cases.push(hybrid(&name, format, config(|config| config.router = router)));
    }
    let linear = StillConfig::linear_only(1, GEOMETRY, 64).layer(0).unwrap();
    cases.push(hybrid("linear alone", FORMATS[0], linear.clone()));
    cases.push(hybrid("linear alone", FORMATS[1], linear));
    // Dense attention has int4 rows in f32 alone.
    cases.extend(FORMATS[..3].iter().copied().map(dense));
    cases.push(dense((DType::F32, RowDtype::Int4)));
    cases
}

impl Case {
    /// Feeds each sequence its tokens from its position on until `ends`: all but the last few in one piece, those one by one. What
    /// the tokens of both were answered, one after the other.
    fn feed(
        &self,
        state: &mut dyn AttentionState,
        ends: [usize; BATCH],
        singles: usize,
    ) -> Vec<f64> {
        let on_gpu = !matches!(state.location(), candle_core::DeviceLocation::Cpu);
        let mut answers = [Vec::new(), Vec::new()];
        let left = |state: &dyn AttentionState| [0, 1].map(|b| ends[b] - state.position(b));
        let mut call = |state: &mut dyn AttentionState, lengths: [usize; BATCH]| {
            let longest = lengths.into_iter().max().unwrap();
            let row = |x: &Tensor| {
                let own = |b: usize| {
                    // Padding is what must not be looked at.
                    let start = state.position(b);
                    let there = longest.min(TOKENS - start);
                    let own = x.narrow(0, b, 1).unwrap().narrow(2, start, there).unwrap();
                    own.pad_with_zeros(2, 0, longest - there).unwrap()
                };
                let x = Tensor::cat(&[own(0), own(1)], 0).unwrap();
                if on_gpu {
                    x.to_device(&self.device).unwrap().to_dtype(self.dtype).unwrap()
                } else {
                    x
                }
            };
            let [q, k, v] = self.rows.each_ref().map(row);
            let rows = AttentionRows { q: &q, k: &k, v: &v, gate: None };
            let out = state.advance(rows, Some(&lengths)).unwrap();
            for (b, answers) in answers.iter_mut().enumerate().filter(|&(b, _)| lengths[b] > 0) {
                let own = out.narrow(0, b, 1).unwrap().narrow(2, 0, lengths[b]).unwrap();
                answers.extend(flat(&own.transpose(1, 2).unwrap()));
            }
        };
        let first = left(state).map(|left| left.saturating_sub(singles));
        if first.iter().any(|&length| length > 0) {
            call(state, first);
        }
        while left(state).iter().any(|&left| left > 0) {
            let lengths = left(state).map(|left| left.min(1));
            call(state, lengths);
        }
        answers.concat()
    }

    fn restored(&self, empty: &Empty, saved: &SavedState) -> Box<dyn AttentionState> {
        let mut state = empty();
        state.restore(saved.clone()).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        state
    }

    /// What outputs on two devices may differ by.
    fn limit(&self) -> f64 {
        if self.dtype == DType::BF16 { 5e-3 } else { 1e-5 }
    }
}

/// Dtypes, shapes and values by name. Nothing that is saved is NaN.
fn contents(saved: SavedState) -> BTreeMap<String, (DType, Vec<usize>, Vec<f64>)> {
    let one = |x: Tensor| {
        let values = if x.elem_count() == 0 { Vec::new() } else { flat(&x) };
        (x.dtype(), x.dims().to_vec(), values)
    };
    saved.into_tensors().into_iter().map(|(name, x)| (name, one(x))).collect()
}

fn assert_same(got: SavedState, expected: &SavedState, case: &str) {
    let (got, expected) = (contents(got), contents(expected.clone()));
    assert_eq!(got.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{case}");
    for (name, tensor) in &got {
        assert!(tensor == &expected[name], "{case}: {name} differs");
    }
}

/// Positions before, at and behind the borders of chunks, and how much more is fed.
const ENDS: [[usize; BATCH]; 6] = [[0, 0], [1, 70], [128, 65], [129, 192], [193, 0], [321, 250]];
const MORE: usize = 150;

/// What was saved on the GPU is the same state there, and on the CPU.
#[test]
fn a_state_of_the_gpu_opens_on_either_device() {
    for case in cases() {
        for ends in ENDS {
            let what = format!("{}, saved after {ends:?}", case.name);
            let mut state = (case.on_gpu)();
            case.feed(&mut *state, ends, 40);
            let saved = state.save().unwrap();
            let mut back = case.restored(&case.on_gpu, &saved);
            let mut on_cpu = case.restored(&case.on_cpu, &saved);
            for state in [&back, &on_cpu] {
                assert_eq!([0, 1].map(|b| state.position(b)), ends, "{what}");
                assert_same(state.save().unwrap(), &saved, &what);
            }
            let ends = ends.map(|end| end + MORE);
            let expected = case.feed(&mut *state, ends, MORE);
            let got = case.feed(&mut *back, ends, MORE);
            assert!(
                got == expected,
                "{what}: restored on the GPU: {:e}",
                relative_rms(&got, &expected)
            );
            let error = relative_rms(&case.feed(&mut *on_cpu, ends, MORE), &expected);
            println!("{error:.1e} {what}");
            assert!(error <= case.limit(), "{what}: restored on the CPU: relative RMS {error:e}");
        }
    }
}

/// What was saved on the CPU goes on on the GPU, in pieces and one by one.
#[test]
fn a_state_of_the_cpu_opens_on_the_gpu() {
    for case in cases() {
        for ends in ENDS {
            let what = format!("{}, saved after {ends:?}", case.name);
            let mut state = (case.on_cpu)();
            case.feed(&mut *state, ends, 40);
            let saved = state.save().unwrap();
            let mut there = case.restored(&case.on_gpu, &saved);
            let again = there.save().unwrap();
            // A ring's rows that no token has any more are zeros on the way back.
            let mut back = case.restored(&case.on_cpu, &again);
            let ends = ends.map(|end| end + MORE);
            let expected = case.feed(&mut *state, ends, 30);
            let error = relative_rms(&case.feed(&mut *back, ends, 30), &expected);
            assert!(error <= 1e-6, "{what}: there and back: relative RMS {error:e}");
            let error = relative_rms(&case.feed(&mut *there, ends, 30), &expected);
            println!("{error:.1e} {what}");
            assert!(error <= case.limit(), "{what}: relative RMS {error:e}");
        }
    }
}

/// A state that went back is the one that never went further. Others than it may have been where it was restored to.
#[test]
fn a_state_goes_back_within_the_chunk_of_its_last_token() {
    for case in cases() {
        let any = case.name.starts_with("dense");
        let none = case.name.starts_with("linear") || case.name.starts_with("Received");
        for (from, to) in [(200, 193), (193, 193), (256, 200), (60, 1), (330, 321), (300, 0)] {
            if none && to > 0 && to < from {
                let mut state = (case.on_gpu)();
                case.feed(&mut *state, [from, 77], 3);
                let error = state.truncate(0, to).unwrap_err().to_string();
                assert!(error.contains("have changed what it remembers"), "{error}");
                continue;
            }
            let what = format!("{}, {from} to {to}", case.name);
            let mut state = (case.on_gpu)();
            case.feed(&mut *state, [from, 77], 9);
            state.truncate(0, to).unwrap();
            assert_eq!([0, 1].map(|b| state.position(b)), [to, 77]);
            let mut fresh = (case.on_gpu)();
            case.feed(&mut *fresh, [to, 77], 9);
            // One by one, and, of the first sequence, in a piece too.
            for singles in [70, 20] {
                let ends = [to + 150 - singles, 77 + 150 - singles];
                let got = case.feed(&mut *state, ends, singles);
                let error = relative_rms(&got, &case.feed(&mut *fresh, ends, singles));
                assert!(error <= case.limit(), "{what}: relative RMS {error:e}");
            }
        }
        let mut state = (case.on_gpu)();
        case.feed(&mut *state, [200, 77], 9);
        let error = state.truncate(1, 78).unwrap_err().to_string();
        assert!(error.contains("it has 77"), "{error}");
        match state.truncate(0, 192) {
            Ok(()) => assert!(any),
            Err(_) if none => {}
            Err(error) => assert!(error.to_string().contains("it can go back to 193"), "{error}"),
        }
        assert_eq!(state.position(0), if any { 192 } else { 200 });
    }
}

/// A smaller state takes the place of a larger one, and nothing of that shows.
#[test]
fn a_state_that_was_elsewhere_is_restored() {
    for case in cases() {
        let mut state = (case.on_gpu)();
        case.feed(&mut *state, [70, 130], 40);
        let saved = state.save().unwrap();
        let mut other = (case.on_gpu)();
        case.feed(&mut *other, [300, 200], 40);
        other.restore(saved.clone()).unwrap();
        assert_same(other.save().unwrap(), &saved, &case.name);
        let ends = [70 + MORE, 130 + MORE];
        let expected = case.feed(&mut *state, ends, MORE);
        assert!(case.feed(&mut *other, ends, MORE) == expected, "{}", case.name);
    }
}

#[test]
fn a_state_of_another_format_or_model_is_refused() {
    let fed = |case: &Case| {
        let mut state = (case.on_gpu)();
        case.feed(&mut *state, [200, 200], 0);
        state.save().unwrap()
    };
    let case = hybrid("", FORMATS[1], config(|_| {}));
    let refused = |saved: SavedState, word: &str| {
        let error = (case.on_gpu)().restore(saved).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    let int8 = hybrid("", FORMATS[2], config(|_| {}));
    refused(fed(&int8), "salient_k\" is in u8, and this state's in bf16");
    let f32 = hybrid("", FORMATS[0], config(|_| {}));
    refused(fed(&f32), "ring_k\" is in f32, and this state's in bf16");
    let other = hybrid("", FORMATS[1], config(|config| config.budgets = vec![5, 64, 0]));
    refused(fed(&other), "part 0 keeps 10 salient tokens, and this state's would keep 8");
    refused(fed(&dense(FORMATS[1])), "no tensor \"0.position\"");
    let mut extra = fed(&case);
    extra.insert("9.k".into(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());
    refused(extra, "no place for");
}
