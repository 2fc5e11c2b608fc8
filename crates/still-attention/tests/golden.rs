//! The naive twin and the CPU kernels against the float64 oracle's cases (`tests/data/reference.py`).

mod common;

use candle_core::WithDType;
use common::case::{Case, load};
use common::{assert_same_selection, flat, relative_rms, tensors};
use still_attention::{HybridState, PreparedWeights, Routing, RowDtype, hybrid_attention, naive};

fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    let error = relative_rms(got, expected);
    assert!(error <= tolerance, "{what}: relative RMS {error:e} > {tolerance:e}");
}

fn assert_scores(got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance, "score {i}: {a} vs {b}");
    }
}

fn check_naive(case: &Case) {
    let got = naive::hybrid_attention(&case.input, &case.config, None);
    assert_scores(&got.score, &case.score, 1e-10);
    assert_eq!(got.selection, case.selection);
    assert_close("out", &got.out, &case.out, 1e-10);
    assert_close("S", &got.state_s, &case.state_s, 1e-10);
    assert_close("z", &got.state_z, &case.state_z, 1e-10);
    assert_eq!(got.state_count, case.state_count);
}

/// Whole-sequence kernel in either float type: the closed form of the score is within 1e-6 of the definition.
fn check_kernel<T: WithDType>(case: &Case, to: impl Fn(f64) -> T + Copy, score: f64, out: f64) {
    let x = tensors(&case.input, &case.config, to);
    let run = |routing: Option<&Routing>| {
        let gate = x.gate.as_ref();
        hybrid_attention(&x.q, &x.k, &x.v, &x.weights, gate, &case.config, routing).unwrap()
    };
    let own = run(None);
    let scores: Vec<f64> = own.routing.scores().unwrap().iter().map(|&s| s.into()).collect();
    assert_scores(&scores, &case.score, score);
    assert_same_selection(&own.routing.selection().unwrap(), &case.selection, &case.score);
    let given = run(Some(&case.selection.clone().into()));
    assert_eq!(*given.routing.selection().unwrap(), case.selection);
    assert_close("out", &flat(&given.out), &case.out, out);
}

/// Token by token through the recurrent state.
fn check_decode(case: &Case) {
    let x = tensors(&case.input, &case.config, |x| x as f32);
    let weights = PreparedWeights::new(case.input.geometry, &case.config, &x.weights).unwrap();
    let mut state = HybridState::new(weights, 1, RowDtype::F32).keeping_positions();
    let steps: Vec<candle_core::Tensor> = (0..case.input.tokens)
        .map(|t| {
            let at = |tensor: &candle_core::Tensor| tensor.narrow(2, t, 1).unwrap();
            let gate = x.gate.as_ref().map(at);
            state.advance(&at(&x.q), &at(&x.k), &at(&x.v), gate.as_ref(), None).unwrap()
        })
        .collect();
    let heads = case.selection.heads;
    let last = (case.input.tokens - 1) / case.config.chunk;
    let mut same = true;
    for head in 0..heads {
        let expected: Vec<u32> = (0..case.input.tokens)
            .filter(|&t| case.selection.is_salient(0, head, last, t))
            .map(|t| t as u32)
            .collect();
        same &= state.salient_positions(0, head).unwrap() == expected;
    }
    assert!(same, "the golden cases have no scores within rounding of each other");
    let out = candle_core::Tensor::cat(&steps, 2).unwrap();
    assert_close("decode", &flat(&out), &case.out, 1e-5);
    let linear: Vec<_> = (0..heads).map(|head| state.linear(0, head)).collect();
    let wide = |x: &Vec<f32>| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    for (head, linear) in linear.iter().enumerate() {
        assert_eq!(linear.count, case.state_count[head]);
        if linear.count > 0 {
            let size = linear.s.len();
            let s = &case.state_s[head * size..(head + 1) * size];
            assert_close("S", &wide(&linear.s), s, 1e-5);
            let size = linear.z.len();
            let z = &case.state_z[head * size..(head + 1) * size];
            assert_close("z", &wide(&linear.z), z, 1e-5);
        }
    }
}

macro_rules! golden {
    ($($name:ident),* $(,)?) => { $(
        #[test]
        fn $name() {
            let case = load(stringify!($name));
            check_naive(&case);
            check_kernel(&case, |x| x, 1e-5, 1e-10);
            check_kernel(&case, |x| x as f32, 1e-5, 1e-5);
            check_decode(&case);
        }
    )* };
}

golden!(
    tiny_odd_length,
    one_chunk,
    gqa_ragged_budgets,
    zero_budget_is_window_plus_linear,
    full_budget_is_softmax,
    gate,
    mean_normalised,
    capped_with_demotion,
    query_head_routing,
    one_token,
    exactly_one_chunk,
    exactly_two_chunks,
    two_chunks_and_one,
    exactly_five_chunks,
    full_head_under_a_cap,
    smollm2_head_shape,
);
