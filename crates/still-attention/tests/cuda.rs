//! The operator on a CUDA GPU: the bodies of `shapes`, which the CPU runs too (`parity_shapes`), and what only a GPU has.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it. It runs on a machine without
//! Rust or the checkout, with the oracle's cases in a folder `data` beside it.

mod common;
#[path = "common/shapes.rs"]
mod shapes;

use candle_core::{DType, Device, Var};
use common::case::load;
use common::gpu::{Report, gpu, placed, run, sequence};
use common::{Tensors, assert_same_selection, flat, random_input, relative_rms, tensors};
use shapes::{Shape, assert_scores, capped, check_forward, layer};
use still_attention::{
    HeadGeometry, HybridConfig, LinearNorm, Router, dense_attention, hybrid_attention, naive,
};

#[test]
fn forward_and_selection_in_f32() {
    shapes::forward_and_selection(&gpu(), DType::F32);
}

#[test]
fn forward_and_selection_in_bf16() {
    shapes::forward_and_selection(&gpu(), DType::BF16);
}

#[test]
fn gradients_in_f32() {
    shapes::gradients_of_all(&gpu(), DType::F32);
}

#[test]
fn gradients_in_bf16() {
    shapes::gradients_of_all(&gpu(), DType::BF16);
}

#[test]
fn a_cap_in_f32() {
    shapes::a_cap(&gpu(), DType::F32);
}

#[test]
fn a_cap_in_bf16() {
    shapes::a_cap(&gpu(), DType::BF16);
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
        check_forward(&mut report, geometry, &config, shape.3, DType::BF16, &gpu());
    }
    let (geometry, config) = capped((WIDE[4], 40));
    check_forward(&mut report, geometry, &config, 451, DType::BF16, &gpu());
    let received = HybridConfig { router: Router::ReceivedAttention, ..config };
    check_forward(&mut report, geometry, &received, 451, DType::BF16, &gpu());
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

#[test]
fn ties_under_a_cap_go_to_the_earlier() {
    shapes::ties_under_a_cap_go_to_the_earlier(&gpu());
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

#[test]
fn variants_in_f32() {
    shapes::variants(&gpu(), DType::F32);
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

#[test]
fn strides_and_gradients_change_nothing() {
    for dtype in [DType::F32, DType::BF16] {
        shapes::strides_and_gradients_change_nothing(&gpu(), dtype);
    }
}

/// On a GPU, where a given selection goes through the same kernels in the same order.
#[test]
fn its_own_routing_changes_nothing() {
    for dtype in [DType::F32, DType::BF16] {
        for cap in [None, Some(7)] {
            let (geometry, config) = layer((6, 2, 96, 301, &[4, 0], LinearNorm::Mean));
            let config = HybridConfig { cap, ..config };
            let x = placed(&sequence(geometry, &config, 301, 21, dtype), &config, dtype, &gpu());
            let (out, routing) = run(&x, &config, None);
            assert_eq!(run(&x, &config, Some(&routing)).0, out, "{dtype:?}, cap {cap:?}");
        }
    }
}

#[test]
fn a_batch_equals_each_sequence_alone() {
    for dtype in [DType::F32, DType::BF16] {
        shapes::a_batch_equals_each_sequence_alone(&gpu(), dtype);
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
