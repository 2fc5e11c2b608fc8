//! The operator at many shapes, on any device: scores, selections, outputs and gradients compared with the naive twin and the CPU's
//! gradients in float64.

use candle_core::{DType, Device, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use still_attention::{
    Branches, FeatureMap, HeadGeometry, HybridConfig, LinearNorm, Router, Routing, SelectionHead,
    StillConfig, hybrid_attention, naive,
};

use crate::common::device::{Report, gradients, limits, placed, round, run, sequence};
use crate::common::{Tensors, assert_same_selection, flat, normal, relative_rms, tensors};

/// Query heads, KV heads, head dimension, tokens, budgets and scale: groups of 1, 3, 4 and 8.
pub type Shape = (usize, usize, usize, usize, &'static [usize], LinearNorm);
pub const SHAPES: [Shape; 14] = [
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
pub const CAPPED: [(Shape, usize); 10] = [
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

pub fn capped((shape, cap): (Shape, usize)) -> (HeadGeometry, HybridConfig) {
    let (geometry, config) = layer(shape);
    (geometry, HybridConfig { cap: Some(cap), ..config })
}

pub fn layer(shape: Shape) -> (HeadGeometry, HybridConfig) {
    let (num_heads, num_key_value_heads, head_dim, _, budgets, linear_norm) = shape;
    let geometry = HeadGeometry { num_heads, num_key_value_heads, head_dim };
    let config = StillConfig::uniform(1, geometry, 64, 0).layer(0).unwrap();
    (geometry, HybridConfig { budgets: budgets.to_vec(), linear_norm, ..config })
}

pub fn assert_scores(routing: &Routing, expected: &[f64], case: &str) {
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

pub fn check_forward(
    report: &mut Report,
    geometry: HeadGeometry,
    config: &HybridConfig,
    tokens: usize,
    dtype: DType,
    device: &Device,
) {
    let case = format!("{dtype:?} {geometry:?} {tokens} tokens, {config:?}");
    let input = sequence(geometry, config, tokens, 11, dtype);
    let twin = naive::hybrid_attention(&input, config, None);
    let x = placed(&input, config, dtype, device);
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
    device: &Device,
) {
    let case = format!("{dtype:?} {geometry:?} {tokens} tokens, {config:?}");
    let input = sequence(geometry, config, tokens, 12, dtype);
    let x = placed(&input, config, dtype, device);
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

type Check = fn(&mut Report, HeadGeometry, &HybridConfig, usize, DType, &Device);

/// All checks of all cases, and then one report.
fn check_all(
    cases: impl IntoIterator<Item = ((HeadGeometry, HybridConfig), usize)>,
    checks: &[Check],
    dtype: DType,
    device: &Device,
) {
    let mut report = Report::default();
    for ((geometry, config), tokens) in cases {
        for check in checks {
            check(&mut report, geometry, &config, tokens, dtype, device);
        }
    }
    report.finish();
}

/// Scores, selections and outputs of all shapes.
pub fn forward_and_selection(device: &Device, dtype: DType) {
    check_all(SHAPES.map(|shape| (layer(shape), shape.3)), &[check_forward], dtype, device);
}

/// Gradients of all shapes.
pub fn gradients_of_all(device: &Device, dtype: DType) {
    check_all(SHAPES.map(|shape| (layer(shape), shape.3)), &[check_gradients], dtype, device);
}

/// Both, under a cap.
pub fn a_cap(device: &Device, dtype: DType) {
    let cases = CAPPED.map(|case| (capped(case), case.0.3));
    check_all(cases, &[check_forward, check_gradients], dtype, device);
}

/// With equal scores the earliest tokens stay.
pub fn ties_under_a_cap_go_to_the_earlier(device: &Device) {
    let (geometry, config) = capped(((2, 2, 64, 300, &[3, 64], LinearNorm::Mean), 5));
    let mut input = sequence(geometry, &config, 300, 14, DType::F32);
    input.q.fill(0.0);
    let (_, routing) = run(&placed(&input, &config, DType::F32, device), &config, None);
    let selection = routing.selection().unwrap();
    let kept = |head: usize| {
        let stays = |&token: &usize| selection.is_salient(0, head, 4, token);
        (0..300).filter(stays).collect::<Vec<_>>()
    };
    // The first tokens see fewer keys than the others: they stand out. From token 63 on all scores are equal.
    assert_eq!((kept(0), kept(1)), (vec![0, 1, 2, 64, 65], vec![0, 1, 2, 3, 4]));
}

/// Variants of a layer: reflections, a window factor, routers, a decision per query head.
pub fn variants(device: &Device, dtype: DType) {
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
    let cases = variants.map(|config| ((geometry, config), 210));
    check_all(cases, &[check_forward, check_gradients], dtype, device);
}

/// A call gives the same bits with a graph and with any layout of its rows.
pub fn strides_and_gradients_change_nothing(device: &Device, dtype: DType) {
    for cap in [None, Some(7)] {
        let (geometry, config) = layer((6, 2, 96, 301, &[4, 0], LinearNorm::Mean));
        let config = HybridConfig { cap, ..config };
        let input = sequence(geometry, &config, 301, 21, dtype);
        let x = placed(&input, &config, dtype, device);
        let (out, _) = run(&x, &config, None);
        assert_eq!(run(&x, &config, None).0, out, "run twice");

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

/// A batch gives what each sequence gives alone, bit for bit.
pub fn a_batch_equals_each_sequence_alone(device: &Device, dtype: DType) {
    for cap in [None, Some(9)] {
        let (geometry, config) = layer((9, 3, 64, 333, &[4, 64, 0], LinearNorm::Mean));
        let config = HybridConfig { cap, ..config };
        let alone = [31, 32, 33].map(|seed| {
            placed(&sequence(geometry, &config, 333, seed, dtype), &config, dtype, device)
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
