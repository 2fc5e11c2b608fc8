//! What only linear attention alone can get wrong.

mod common;

use common::{flat, random_input, tensors};
use still_attention::{
    AttentionState, Branches, HeadGeometry, HybridConfig, HybridState, LinearNorm, PreparedWeights,
    Router, RowDtype, Selection, StillConfig, hybrid_attention, naive,
};

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 6, num_key_value_heads: 2, head_dim: 8 };

fn config() -> HybridConfig {
    StillConfig::linear_only(1, GEOMETRY, 8).layer(0).unwrap()
}

#[test]
fn what_has_no_meaning_is_refused() {
    config().validate(GEOMETRY).unwrap();
    for (config, word) in [
        (HybridConfig { budgets: vec![0, 1], ..config() }, "budgets"),
        (HybridConfig { cap: Some(3), ..config() }, "cap"),
        (HybridConfig { router: Router::ReceivedAttention, ..config() }, "router"),
        (HybridConfig { gate: true, ..config() }, "gate"),
        (HybridConfig { window_factor: true, ..config() }, "window factor"),
        (HybridConfig { linear_norm: LinearNorm::Mean, ..config() }, "linear_norm"),
        (
            HybridConfig {
                branches: Branches { window: false, ..Branches::default() },
                ..config()
            },
            "branches",
        ),
    ] {
        let error = config.validate(GEOMETRY).unwrap_err().to_string();
        assert!(error.contains("linear_only") && error.contains(word), "{error}");
    }
}

#[test]
fn no_other_selection_can_be_given() {
    let input = random_input(GEOMETRY, &config(), 20, 1);
    let x = tensors(&input, &config(), |x| x);
    let mut selection = naive::hybrid_attention(&input, &config(), None).selection;
    let run = |selection: &Selection| {
        hybrid_attention(
            &x.q,
            &x.k,
            &x.v,
            &x.weights,
            None,
            &config(),
            Some(&selection.clone().into()),
        )
    };
    run(&selection).unwrap();
    selection.absorbed_at[7] = Selection::NEVER;
    assert!(run(&selection).unwrap_err().to_string().contains("no other selection"));
}

/// Of a state only `S`, `z` and `n` are left, after one token as after many.
#[test]
fn memory_is_constant_from_the_first_token() {
    let input = random_input(GEOMETRY, &config(), 50, 2);
    let x = tensors(&input, &config(), |x| x as f32);
    let weights = PreparedWeights::new(GEOMETRY, &config(), &x.weights).unwrap();
    let mut state = HybridState::new(weights, 1, RowDtype::Bf16);
    for (start, length) in [(0, 1), (1, 49)] {
        let piece = |tensor: &candle_core::Tensor| tensor.narrow(2, start, length).unwrap();
        state.advance(&piece(&x.q), &piece(&x.k), &piece(&x.v), None, None).unwrap();
        assert_eq!(state.size_bytes(), 2 * ((16 * 8 + 16) * 4 + 8));
        assert_eq!(state.linear(0, 1).count, start + length);
    }
}

/// Maps so sharp that queries and keys have no channel in common: 0 in place of 0/0, and gradients that are numbers.
#[test]
fn products_that_vanish_give_zero() {
    let config = config();
    let mut input = random_input(GEOMETRY, &config, 11, 3);
    let identity = |w: &mut Vec<f64>| {
        w.iter_mut().enumerate().for_each(|(i, w)| *w = f64::from(u8::from(i % 64 % 9 == 0)));
    };
    identity(&mut input.feature_map_q);
    identity(&mut input.feature_map_k);
    for (x, (up, down)) in [(&mut input.q, (0, 1)), (&mut input.k, (2, 3))] {
        x.fill(0.0);
        x.chunks_exact_mut(8).for_each(|row| (row[up], row[down]) = (300.0, -300.0));
    }
    let x = tensors(&input, &config, |x| x as f32);
    let q = candle_core::Var::from_tensor(&x.q).unwrap();
    let got = hybrid_attention(&q, &x.k, &x.v, &x.weights, None, &config, None).unwrap();
    let twin = naive::hybrid_attention(&input, &config, None);
    assert!(flat(&got.out).iter().all(|&x| x == 0.0));
    assert!(twin.out.iter().all(|x| x.abs() < 1e-60));
    let grads = got.out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    assert!(flat(grads.get(&q).unwrap()).iter().all(|x| x.is_finite()));
}
