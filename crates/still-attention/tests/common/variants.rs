//! Every attention that a configuration can say, on any device: routers, feature maps, gate, scales and ablations compared with the
//! naive twin, the CPU's gradients in float64, and a state that is fed in pieces.

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use still_attention::{
    AttentionRows, AttentionState, Branches, FeatureMap, HeadGeometry, HybridConfig, LinearNorm,
    Router, SelectionHead, StillConfig, naive,
};

use crate::common::device::{Report, gradients, limits, placed, round, run, sequence};
use crate::common::{Tensors, assert_same_selection, flat, normal, relative_rms, tensors};

/// Makes an empty state of a device: of a configuration, with the weights of an input, for rows of a dtype and so many sequences.
pub type MakeState<'a> =
    dyn Fn(&HybridConfig, &naive::Input, DType, usize) -> Box<dyn AttentionState> + 'a;

/// Geometries of groups of 2, 4 and 3, one for each head dimension that has kernels.
pub const GEOMETRIES: [HeadGeometry; 4] = [
    HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 64 },
    HeadGeometry { num_heads: 4, num_key_value_heads: 1, head_dim: 128 },
    HeadGeometry { num_heads: 6, num_key_value_heads: 2, head_dim: 96 },
    HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 80 },
];

/// Named variants of a layer.
fn variants(geometry: HeadGeometry) -> Vec<(&'static str, HybridConfig)> {
    let heads = geometry.num_key_value_heads;
    let plain = StillConfig::uniform(1, geometry, 64, 4).layer(0).unwrap();
    let plain = HybridConfig {
        layer: 3,
        budgets: [5, 2].into_iter().cycle().take(heads).collect(),
        ..plain
    };
    let by_query = |config: &HybridConfig| HybridConfig {
        selection_head: SelectionHead::QueryHead,
        budgets: [4, 0, 64, 2].into_iter().cycle().take(geometry.num_heads).collect(),
        ..config.clone()
    };
    let shipped = |mut config: StillConfig| {
        config.selection_head = SelectionHead::QueryHead;
        let budget = config.budgets[0][0];
        config.budgets = vec![vec![budget; geometry.num_heads]];
        config.layer(0).unwrap()
    };
    let branches = |window, salient, linear| HybridConfig {
        branches: Branches { window, salient, linear },
        ..plain.clone()
    };
    let sum = HybridConfig { linear_norm: LinearNorm::Sum, ..plain.clone() };
    let received = HybridConfig { router: Router::ReceivedAttention, ..plain.clone() };
    let recalled = HybridConfig { router: Router::SelfRecall, ..plain.clone() };
    let softmax = HybridConfig { feature_map: FeatureMap::Softmax, ..plain.clone() };
    let reflected = FeatureMap::NpMap { householder: true };
    let released = HybridConfig { gate: true, feature_map: reflected, ..by_query(&sum) };
    let alone = StillConfig::linear_only(1, geometry, 64).layer(0).unwrap();
    vec![
        ("lolcats", shipped(StillConfig::lolcats(1, geometry, 64))),
        ("lola", shipped(StillConfig::lola(1, geometry, 64, 70))),
        ("linear only", shipped(StillConfig::linear_only(1, geometry, 64))),
        ("linear only, np_map", HybridConfig { feature_map: reflected, chunk: 32, ..alone }),
        ("window only", StillConfig::window_only(1, geometry, 64).layer(0).unwrap()),
        ("streaming llm", StillConfig::streaming_llm(1, geometry, 64, 4).layer(0).unwrap()),
        ("random", HybridConfig { router: Router::Random { seed: 9 }, ..plain.clone() }),
        ("released", released),
        ("first tokens", HybridConfig { router: Router::FirstTokens, ..plain.clone() }),
        ("gate under a cap", HybridConfig { gate: true, cap: Some(7), ..plain.clone() }),
        ("gate, softmax", HybridConfig { gate: true, window_factor: true, ..softmax.clone() }),
        ("softmax map under a cap", HybridConfig { cap: Some(6), ..softmax }),
        ("factor and mean", HybridConfig { window_factor: true, ..plain.clone() }),
        ("factor and sum", HybridConfig { window_factor: true, ..sum.clone() }),
        ("received", received.clone()),
        ("received under a cap", HybridConfig { cap: Some(6), ..received.clone() }),
        ("received by query head", by_query(&received)),
        ("recalled", recalled.clone()),
        ("recalled under a cap", HybridConfig { cap: Some(8), ..recalled.clone() }),
        ("recalled by query head", HybridConfig { cap: Some(90), ..by_query(&recalled) }),
        ("no window", branches(false, true, true)),
        ("no salient", branches(true, false, true)),
        ("no salient under a cap", HybridConfig { cap: Some(6), ..branches(true, false, true) }),
        ("no linear", branches(true, true, false)),
        ("linear alone", branches(false, false, true)),
        ("linear alone under a cap", HybridConfig { cap: Some(6), ..branches(false, false, true) }),
        ("salient alone", branches(false, true, false)),
        (
            "recalled of nothing",
            HybridConfig {
                branches: Branches { linear: false, ..Branches::default() },
                cap: Some(8),
                ..recalled
            },
        ),
    ]
}

/// Those of [`variants`] whose numbers `dtype` holds: a folded reflection is rounded with its matrix.
fn cases(
    geometries: &[HeadGeometry],
    dtype: DType,
) -> impl Iterator<Item = (HeadGeometry, &'static str, HybridConfig)> {
    let all = geometries.iter().flat_map(|&geometry| {
        variants(geometry).into_iter().map(move |(name, config)| (geometry, name, config))
    });
    let reflected = FeatureMap::NpMap { householder: true };
    all.filter(move |(.., config)| dtype == DType::F32 || config.feature_map != reflected)
}

fn check_forward(
    report: &mut Report,
    name: &str,
    config: &HybridConfig,
    input: &naive::Input,
    dtype: DType,
    device: &Device,
) {
    let case = format!("{dtype:?} {name}, D = {}", input.geometry.head_dim);
    let twin = naive::hybrid_attention(input, config, None);
    let x = placed(input, config, dtype, device);
    let (own, routing) = run(&x, config, None);
    let (scores, selection) = (routing.scores().unwrap(), routing.selection().unwrap());
    assert_eq!(scores.len(), twin.score.len(), "{case}");
    // What a state of features in bf16 recalls worst is another token now and then, and after it others.
    if !(dtype == DType::BF16 && config.router == Router::SelfRecall) {
        let off = scores
            .iter()
            .zip(&twin.score)
            .map(|(&got, &expected)| (f64::from(got) - expected).abs() / (expected.abs() + 1.0));
        report.add(format!("scores, {case}"), off.fold(0.0, f64::max), 3e-5);
        assert_same_selection(&selection, &twin.selection, &twin.score);
    }
    let same = naive::hybrid_attention(input, config, Some(&selection));
    report.add(format!("own selection, {case}"), relative_rms(&own, &same.out), limits(dtype).0);
    let (given, again) = run(&x, config, Some(&twin.selection.clone().into()));
    assert_eq!(*again.selection().unwrap(), twin.selection, "{case}");
    report.add(
        format!("given selection, {case}"),
        relative_rms(&given, &twin.out),
        limits(dtype).0,
    );
}

fn check_gradients(
    report: &mut Report,
    name: &str,
    config: &HybridConfig,
    input: &naive::Input,
    dtype: DType,
    device: &Device,
) {
    let x = placed(input, config, dtype, device);
    let (_, routing) = run(&x, config, None);
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let mut cotangent = normal(&mut rng, input.q.len(), 1.0);
    round(&mut cotangent);
    let selection = (*routing.selection().unwrap()).clone().into();
    let expected = gradients(&tensors(input, config, |x| x), config, &selection, &cotangent);
    let got = gradients(&x, config, &routing, &cotangent);
    for ((what, got), (_, expected)) in got.iter().zip(&expected) {
        let none = expected.iter().all(|g| g.abs() < 1e-12);
        let size = (got.iter().map(|g| g * g).sum::<f64>() / got.len() as f64).sqrt();
        let error = if none { size } else { relative_rms(got, expected) };
        let case = format!("gradient of {what}, {dtype:?} {name}, D = {}", input.geometry.head_dim);
        report.add(case, error, limits(dtype).1);
    }
}

/// Scores, selections and outputs.
pub fn whole_sequences(geometries: &[HeadGeometry], dtype: DType, device: &Device) {
    let mut report = Report::default();
    for (geometry, name, config) in cases(geometries, dtype) {
        let input = sequence(geometry, &config, 333, 11, dtype);
        check_forward(&mut report, name, &config, &input, dtype, device);
    }
    report.finish();
}

/// Gradients of all inputs.
pub fn gradients_of_whole_sequences(geometries: &[HeadGeometry], dtype: DType, device: &Device) {
    let mut report = Report::default();
    for (geometry, name, config) in cases(geometries, dtype) {
        let input = sequence(geometry, &config, 333, 12, dtype);
        check_gradients(&mut report, name, &config, &input, dtype, device);
    }
    report.finish();
}

/// Whatever the split, outputs are those of the definition in float64, which is told what a whole pass on the device selects.
pub fn a_state_in_pieces(
    geometries: &[HeadGeometry],
    dtype: DType,
    make: &MakeState<'_>,
    device: &Device,
) {
    let mut report = Report::default();
    for (geometry, name, config) in cases(geometries, dtype) {
        let case = format!("{dtype:?} {name}, D = {}", geometry.head_dim);
        pieces(&mut report, geometry, &config, dtype, &case, make, device);
    }
    report.finish();
}

/// Tokens of each of three sequences in each call: whole reads, reads onto a state at any place of a chunk, single steps.
fn calls() -> Vec<[usize; 3]> {
    let mut calls = vec![[130, 1, 0], [1, 64, 200], [0, 3, 1]];
    calls.extend([[1; 3]; 70]);
    calls.extend([[3, 70, 129], [1, 0, 1], [1; 3], [190, 64, 2]]);
    calls.extend([[1; 3]; 5]);
    calls
}

/// Rows `starts..` of each sequence, padded with what must not be looked at.
fn piece(all: &[Tensor], starts: &[usize], lengths: &[usize; 3], tokens: usize) -> Tensor {
    let rows = all.iter().zip(starts.iter().zip(lengths)).map(|(x, (&start, &length))| {
        let (_, heads, _, d) = x.dims4().unwrap();
        let nan = || {
            let nan = Tensor::full(f32::NAN, (1, heads, tokens - length, d), x.device()).unwrap();
            nan.to_dtype(x.dtype()).unwrap()
        };
        match length {
            0 => nan(),
            _ if length == tokens => x.narrow(2, start, length).unwrap(),
            _ => Tensor::cat(&[&x.narrow(2, start, length).unwrap(), &nan()], 2).unwrap(),
        }
    });
    Tensor::cat(&rows.collect::<Vec<_>>(), 0).unwrap()
}

fn pieces(
    report: &mut Report,
    geometry: HeadGeometry,
    config: &HybridConfig,
    dtype: DType,
    case: &str,
    make: &MakeState<'_>,
    device: &Device,
) {
    let calls = calls();
    let lengths = [0, 1, 2].map(|n| calls.iter().map(|call| call[n]).sum::<usize>());
    let mut inputs =
        [0, 1, 2].map(|n| sequence(geometry, config, lengths[n], 60 + n as u64, dtype));
    let (first, others) = inputs.split_at_mut(1);
    for other in others {
        *other = naive::Input {
            geometry: other.geometry,
            tokens: other.tokens,
            q: other.q.clone(),
            k: other.k.clone(),
            v: other.v.clone(),
            gate: other.gate.clone(),
            ..first[0].clone()
        };
    }
    let placed = inputs.each_ref().map(|input| placed(input, config, dtype, device));
    let expected: Vec<_> = inputs
        .iter()
        .zip(&placed)
        .map(|(input, x)| {
            let selection = run(x, config, None).1.selection().unwrap();
            naive::hybrid_attention(input, config, Some(&selection)).out
        })
        .collect();

    let mut state = make(config, &inputs[0], dtype, 3);
    let (mut starts, mut outs) = (vec![0; 3], vec![Vec::new(); 3]);
    let all = |part: fn(&Tensors) -> Tensor| placed.iter().map(part).collect::<Vec<_>>();
    let (q, k, v) = (all(|x| x.q.clone()), all(|x| x.k.clone()), all(|x| x.v.clone()));
    let gates = config.gate.then(|| all(|x| x.gate.clone().unwrap()));
    for call in &calls {
        let tokens = call.iter().copied().max().unwrap();
        let of = |rows: &[Tensor]| piece(rows, &starts, call, tokens);
        let (q, k, v, gate) = (of(&q), of(&k), of(&v), gates.as_deref().map(of));
        let rows = AttentionRows { q: &q, k: &k, v: &v, gate: gate.as_ref() };
        let out = state.advance(rows, Some(call)).unwrap();
        for (sequence, (start, &length)) in starts.iter_mut().zip(call).enumerate() {
            let own = out.narrow(0, sequence, 1).unwrap();
            if length < tokens {
                let padding = flat(&own.narrow(2, length, tokens - length).unwrap());
                assert!(padding.iter().all(|&x| x == 0.0), "{case}: padding was written to");
            }
            if length > 0 {
                outs[sequence].push(own.narrow(2, 0, length).unwrap());
            }
            *start += length;
            assert_eq!(state.position(sequence), *start);
        }
    }
    for (sequence, (outs, expected)) in outs.iter().zip(&expected).enumerate() {
        let got = flat(&Tensor::cat(outs, 2).unwrap());
        let what = format!("sequence {sequence} in pieces, {case}");
        // Features in bf16 are rounded elsewhere in a whole pass and in steps: of two tokens that the state recalls about equally
        // badly, one keeps the one and the other the other, for a few chunks.
        let limit = match (dtype, config.router) {
            (DType::BF16, Router::SelfRecall) => 1e-2,
            _ => limits(dtype).0,
        };
        report.add(what, relative_rms(&got, expected), limit);
    }
}
