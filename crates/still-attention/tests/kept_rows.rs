//! A state that keeps rows in few bits, compared with the definition: what is seen exactly, what in few bits, and from when on.

mod common;

use candle_core::Tensor;
use common::{flat, random_input, relative_rms, some_exponents, tensors};
use half::bf16;
use still_attention::{
    Branches, HeadGeometry, HybridConfig, HybridState, KeyExponents, LinearNorm, PreparedWeights,
    Router, RowDtype, SelectionHead, StillConfig, naive,
};

const TOKENS: usize = 75;

/// A state's window is bf16: what comes in is exact there.
fn input(geometry: HeadGeometry, config: &HybridConfig, tokens: usize) -> naive::Input {
    let mut input = random_input(geometry, config, tokens, 17);
    let round = |x: &mut f64| *x = bf16::from_f64(*x).to_f64();
    input.k.iter_mut().chain(&mut input.v).for_each(round);
    input
}

/// Chunks of 8: a head that keeps some of each, one that keeps all; caps that are reached; a router that ranks kept tokens again;
/// routing by query head.
fn configs(geometry: HeadGeometry) -> Vec<HybridConfig> {
    let plain = StillConfig::uniform(1, geometry, 8, 0).layer(0).unwrap();
    let plain = HybridConfig { budgets: vec![3, 8], linear_norm: LinearNorm::Mean, ..plain };
    vec![
        HybridConfig { cap: Some(11), ..plain.clone() },
        HybridConfig { cap: Some(5), linear_norm: LinearNorm::Sum, ..plain.clone() },
        HybridConfig { cap: Some(9), router: Router::SelfRecall, ..plain.clone() },
        HybridConfig { router: Router::ReceivedAttention, ..plain.clone() },
        HybridConfig {
            selection_head: SelectionHead::QueryHead,
            budgets: vec![1, 0, 8, 4],
            key_exponents: some_exponents(geometry),
            ..plain.clone()
        },
        HybridConfig { key_exponents: some_exponents(geometry), cap: Some(11), ..plain.clone() },
        plain,
    ]
}

#[test]
fn rows_in_few_bits_equal_the_definition() {
    for head_dim in [8, 64, 80] {
        let geometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim };
        for config in configs(geometry) {
            for rows in [RowDtype::Int8, RowDtype::Int4] {
                check(geometry, &config, TOKENS, rows, &[1, 5, TOKENS]);
            }
        }
    }
}

/// Chunks of whole groups of 32: 4-bit keys of the head that keeps all are coded by channel, with exponents and without.
#[test]
fn keys_of_a_head_that_keeps_all_equal_the_definition() {
    const TOKENS: usize = 301;
    for (head_dim, chunk) in [(32, 32), (64, 64), (128, 32)] {
        let geometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim };
        let plain = StillConfig::uniform(1, geometry, chunk, 0).layer(0).unwrap();
        let plain = HybridConfig { budgets: vec![3, chunk], ..plain };
        let scaled = HybridConfig { key_exponents: some_exponents(geometry), ..plain.clone() };
        for config in [plain, scaled] {
            check(geometry, &config, TOKENS, RowDtype::Int4, &[1, 37, TOKENS]);
        }
    }
}

/// The output of a state that is fed so many tokens at a time, and the state.
fn in_pieces(
    input: &naive::Input,
    config: &HybridConfig,
    rows: RowDtype,
    piece: usize,
) -> (Vec<f64>, HybridState) {
    let x = tensors(input, config, |x| x as f32);
    let weights = PreparedWeights::new(input.geometry, config, &x.weights).unwrap();
    let mut state = HybridState::new(weights, 1, rows);
    let parts = (0..input.tokens).step_by(piece).map(|start| {
        let length = piece.min(input.tokens - start);
        let [q, k, v] = [&x.q, &x.k, &x.v].map(|x| x.narrow(2, start, length).unwrap());
        state.advance(&q, &k, &v, None, None).unwrap()
    });
    let out = Tensor::cat(&parts.collect::<Vec<_>>(), 2).unwrap();
    (flat(&out), state)
}

/// Any split into pieces gives what the definition does.
fn check(
    geometry: HeadGeometry,
    config: &HybridConfig,
    tokens: usize,
    rows: RowDtype,
    pieces: &[usize],
) {
    let input = input(geometry, config, tokens);
    let twin = naive::hybrid_attention_of_rows(&input, config, None, rows);
    let exact = naive::hybrid_attention(&input, config, None).out;
    for &piece in pieces {
        let case = format!("{rows} {} in pieces of {piece}, {config:?}", geometry.head_dim);
        let (got, state) = in_pieces(&input, config, rows, piece);
        let error = relative_rms(&got, &twin.out);
        assert!(error <= 1e-5, "{case}: relative RMS {error:e}");
        let heads = geometry.selection_heads(config.selection_head);
        for head in 0..heads {
            let linear = state.linear(0, head);
            assert_eq!(linear.count, twin.state_count[head], "{case}");
            let size = twin.state_s.len() / heads;
            let wide: Vec<f64> = linear.s.iter().map(|&x| x.into()).collect();
            let expected = &twin.state_s[head * size..(head + 1) * size];
            if linear.count > 0 {
                let error = relative_rms(&wide, expected);
                assert!(error <= 1e-5, "{case}: S is off by {error:e}");
            }
        }
    }
    // The definition is another one than that of exact rows.
    assert!(relative_rms(&twin.out, &exact) > 1e-4);
}

/// Keys with a channel a hundred times larger than the others, as Qwen2's biases make them, and queries that see little of it: codes
/// of one scale a row lose the others, and those of scaled channels do not.
#[test]
fn a_large_channel_needs_an_exponent() {
    const LARGE: usize = 5;
    let geometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 64 };
    let plain = StillConfig::uniform(1, geometry, 8, 0).layer(0).unwrap();
    // Logits alone are to differ: no linear branch, whose feature maps see keys as they are.
    let branches = Branches { linear: false, ..Branches::default() };
    let plain = HybridConfig { budgets: vec![3, 8], branches, ..plain };
    let mut input = input(geometry, &plain, TOKENS);
    let channel = |x: &mut Vec<f64>, by: f64| {
        x.iter_mut().skip(LARGE).step_by(64).for_each(|x| *x *= by);
    };
    channel(&mut input.k, 128.0);
    channel(&mut input.q, 1.0 / 128.0);
    let ranges: Vec<f64> = (0..64).map(|c| if c == LARGE { 128.0 } else { 1.0 }).collect();
    let exponents = vec![KeyExponents::of_ranges(&ranges); 2];
    assert_eq!(exponents[0].values()[LARGE], 7);
    let exact = naive::hybrid_attention(&input, &plain, None).out;
    let error = |config: &HybridConfig, rows, piece: usize| {
        relative_rms(&in_pieces(&input, config, rows, piece).0, &exact)
    };
    let scaled = HybridConfig { key_exponents: exponents, ..plain.clone() };
    for (rows, bound) in [(RowDtype::Int8, 1e-2), (RowDtype::Int4, 1.5e-1)] {
        for piece in [1, TOKENS] {
            let (plain, scaled) = (error(&plain, rows, piece), error(&scaled, rows, piece));
            assert!(plain > 2.0 * bound && scaled < bound, "{rows}: {plain:e}, {scaled:e}");
        }
    }
}
