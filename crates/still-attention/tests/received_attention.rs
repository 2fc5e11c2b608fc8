//! What only the router of attention received can get wrong.

mod common;

use common::{random_input, relative_rms, tensors};
use still_attention::{
    Branches, FeatureMap, HeadGeometry, HybridConfig, LinearNorm, Mode, Router, SelectionHead,
    hybrid_attention, naive,
};

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 6, num_key_value_heads: 2, head_dim: 8 };

fn config() -> HybridConfig {
    HybridConfig {
        layer: 0,
        mode: Mode::Hybrid,
        chunk: 8,
        router: Router::ReceivedAttention,
        selection_head: SelectionHead::KvHead,
        budgets: vec![1, 3],
        cap: None,
        feature_map: FeatureMap::default(),
        feature_dim: 8,
        linear_norm: LinearNorm::Mean,
        gate: false,
        window_factor: false,
        logit_scale: None,
        branches: Branches::default(),
        key_exponents: Vec::new(),
    }
}

/// Scores in f32 against the twin's.
fn assert_scores(input: &naive::Input, config: &HybridConfig) -> Vec<f64> {
    let twin = naive::hybrid_attention(input, config, None);
    let x = tensors(input, config, |x| x as f32);
    let routing = twin.selection.clone().into();
    let got = hybrid_attention(&x.q, &x.k, &x.v, &x.weights, None, config, Some(&routing)).unwrap();
    let scores: Vec<f64> =
        got.routing.scores().unwrap().iter().map(|&score| f64::from(score)).collect();
    let error = relative_rms(&scores, &twin.score);
    assert!(error <= 1e-5, "{error:e}");
    twin.score
}

/// Token 0 has a logit some 200 above all others, and is salient once its chunk has retired.
#[test]
fn a_far_larger_salient_logit_does_not_make_the_window_vanish() {
    let config = config();
    let mut input = random_input(GEOMETRY, &config, 61, 3);
    let d = GEOMETRY.head_dim;
    for k in input.k.chunks_exact_mut(d) {
        k[0] = 0.0;
    }
    for head in input.k.chunks_exact_mut(61 * d) {
        head[0] = 200.0;
    }
    for q in input.q.chunks_exact_mut(d) {
        q[0] = 8.0_f64.sqrt();
    }
    let scores = assert_scores(&input, &config);
    assert!(scores[0] > 0.99, "{}", scores[0]);
    assert!((16..53).all(|t| scores[t] > 1e-3), "{scores:?}");
}

/// Of a softmax over 1, 2, 3 … equal logits, what each key is given can be counted.
#[test]
fn equal_logits_share_equally() {
    let config = HybridConfig { chunk: 2, budgets: vec![1, 1], ..config() };
    let mut input = random_input(GEOMETRY, &config, 7, 3);
    input.q.fill(0.0);
    let scores = assert_scores(&input, &config);
    let mean = |shares: &[f64]| shares.iter().sum::<f64>() / shares.len() as f64;
    // Queries 1, 2, 3 see 2, 3, 4 keys; 4, 5 see 3, 4; 6 sees 3.
    let (two, three, four) = (1.0 / 2.0, 1.0 / 3.0, 1.0 / 4.0);
    let expected = [
        mean(&[two, three, four]),
        mean(&[three, four]),
        mean(&[four, three, four]),
        mean(&[three, four]),
        // The second chunk to come is not there yet: the queries so far.
        mean(&[four, three]),
        three,
        0.0,
    ];
    for head in scores.chunks_exact(7) {
        assert!(relative_rms(head, &expected) < 1e-12, "{head:?}");
    }
}
