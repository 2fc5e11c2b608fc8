//! StreamingLLM and LoLA: what the operator does as those methods, by their own words.

mod common;

use common::{assert_same_selection, flat, random_input, relative_rms, tensors};
use still_attention::{
    AttentionState, HeadGeometry, HybridConfig, HybridState, LinearNorm, PreparedWeights, Router,
    RowDtype, StillConfig, hybrid_attention, naive,
};

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 8 };
const CHUNK: usize = 8;

fn layer(config: StillConfig) -> HybridConfig {
    config.validate(1, GEOMETRY).unwrap();
    config.layer(0).unwrap()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Softmax attention in which a query sees the keys that `sees(query, key)` says.
fn masked_softmax(input: &naive::Input, sees: impl Fn(usize, usize) -> bool) -> Vec<f64> {
    let HeadGeometry { num_heads, num_key_value_heads, head_dim: d } = input.geometry;
    let n = input.tokens;
    let mut out = Vec::with_capacity(num_heads * n * d);
    for h in 0..num_heads {
        let kv = h * num_key_value_heads / num_heads;
        let row = |x: &'_ [f64], head: usize, t: usize| x[(head * n + t) * d..][..d].to_vec();
        for t in 0..n {
            let query = row(&input.q, h, t);
            let weight = |j: usize| (dot(&query, &row(&input.k, kv, j)) / (d as f64).sqrt()).exp();
            let seen: Vec<(usize, f64)> =
                (0..=t).filter(|&j| sees(t, j)).map(|j| (j, weight(j))).collect();
            let sum: f64 = seen.iter().map(|(_, weight)| weight).sum();
            out.extend((0..d).map(|e| {
                seen.iter().map(|&(j, w)| w * row(&input.v, kv, j)[e]).sum::<f64>() / sum
            }));
        }
    }
    out
}

/// Output and state of a sequence that comes in pieces of `piece` tokens.
fn in_pieces(input: &naive::Input, config: &HybridConfig, piece: usize) -> (Vec<f64>, HybridState) {
    let x = tensors(input, config, |x| x as f32);
    let weights = PreparedWeights::new(GEOMETRY, config, &x.weights).unwrap();
    let mut state = HybridState::new(weights, 1, RowDtype::F32);
    let parts: Vec<_> = (0..input.tokens)
        .step_by(piece)
        .map(|start| {
            let length = piece.min(input.tokens - start);
            let [q, k, v] = [&x.q, &x.k, &x.v].map(|x| x.narrow(2, start, length).unwrap());
            state.advance(&q, &k, &v, None, None).unwrap()
        })
        .collect();
    (flat(&candle_core::Tensor::cat(&parts, 2).unwrap()), state)
}

#[test]
fn streaming_llm_sees_its_window_and_the_first_tokens() {
    for sinks in [0, 1, 4, CHUNK] {
        let config = layer(StillConfig::streaming_llm(1, GEOMETRY, CHUNK, sinks));
        for tokens in [1, 7, 16, 17, 24, 25, 61] {
            let input = random_input(GEOMETRY, &config, tokens, 5);
            let in_window = |t: usize, j: usize| j / CHUNK + 1 >= t / CHUNK;
            let expected = masked_softmax(&input, |t, j| j < sinks || in_window(t, j));
            let twin = naive::hybrid_attention(&input, &config, None);
            assert!(relative_rms(&twin.out, &expected) < 1e-12, "{sinks} sinks, {tokens} tokens");
            let x = tensors(&input, &config, |x| x);
            let kernel = hybrid_attention(&x.q, &x.k, &x.v, &x.weights, None, &config, None);
            let kernel = kernel.unwrap();
            assert!(relative_rms(&flat(&kernel.out), &expected) < 1e-10);
            assert_eq!(*kernel.routing.selection().unwrap(), twin.selection);
            for piece in [tokens, 5, 1] {
                let (out, state) = in_pieces(&input, &config, piece);
                assert!(relative_rms(&out, &expected) < 1e-5, "in pieces of {piece}");
                let kept = if tokens > 2 * CHUNK { sinks as u32 } else { 0 };
                let salient = state.salient_positions(0, 1).unwrap();
                assert_eq!(salient, (0..kept).collect::<Vec<_>>());
                assert_eq!(state.linear(0, 1).count, 0);
            }
        }
    }
}

#[test]
fn streaming_llm_needs_the_same_memory_for_any_length() {
    let config = layer(StillConfig::streaming_llm(1, GEOMETRY, CHUNK, 4));
    let bytes = |tokens: usize| {
        in_pieces(&random_input(GEOMETRY, &config, tokens, 1), &config, 1).1.size_bytes()
    };
    assert_eq!(bytes(20), bytes(150));
}

#[test]
fn self_recall_is_scored_and_selected_as_the_twin_does() {
    for cache in [0, 1, 5, 20] {
        let config = layer(StillConfig::lola(1, GEOMETRY, CHUNK, cache));
        for seed in 0..6 {
            let input = random_input(GEOMETRY, &config, 75, seed);
            let twin = naive::hybrid_attention(&input, &config, None);
            let x = tensors(&input, &config, |x| x);
            let own = hybrid_attention(&x.q, &x.k, &x.v, &x.weights, None, &config, None).unwrap();
            let selection = own.routing.selection().unwrap();
            assert_eq!(assert_same_selection(&selection, &twin.selection, &twin.score), 0);
            assert!(relative_rms(&flat(&own.out), &twin.out) < 1e-10);
            let scores = own.routing.scores().unwrap();
            let scores: Vec<f64> = scores.iter().map(|&score| score.into()).collect();
            assert!(relative_rms(&scores, &twin.score) < 1e-6);
            let whole = in_pieces(&input, &config, 75);
            for piece in [1, 3, CHUNK, 50] {
                let (out, state) = in_pieces(&input, &config, piece);
                assert!(relative_rms(&out, &whole.0) < 1e-5, "in pieces of {piece}");
                for head in 0..2 {
                    let kept = state.salient_positions(0, head).unwrap();
                    assert_eq!(kept, whole.1.salient_positions(0, head).unwrap());
                    // 75 tokens: chunks 0 to 7 have retired, chunk 8 and the begun one are the window.
                    assert_eq!(kept.len(), cache);
                    assert_eq!(state.linear(0, head).count, 64 - cache);
                }
            }
        }
    }
}

/// Whom the cache keeps, recomputed from the definition: `S` and `z` as sums over the tokens absorbed until then.
#[test]
fn lola_keeps_the_tokens_that_are_recalled_worst_now() {
    const CACHE: usize = 6;
    let config = layer(StillConfig::lola(1, GEOMETRY, CHUNK, CACHE));
    let input = random_input(GEOMETRY, &config, 60, 9);
    let twin = naive::hybrid_attention(&input, &config, None);
    let (n, d) = (input.tokens, GEOMETRY.head_dim);
    for head in 0..2 {
        let row = |x: &'_ [f64], t: usize| x[(head * n + t) * d..][..d].to_vec();
        let phi = |t: usize| {
            let map = &input.feature_map_k[head * d * d..(head + 1) * d * d];
            naive::feature_row(config.feature_map, &row(&input.k, t), map, None)
        };
        let error = |t: usize, absorbed: &[usize]| {
            let weights: Vec<f64> = absorbed.iter().map(|&j| dot(&phi(t), &phi(j))).collect();
            let sum: f64 = weights.iter().sum();
            let value = row(&input.v, t);
            let recalled = |e: usize| -> f64 {
                let terms = absorbed.iter().zip(&weights).map(|(&j, w)| w * row(&input.v, j)[e]);
                if absorbed.is_empty() { 0.0 } else { terms.sum::<f64>() / sum }
            };
            (0..d).map(|e| (recalled(e) - value[e]).powi(2)).sum::<f64>()
        };
        let (mut cached, mut absorbed): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
        let mut rescored = false;
        for chunk in 2..n.div_ceil(CHUNK) {
            let mut candidates = cached.clone();
            candidates.extend((chunk - 2) * CHUNK..(chunk - 1) * CHUNK);
            let errors: Vec<f64> = candidates.iter().map(|&t| error(t, &absorbed)).collect();
            let mut order: Vec<usize> = (0..candidates.len()).collect();
            order.sort_by(|&a, &b| errors[b].total_cmp(&errors[a]));
            let (kept, gone) = order.split_at(CACHE);
            let tokens =
                |indices: &[usize]| indices.iter().map(|&i| candidates[i]).collect::<Vec<_>>();
            let gone = tokens(gone);
            rescored |= gone.iter().any(|t| cached.contains(t));
            cached = tokens(kept);
            absorbed.extend(gone);
            for t in 0..(chunk - 1) * CHUNK {
                let is_cached = twin.selection.is_salient(0, head, chunk, t);
                assert_eq!(is_cached, cached.contains(&t), "head {head}, chunk {chunk}, token {t}");
            }
        }
        assert!(rescored, "no cached token ever gave way to a later one");
    }
}

/// An outlier that linear attention blurs is given back exactly by the cache, from the same weights.
#[test]
fn a_cache_recalls_what_the_state_blurs() {
    let mean = |config: StillConfig| {
        layer(StillConfig { linear_norm: LinearNorm::Mean, window_factor: false, ..config })
    };
    let without = mean(StillConfig::lolcats(1, GEOMETRY, CHUNK));
    let with = mean(StillConfig::lolcats(1, GEOMETRY, CHUNK).with_recall_cache(2));
    assert_eq!((with.router, with.cap), (Router::SelfRecall, Some(2)));
    let mut input = random_input(GEOMETRY, &with, 60, 4);
    // A linear branch that leaves the exact terms their say.
    input.log_lambda = Some(vec![-6.0; 4]);
    let (n, d) = (input.tokens, GEOMETRY.head_dim);
    // The last query of every head points at token 3, whose value is like no other.
    for head in 0..2 {
        let at = (head * n + 3) * d;
        input.k[at..at + d]
            .iter_mut()
            .enumerate()
            .for_each(|(e, k)| *k = if e == 0 { 12.0 } else { 0.0 });
        input.v[at..at + d].fill(40.0);
    }
    for head in 0..4 {
        let at = (head * n + n - 1) * d;
        input.q[at..at + d]
            .iter_mut()
            .enumerate()
            .for_each(|(e, q)| *q = if e == 0 { 9.0 } else { 0.0 });
    }
    let last = |config: &HybridConfig| {
        let out = naive::hybrid_attention(&input, config, None).out;
        (0..4).map(|head| out[(head * n + n - 1) * d]).collect::<Vec<f64>>()
    };
    assert!(last(&with).iter().all(|&x| (x - 40.0).abs() < 0.5), "{:?}", last(&with));
    assert!(last(&without).iter().all(|&x| x < 30.0), "{:?}", last(&without));
}
