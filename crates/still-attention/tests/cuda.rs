//! The operator on a CUDA GPU against the float64 oracle's cases, the naive twin and the CPU's gradients.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it. It runs on a machine without
//! Rust or the checkout, with the oracle's cases in a folder `data` beside it.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::case::load;
use common::gpu::{Report, gpu, gradients, placed, round, run, sequence};
use common::{Tensors, assert_same_selection, flat, normal, random_input, relative_rms, tensors};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use still_attention::{
    Branches, FeatureMap, HeadGeometry, HybridConfig, LinearNorm, Router, Routing, SelectionHead,
    StillConfig, dense_attention, hybrid_attention, naive,
};

/// Query heads, KV heads, head dimension, tokens, budgets and scale: groups of 1, 3, 4 and 8.
type Shape = (usize, usize, usize, usize, &'static [usize], LinearNorm);
const SHAPES: [Shape; 14] = [
    (1, 1, 64, 1, &[4], LinearNorm::Sum),
    (8, 1, 128, 1, &[0], LinearNorm::Mean),
    (2, 2, 96, 64, &[4, 0], LinearNorm::Mean),
    (3, 1, 128, 65, &[64], LinearNorm::Mean),
    (4, 1, 128, 129, &[4], LinearNorm::Sum),
    (8, 1, 96, 200, &[5], LinearNorm::Sum),
    (4, 4, 64, 257, &[4, 0, 64, 7], LinearNorm::Mean),
    (16, 2, 64, 193, &[0, 64], LinearNorm::Mean),
    (6, 2, 96, 321, &[64, 3], LinearNorm::Mean),
    (8, 2, 128, 333, &[4, 11], LinearNorm::Mean),
    (9, 3, 64, 451, &[4, 64, 0], LinearNorm::Mean),
    (3, 3, 128, 384, &[0, 9, 1], LinearNorm::Sum),
    (4, 2, 80, 321, &[4, 64], LinearNorm::Mean),
    (8, 1, 80, 257, &[5], LinearNorm::Sum),
];

/// The same with a cap: below a budget and of 0, reached by some heads and by none, of full heads, of many chunks.
const CAPPED: [(Shape, usize); 10] = [
    ((2, 2, 96, 130, &[4, 64], LinearNorm::Mean), 2),
    ((4, 4, 64, 257, &[4, 0, 64, 7], LinearNorm::Mean), 9),
    ((8, 2, 128, 333, &[4, 11], LinearNorm::Mean), 0),
    ((8, 1, 96, 400, &[5], LinearNorm::Sum), 1),
    ((6, 2, 96, 450, &[64, 3], LinearNorm::Mean), 100),
    ((8, 2, 128, 577, &[4, 11], LinearNorm::Mean), 20),
    ((3, 1, 128, 700, &[6], LinearNorm::Mean), 7),
    ((9, 3, 64, 451, &[4, 64, 0], LinearNorm::Sum), 64),
    ((4, 2, 64, 333, &[4, 2], LinearNorm::Mean), 1000),
    ((6, 2, 80, 450, &[64, 3], LinearNorm::Mean), 40),
];

fn capped((shape, cap): (Shape, usize)) -> (HeadGeometry, HybridConfig) {
    let (geometry, config) = layer(shape);
    (geometry, HybridConfig { cap: Some(cap), ..config })
}

fn layer(shape: Shape) -> (HeadGeometry, HybridConfig) {
    let (num_heads, num_key_value_heads, head_dim, _, budgets, linear_norm) = shape;
    let geometry = HeadGeometry { num_heads, num_key_value_heads, head_dim };
    let config = StillConfig::uniform(1, geometry, 64, 0).layer(0).unwrap();
    (geometry, HybridConfig { budgets: budgets.to_vec(), linear_norm, ..config })
}

/// What a float type may differ from float64: of the output, of gradients. f32 kernels multiply 16 of a value's bits, and a gradient
/// goes through more products than an output does.
fn limits(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::BF16 => (5e-3, 1e-2),
        _ => (1e-5, 3e-5),
    }
}

fn assert_scores(routing: &Routing, expected: &[f64], case: &str) {
    let got = routing.scores().unwrap();
    assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - expected).abs();
        // As precise as the outputs are: 1e-5 of a score's own size.
        assert!(
            error <= 1e-4 + 2e-5 * expected.abs(),
            "{case}: score {i} is {got}, expected {expected}"
        );
    }
}

fn check_forward(
    report: &mut Report,
    geometry: HeadGeometry,
    config: &HybridConfig,
    tokens: usize,
    dtype: DType,
) {
    let case = format!("{dtype:?} {geometry:?} {tokens} tokens, {config:?}");
    let input = sequence(geometry, config, tokens, 11, dtype);
    let twin = naive::hybrid_attention(&input, config, None);
    let x = placed(&input, config, dtype, &gpu());
    let (own, routing) = run(&x, config, None);
    assert_scores(&routing, &twin.score, &case);
    let selection = routing.selection().unwrap();
    assert_same_selection(&selection, &twin.selection, &twin.score);
    let same = naive::hybrid_attention(&input, config, Some(&selection));
    let (given, again) = run(&x, config, Some(&twin.selection.clone().into()));
    assert_eq!(*again.selection().unwrap(), twin.selection, "{case}");
    for (what, got, expected) in [("own", &own, &same.out), ("given", &given, &twin.out)] {
        let error = relative_rms(got, expected);
        report.add(format!("{what} selection, {case}"), error, limits(dtype).0);
    }
}

fn check_gradients(
    report: &mut Report,
    geometry: HeadGeometry,
    config: &HybridConfig,
    tokens: usize,
    dtype: DType,
) {
    let case = format!("{dtype:?} {geometry:?} {tokens} tokens, {config:?}");
    let input = sequence(geometry, config, tokens, 12, dtype);
    let x = placed(&input, config, dtype, &gpu());
    let selection = naive::hybrid_attention(&input, config, None).selection;
    // The order in which tokens enter the state is another where the device has decided.
    let routings = match config.cap {
        None => vec![selection.into()],
        Some(_) => vec![selection.into(), run(&x, config, None).1],
    };
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let mut cotangent = normal(&mut rng, input.q.len(), 1.0);
    round(&mut cotangent);
    for routing in &routings {
        let selection = (*routing.selection().unwrap()).clone().into();
        let expected = gradients(&tensors(&input, config, |x| x), config, &selection, &cotangent);
        let got = gradients(&x, config, routing, &cotangent);
        for ((name, got), (_, expected)) in got.iter().zip(&expected) {
            // Of a lone token, say, q has no gradient: rounding is compared with nothing.
            let none = expected.iter().all(|g| g.abs() < 1e-12);
            let size = (got.iter().map(|g| g * g).sum::<f64>() / got.len() as f64).sqrt();
            let error = if none { size } else { relative_rms(got, expected) };
            report.add(format!("gradient of {name}, {case}"), error, limits(dtype).1);
        }
    }
}

#[test]
fn forward_and_selection_in_f32() {
    let mut report = Report::default();
    for shape in SHAPES {
        let (geometry, config) = layer(shape);
        check_forward(&mut report, geometry, &config, shape.3, DType::F32);
    }
    report.finish();
}

#[test]
fn forward_and_selection_in_bf16() {
    let mut report = Report::default();
    for shape in SHAPES {
        let (geometry, config) = layer(shape);
        check_forward(&mut report, geometry, &config, shape.3, DType::BF16);
    }
    report.finish();
}

#[test]
fn gradients_in_f32() {
    let mut report = Report::default();
    for shape in SHAPES {
        let (geometry, config) = layer(shape);
        check_gradients(&mut report, geometry, &config, shape.3, DType::F32);
    }
    report.finish();
}

#[test]
fn gradients_in_bf16() {
    let mut report = Report::default();
    for shape in SHAPES {
        let (geometry, config) = layer(shape);
        check_gradients(&mut report, geometry, &config, shape.3, DType::BF16);
    }
    report.finish();
}

#[test]
fn a_cap_in_f32() {
    let mut report = Report::default();
    for case in CAPPED {
        let (geometry, config) = capped(case);
        check_forward(&mut report, geometry, &config, case.0.3, DType::F32);
        check_gradients(&mut report, geometry, &config, case.0.3, DType::F32);
    }
    report.finish();
}

#[test]
fn a_cap_in_bf16() {
    let mut report = Report::default();
    for case in CAPPED {
        let (geometry, config) = capped(case);
        check_forward(&mut report, geometry, &config, case.0.3, DType::BF16);
        check_gradients(&mut report, geometry, &config, case.0.3, DType::BF16);
    }
    report.finish();
}

/// They have kernels in bf16, without gradients.
#[test]
fn heads_of_256_channels() {
    const WIDE: [Shape; 5] = [
        (1, 1, 256, 1, &[4], LinearNorm::Sum),
        (4, 2, 256, 321, &[4, 64], LinearNorm::Mean),
        (3, 1, 256, 200, &[5], LinearNorm::Sum),
        (8, 1, 256, 129, &[0], LinearNorm::Mean),
        (6, 3, 256, 451, &[64, 3, 11], LinearNorm::Mean),
    ];
    let mut report = Report::default();
    for shape in WIDE {
        let (geometry, config) = layer(shape);
        check_forward(&mut report, geometry, &config, shape.3, DType::BF16);
    }
    let (geometry, config) = capped((WIDE[4], 40));
    check_forward(&mut report, geometry, &config, 451, DType::BF16);
    let received = HybridConfig { router: Router::ReceivedAttention, ..config };
    check_forward(&mut report, geometry, &received, 451, DType::BF16);
    report.finish();

    let (geometry, config) = layer(WIDE[1]);
    let refused = |dtype, config: &HybridConfig, trains: bool| {
        let x = placed(&sequence(geometry, config, 65, 11, dtype), config, dtype, &gpu());
        let q = if trains { Var::from_tensor(&x.q).unwrap().as_tensor().clone() } else { x.q };
        let error = hybrid_attention(&q, &x.k, &x.v, &x.weights, None, config, None).unwrap_err();
        assert!(error.to_string().contains("at most 128"), "{error}");
    };
    refused(DType::F32, &config, false);
    refused(DType::BF16, &config, true);
    refused(DType::BF16, &HybridConfig { router: Router::SelfRecall, ..config }, false);
}

/// What is kept is more than shared memory holds.
#[test]
fn a_large_cap_in_f32() {
    let mut report = Report::default();
    let case = ((2, 1, 64, 8900, [64].as_slice(), LinearNorm::Mean), 8300);
    let (geometry, config) = capped(case);
    let input = sequence(geometry, &config, case.0.3, 11, DType::F32);
    let (out, routing) = run(&placed(&input, &config, DType::F32, &gpu()), &config, None);
    let selection = routing.selection().unwrap();
    let twin = naive::hybrid_attention(&input, &config, None);
    assert_same_selection(&selection, &twin.selection, &twin.score);
    let expected = naive::hybrid_attention(&input, &config, Some(&selection)).out;
    report.add("a large cap".into(), relative_rms(&out, &expected), 1e-5);
    report.finish();
}

/// Equal scores everywhere: what stays is the earliest.
#[test]
fn ties_under_a_cap_go_to_the_earlier() {
    let (geometry, config) = capped(((2, 2, 64, 300, &[3, 64], LinearNorm::Mean), 5));
    let mut input = sequence(geometry, &config, 300, 14, DType::F32);
    input.q.fill(0.0);
    let (_, routing) = run(&placed(&input, &config, DType::F32, &gpu()), &config, None);
    let selection = routing.selection().unwrap();
    let kept = |head: usize| {
        let stays = |&token: &usize| selection.is_salient(0, head, 4, token);
        (0..300).filter(stays).collect::<Vec<_>>()
    };
    // The first tokens see fewer keys than the others: they stand out. From token 63 on all scores are equal.
    assert_eq!((kept(0), kept(1)), (vec![0, 1, 2, 64, 65], vec![0, 1, 2, 3, 4]));
}

#[test]
fn a_selection_that_does_not_fit_the_cap_is_named() {
    let (geometry, config) = capped(((2, 1, 64, 300, &[4], LinearNorm::Mean), 6));
    let input = sequence(geometry, &config, 300, 15, DType::F32);
    let x = placed(&input, &config, DType::F32, &gpu());
    let selection = naive::hybrid_attention(&input, &config, None).selection;
    let other = HybridConfig { cap: Some(5), ..config };
    for config in [other.clone(), HybridConfig { cap: None, ..other }] {
        let given = selection.clone().into();
        let error = hybrid_attention(&x.q, &x.k, &x.v, &x.weights, None, &config, Some(&given));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("another selection at head 0, chunk 1"), "{error}");
    }
}

/// What the kernels see in other clothes: reflections, a window factor, routers, a decision per query head.
#[test]
fn variants_in_f32() {
    let mut report = Report::default();
    let (geometry, config) = layer((4, 2, 64, 0, &[4, 0], LinearNorm::Mean));
    let exact = Branches { linear: false, ..Branches::default() };
    let variants = [
        HybridConfig { feature_map: FeatureMap::NpMap { householder: true }, ..config.clone() },
        HybridConfig { window_factor: true, ..config.clone() },
        HybridConfig { router: Router::None, ..config.clone() },
        HybridConfig { router: Router::Random { seed: 5 }, layer: 3, ..config.clone() },
        HybridConfig {
            selection_head: SelectionHead::QueryHead,
            budgets: vec![4, 0, 64, 2],
            ..config.clone()
        },
        HybridConfig {
            selection_head: SelectionHead::QueryHead,
            budgets: vec![4, 0, 64, 2],
            cap: Some(3),
            ..config.clone()
        },
        HybridConfig { router: Router::Random { seed: 5 }, cap: Some(5), ..config.clone() },
        HybridConfig { router: Router::None, branches: exact, ..config.clone() },
        HybridConfig { linear_norm: LinearNorm::Sum, branches: exact, cap: Some(5), ..config },
    ];
    for config in variants {
        check_forward(&mut report, geometry, &config, 210, DType::F32);
        check_gradients(&mut report, geometry, &config, 210, DType::F32);
    }
    report.finish();
}

#[test]
fn the_oracle_at_a_models_shape() {
    let case = load("smollm2_head_shape");
    let x = placed(&case.input, &case.config, DType::F32, &gpu());
    let (_, routing) = run(&x, &case.config, None);
    assert_scores(&routing, &case.score, "smollm2_head_shape");
    assert_same_selection(&routing.selection().unwrap(), &case.selection, &case.score);
    let (given, _) = run(&x, &case.config, Some(&case.selection.clone().into()));
    let error = relative_rms(&given, &case.out);
    println!("{error:.1e} given selection, smollm2_head_shape");
    assert!(error <= 1e-5, "relative RMS {error:e}");
}

/// The oracle's other cases have chunks of 4 and 8 tokens: no kernel, and no silence about it.
#[test]
fn the_oracles_other_cases_are_refused() {
    let device = gpu();
    for name in [
        "tiny_odd_length",
        "one_chunk",
        "gqa_ragged_budgets",
        "zero_budget_is_window_plus_linear",
        "full_budget_is_softmax",
        "gate",
        "mean_normalised",
        "capped_with_demotion",
        "query_head_routing",
        "one_token",
        "exactly_one_chunk",
        "exactly_two_chunks",
        "two_chunks_and_one",
        "exactly_five_chunks",
        "full_head_under_a_cap",
    ] {
        let case = load(name);
        let x = placed(&case.input, &case.config, DType::F32, &device);
        let gate = x.gate.as_ref();
        let error = hybrid_attention(&x.q, &x.k, &x.v, &x.weights, gate, &case.config, None);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("chunk is") && error.contains("expected 64"), "{name}: {error}");
    }
}

#[test]
fn what_has_no_kernel_is_named() {
    let shape = (4, 2, 64, 70, [4, 4].as_slice(), LinearNorm::Mean);
    let refused = |config: &HybridConfig, x: &Tensors, word: &str| {
        let gate = x.gate.as_ref();
        let error = hybrid_attention(&x.q, &x.k, &x.v, &x.weights, gate, config, None);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    };
    let (geometry, config) = layer((4, 2, 64, 70, &[4, 4], LinearNorm::Mean));
    let device = gpu();
    for (word, config) in [
        ("cap", HybridConfig { router: Router::SelfRecall, cap: Some(9000), ..config.clone() }),
        ("feature_dim", HybridConfig { feature_dim: 32, ..config.clone() }),
    ] {
        let input = random_input(geometry, &config, shape.3, 1);
        refused(&config, &placed(&input, &config, DType::F32, &device), word);
    }
    let input = random_input(geometry, &config, shape.3, 1);
    refused(&config, &placed(&input, &config, DType::F16, &device), "f16");
    let mut apart = placed(&input, &config, DType::F32, &device);
    apart.weights.feature_map_q = apart.weights.feature_map_q.to_device(&Device::Cpu).unwrap();
    refused(&config, &apart, "feature_map_q");
    let mut mixed = placed(&input, &config, DType::F32, &device);
    mixed.v = mixed.v.to_dtype(DType::BF16).unwrap();
    refused(&config, &mixed, "v is bf16");
    let wide = HeadGeometry { head_dim: 72, ..geometry };
    let config = HybridConfig { feature_dim: 72, ..config };
    let input = random_input(wide, &config, shape.3, 1);
    refused(&config, &placed(&input, &config, DType::F32, &device), "head_dim");
}

/// The same call, whatever is asked of it beside the output and however its rows lie.
#[test]
fn strides_gradients_and_given_routing_change_nothing() {
    for (dtype, cap) in
        [(DType::F32, None), (DType::BF16, None), (DType::F32, Some(7)), (DType::BF16, Some(7))]
    {
        let (geometry, config) = layer((6, 2, 96, 301, &[4, 0], LinearNorm::Mean));
        let config = HybridConfig { cap, ..config };
        let input = sequence(geometry, &config, 301, 21, dtype);
        let x = placed(&input, &config, dtype, &gpu());
        let (out, routing) = run(&x, &config, None);
        assert_eq!(run(&x, &config, None).0, out, "run twice");
        assert_eq!(run(&x, &config, Some(&routing)).0, out, "its own routing, on the device");

        // As a projection leaves them: [B, N, heads, D].
        let lie =
            |t: &Tensor| t.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
        // One value into a row that is one value too long: no row is aligned.
        let shifted = |t: &Tensor| {
            let wide = Tensor::cat(&[&t.narrow(3, 0, 1).unwrap(), t], 3).unwrap();
            wide.narrow(3, 1, t.dim(3).unwrap()).unwrap()
        };
        for moved in [&lie as &dyn Fn(&Tensor) -> Tensor, &shifted] {
            let (q, k, v) = (moved(&x.q), moved(&x.k), moved(&x.v));
            let moved = Tensors { q, k, v, gate: None, weights: x.weights.clone() };
            assert_eq!(run(&moved, &config, None).0, out, "rows elsewhere");
        }

        let tracked = Var::from_tensor(&x.q).unwrap();
        let with = hybrid_attention(&tracked, &x.k, &x.v, &x.weights, None, &config, None).unwrap();
        assert_eq!(flat(&with.out), out, "with a graph");
        // Only what is tracked has a gradient; a backward pass done twice gives what one gives.
        let loss = with.out.sqr().unwrap().sum_all().unwrap();
        let [first, second] = [loss.backward().unwrap(), loss.backward().unwrap()];
        assert!(first.get(&x.k).is_none() && first.get(&x.weights.feature_map_q).is_none());
        assert_eq!(flat(first.get(&tracked).unwrap()), flat(second.get(&tracked).unwrap()));
    }
}

#[test]
fn a_batch_equals_each_sequence_alone() {
    for (dtype, cap) in
        [(DType::F32, None), (DType::BF16, None), (DType::F32, Some(9)), (DType::BF16, Some(9))]
    {
        let (geometry, config) = layer((9, 3, 64, 333, &[4, 64, 0], LinearNorm::Mean));
        let config = HybridConfig { cap, ..config };
        let device = gpu();
        let alone = [31, 32, 33].map(|seed| {
            placed(&sequence(geometry, &config, 333, seed, dtype), &config, dtype, &device)
        });
        let weights = alone[0].weights.clone();
        let stack =
            |part: fn(&Tensors) -> &Tensor| Tensor::cat(&alone.each_ref().map(part), 0).unwrap();
        let batch = Tensors {
            q: stack(|x| &x.q),
            k: stack(|x| &x.k),
            v: stack(|x| &x.v),
            gate: None,
            weights: weights.clone(),
        };
        let (whole, routing) = run(&batch, &config, None);
        let selection = routing.selection().unwrap();
        for (i, mut x) in alone.into_iter().enumerate() {
            x.weights = weights.clone();
            let (out, routing) = run(&x, &config, None);
            assert_eq!(whole[i * out.len()..(i + 1) * out.len()], out, "sequence {i}");
            for head in 0..3 {
                assert_eq!(selection.row(i, head), routing.selection().unwrap().row(0, head));
            }
        }
    }
}

#[test]
fn dense_attention_equals_the_cpus() {
    let device = gpu();
    for (dtype, limit) in [(DType::F32, 1e-5), (DType::BF16, 5e-3)] {
        for tokens in [1, 77, 601] {
            let (geometry, config) = layer((6, 2, 96, tokens, &[4, 0], LinearNorm::Mean));
            let input = sequence(geometry, &config, tokens, 41, dtype);
            let x = tensors(&input, &config, |x| x as f32);
            let expected = flat(&dense_attention(&x.q, &x.k, &x.v, None).unwrap());
            let x = placed(&input, &config, dtype, &device);
            let error =
                relative_rms(&flat(&dense_attention(&x.q, &x.k, &x.v, None).unwrap()), &expected);
            println!("{error:.1e} dense, {dtype:?}, {tokens} tokens");
            assert!(error <= limit, "{dtype:?}, {tokens} tokens: relative RMS {error:e}");
        }
    }
}
