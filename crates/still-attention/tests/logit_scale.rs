//! Logits that are `q·k` times a number of the model's own: in exact attention, in scores and in every state, but not in feature maps.

mod common;

use candle_core::Tensor;
use common::{flat, random_input, relative_rms, tensors};
use still_attention::{
    AttentionRows, AttentionState, Branches, HeadGeometry, HybridConfig, HybridState, KvCache,
    PreparedWeights, Router, RowDtype, SelectionHead, SlidingKvCache, StillConfig, dense_attention,
    hybrid_attention, naive,
};

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 8 };
const CHUNK: usize = 16;
const TOKENS: usize = 75;
/// Much sharper and much flatter than 1/√8 = 0.35.
const SCALES: [f64; 2] = [0.9, 0.08];

fn config(scale: Option<f64>) -> HybridConfig {
    let still = StillConfig::uniform(1, GEOMETRY, CHUNK, 3);
    HybridConfig { logit_scale: scale, ..still.layer(0).unwrap() }
}

/// Output of a state that is fed `piece` tokens at a time.
fn in_pieces(state: &mut dyn AttentionState, rows: &[Tensor; 3], piece: usize) -> Vec<f64> {
    let parts = (0..TOKENS).step_by(piece).map(|start| {
        let length = piece.min(TOKENS - start);
        let [q, k, v] = rows.each_ref().map(|x| x.narrow(2, start, length).unwrap());
        state.advance(AttentionRows { q: &q, k: &k, v: &v, gate: None }, None).unwrap()
    });
    flat(&Tensor::cat(&parts.collect::<Vec<_>>(), 2).unwrap())
}

#[test]
fn hybrid_attention_whole_and_in_pieces_is_the_twins() {
    let usual = naive::hybrid_attention(
        &random_input(GEOMETRY, &config(None), TOKENS, 3),
        &config(None),
        None,
    );
    let routers = [Router::SelfSaliency, Router::ReceivedAttention, Router::SelfRecall];
    for (scale, router) in SCALES.into_iter().flat_map(|scale| routers.map(|r| (scale, r))) {
        for selection_head in [SelectionHead::KvHead, SelectionHead::QueryHead] {
            let budgets = vec![3; GEOMETRY.selection_heads(selection_head)];
            let config = HybridConfig { router, selection_head, budgets, ..config(Some(scale)) };
            let input = random_input(GEOMETRY, &config, TOKENS, 3);
            let twin = naive::hybrid_attention(&input, &config, None);
            let what = format!("{scale}, {router:?}, {selection_head:?}");
            assert!(relative_rms(&twin.out, &usual.out) > 1e-2, "{what}: the scale has no effect");
            let x = tensors(&input, &config, |x| x as f32);
            let whole =
                hybrid_attention(&x.q, &x.k, &x.v, &x.weights, None, &config, None).unwrap();
            assert_eq!(*whole.routing.selection().unwrap(), twin.selection, "{what}");
            let scores: Vec<f64> =
                whole.routing.scores().unwrap().iter().map(|&score| score.into()).collect();
            assert!(relative_rms(&scores, &twin.score) <= 1e-5, "{what}");
            assert!(relative_rms(&flat(&whole.out), &twin.out) <= 1e-5, "{what}");
            let rows = [x.q, x.k, x.v];
            let weights = PreparedWeights::new(GEOMETRY, &config, &x.weights).unwrap();
            for piece in [1, 7, TOKENS] {
                let mut state = HybridState::new(weights.clone(), 1, RowDtype::F32);
                let error = relative_rms(&in_pieces(&mut state, &rows, piece), &twin.out);
                assert!(error <= 1e-5, "{what}, {piece} tokens at a time: {error:e}");
            }
        }
    }
}

/// Kernels of 16-bit and 8-bit rows multiply what was scaled before.
#[test]
fn narrow_rows_stay_within_their_rounding() {
    for scale in SCALES {
        let config = config(Some(scale));
        let x = tensors(&random_input(GEOMETRY, &config, TOKENS, 5), &config, |x| x as f32);
        let weights = PreparedWeights::new(GEOMETRY, &config, &x.weights).unwrap();
        let rows = [x.q, x.k, x.v];
        let exact =
            in_pieces(&mut HybridState::new(weights.clone(), 1, RowDtype::F32), &rows, TOKENS);
        for (dtype, bound) in
            [(RowDtype::F16, 2e-3), (RowDtype::Bf16, 1.5e-2), (RowDtype::Int8, 3e-2)]
        {
            for piece in [1, TOKENS] {
                let mut state = HybridState::new(weights.clone(), 1, dtype);
                let error = relative_rms(&in_pieces(&mut state, &rows, piece), &exact);
                assert!(error > 0.0 && error < bound, "{scale}, {dtype:?}, {piece}: {error:e}");
            }
        }
    }
}

#[test]
fn dense_attention_and_its_cache_have_it() {
    let usual = 8_f64.powf(-0.5);
    let input = random_input(GEOMETRY, &config(None), TOKENS, 7);
    let x = tensors(&input, &config(None), |x| x as f32);
    let rows = [x.q, x.k, x.v];
    let [q, k, v] = &rows;
    for scale in [None, Some(usual), Some(SCALES[0]), Some(SCALES[1])] {
        for window in [TOKENS, 12] {
            let twin = naive::sliding_attention(
                GEOMETRY,
                (TOKENS, window),
                scale.unwrap_or(usual),
                [&input.q, &input.k, &input.v],
            );
            if window == TOKENS {
                let whole = dense_attention(q, k, v, scale).unwrap();
                assert!(relative_rms(&flat(&whole), &twin) <= 1e-5, "{scale:?}");
            }
            for piece in [1, 7, TOKENS] {
                let mut state: Box<dyn AttentionState> = match window {
                    TOKENS => {
                        let cache = KvCache::new(GEOMETRY, 1, RowDtype::F32);
                        Box::new(cache.with_logit_scale(scale).unwrap())
                    }
                    _ => {
                        let cache = SlidingKvCache::new(GEOMETRY, window, 1, RowDtype::F32);
                        Box::new(cache.unwrap().with_logit_scale(scale).unwrap())
                    }
                };
                let error = relative_rms(&in_pieces(&mut *state, &rows, piece), &twin);
                assert!(error <= 1e-5, "{scale:?}, window {window}, {piece}: {error:e}");
            }
        }
    }
}

/// The exact terms alone are those of scaled queries. With the linear branch they are not: `φ` takes queries as they are.
#[test]
fn feature_maps_see_unscaled_queries() {
    let scaled = |mut input: naive::Input, by: f64| {
        input.q.iter_mut().for_each(|q| *q *= by);
        input
    };
    let factor = SCALES[0] * 8_f64.sqrt();
    for (linear, same) in [(false, true), (true, false)] {
        let branches = Branches { linear, ..Branches::default() };
        let config = HybridConfig { branches, ..config(None) };
        let input = random_input(GEOMETRY, &config, TOKENS, 9);
        let own = HybridConfig { logit_scale: Some(SCALES[0]), ..config.clone() };
        let got = naive::hybrid_attention(&input, &own, None);
        let other = naive::hybrid_attention(&scaled(input, factor), &config, None);
        assert_eq!(got.selection, other.selection);
        assert_eq!(relative_rms(&got.out, &other.out) < 1e-9, same);
    }
}

#[test]
fn what_is_no_scale_is_refused() {
    for wrong in [0.0, -0.3, f64::NAN, f64::INFINITY] {
        let told = config(Some(wrong)).validate(GEOMETRY).unwrap_err().to_string();
        assert!(told.contains("logit_scale is"), "{told}");
        let cache = KvCache::new(GEOMETRY, 1, RowDtype::F32);
        assert!(cache.with_logit_scale(Some(wrong)).is_err());
        let cache = SlidingKvCache::new(GEOMETRY, 4, 1, RowDtype::F32).unwrap();
        assert!(cache.with_logit_scale(Some(wrong)).is_err());
    }
}
