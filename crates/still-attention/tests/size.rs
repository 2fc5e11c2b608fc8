//! The bytes of a state, known beforehand for every format, budget, cap and length.

mod common;

use candle_core::Tensor;
use common::{random_input, tensors};
use still_attention::{
    AttentionState, HeadGeometry, HeadSize, HybridState, KvCache, PreparedWeights, RowDtype,
    SlidingKvCache, StateBytes, StillConfig,
};

const TOKENS: usize = 1000;

/// Feeds tokens one by one over `singly` of them, then in pieces, and tells of the state after each.
fn feed(
    state: &mut dyn AttentionState,
    rows: &[Tensor; 3],
    singly: usize,
    told: &dyn Fn(usize, &dyn AttentionState),
) {
    let mut done = 0;
    while done < TOKENS {
        let piece = if done < singly { 1 } else { 37 + done % 41 };
        let length = piece.min(TOKENS - done);
        let [q, k, v] = rows.each_ref().map(|x| x.narrow(2, done, length).unwrap());
        let rows = still_attention::AttentionRows { q: &q, k: &k, v: &v, gate: None };
        state.advance(rows, None).unwrap();
        done += length;
        told(done, state);
    }
}

#[test]
fn a_hybrid_state_takes_what_its_size_says() {
    for (head_dim, chunk) in [(8, 64), (37, 24), (33, 5)] {
        let geometry = HeadGeometry { num_heads: 1, num_key_value_heads: 1, head_dim };
        for (budget, cap) in [
            (0, None),
            (1, None),
            (3, Some(0)),
            (4, Some(17)),
            (4, Some(600)),
            (chunk / 2, None),
            (chunk, None),
            (chunk, Some(40)),
        ] {
            let mut still = StillConfig::uniform(1, geometry, chunk, budget);
            still.cap = cap;
            let config = still.layer(0).unwrap();
            let x = tensors(&random_input(geometry, &config, TOKENS, 3), &config, |x| x as f32);
            let weights = PreparedWeights::new(geometry, &config, &x.weights).unwrap();
            for rows in RowDtype::ALL {
                let size = HeadSize { chunk, head_dim, feature_dim: config.feature_dim, cap, rows };
                let qkv = [x.q.clone(), x.k.clone(), x.v.clone()];
                for singly in [0, 3 * chunk + 2] {
                    let mut state = HybridState::new(weights.clone(), 1, rows);
                    feed(&mut state, &qkv, singly, &|tokens, state| {
                        let got = state.bytes_by_part().unwrap();
                        let case = format!("{rows}, {budget} of {chunk}, {cap:?}, {tokens} tokens");
                        assert_eq!(got, size.bytes_by_part(budget, tokens), "{case}");
                        assert_eq!(state.size_bytes(), size.bytes(budget, tokens), "{case}");
                    });
                }
            }
        }
    }
}

#[test]
fn other_caches_count_their_parts() {
    let geometry = HeadGeometry { num_heads: 2, num_key_value_heads: 1, head_dim: 40 };
    let mut still = StillConfig::uniform(1, geometry, 8, 1);
    still.cap = None;
    let config = still.layer(0).unwrap();
    let x = tensors(&random_input(geometry, &config, TOKENS, 4), &config, |x| x as f32);
    let qkv = [x.q, x.k, x.v];
    for rows in RowDtype::ALL {
        let size = HeadSize { chunk: 8, head_dim: 40, feature_dim: 40, cap: None, rows };
        let mut sliding = SlidingKvCache::new(geometry, 50, 1, rows).unwrap();
        feed(&mut sliding, &qkv, 20, &|tokens, state| {
            let got = state.bytes_by_part().unwrap();
            assert_eq!(got, size.sliding_bytes_by_part(50, tokens), "{rows}, {tokens} tokens");
        });
        let mut dense = KvCache::new(geometry, 1, rows);
        feed(&mut dense, &qkv, 20, &|tokens, state| {
            let window = size.sliding_bytes_by_part(TOKENS, tokens);
            let StateBytes { window_rows: kept_rows, row_scales, .. } = window;
            let expected = StateBytes { kept_rows, row_scales, ..StateBytes::default() };
            assert_eq!(state.bytes_by_part(), Some(expected), "{rows}, {tokens} tokens");
            assert_eq!(state.size_bytes(), expected.total());
        });
    }
}
