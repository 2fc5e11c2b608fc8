//! What each branch carries, against the naive twin: with indicators for values and the linear numerator gated off, an output *is* a share.

mod common;

use common::{random_input, tensors};
use still_attention::{
    BranchShares, Branches, FeatureMap, HeadGeometry, HybridConfig, LinearNorm, Mode, Router,
    SelectionHead, branch_shares, naive,
};

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 8 };
const CHUNK: usize = 6;
/// The third chunk is the last, so that every mean is over its queries.
const TOKENS: usize = 3 * CHUNK;

fn config() -> HybridConfig {
    HybridConfig {
        layer: 0,
        mode: Mode::Hybrid,
        chunk: CHUNK,
        router: Router::SelfSaliency,
        selection_head: SelectionHead::KvHead,
        budgets: vec![2, 4],
        cap: None,
        feature_map: FeatureMap::NpMap { householder: true },
        feature_dim: 5,
        linear_norm: LinearNorm::Mean,
        gate: true,
        window_factor: true,
        logit_scale: None,
        branches: Branches::default(),
        key_exponents: Vec::new(),
    }
}

/// Shares of `input`, and the mean of the naive output over the third chunk, by query head.
fn both(input: &naive::Input, config: &HybridConfig) -> (Vec<BranchShares>, Vec<f64>) {
    let expected = naive::hybrid_attention(input, config, None);
    let tensors = tensors(input, config, |x| x as f32);
    let qkv = (&tensors.q, &tensors.k, &tensors.v);
    let shares = branch_shares(qkv, &tensors.weights, config, &expected.selection).unwrap();
    let d = GEOMETRY.head_dim;
    let means = expected.out.chunks(TOKENS * d).map(|head| {
        let rows = head.chunks(d).skip(2 * CHUNK);
        rows.map(|row| row[0]).sum::<f64>() / CHUNK as f64
    });
    (shares, means.collect())
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-6, "{a} and {b}");
}

#[test]
fn masses_are_those_of_the_naive_twin() {
    masses_are_the_twins(&config());
    masses_are_the_twins(&HybridConfig { logit_scale: Some(0.8), ..config() });
}

fn masses_are_the_twins(config: &HybridConfig) {
    let mut input = random_input(GEOMETRY, config, TOKENS, 5);
    let d = GEOMETRY.head_dim;
    input.gate = Some(vec![0.0; GEOMETRY.num_heads * TOKENS * d]);
    // 1 for what is retired: the exact part of the output is the salient mass.
    let retired = |i: usize| f64::from(u8::from(i / d % TOKENS < CHUNK));
    input.v = (0..input.v.len()).map(retired).collect();
    let (shares, salient) = both(&input, config);
    input.v = vec![1.0; input.v.len()];
    let (_, exact) = both(&input, config);
    for ((share, salient), exact) in shares.iter().zip(salient).zip(exact) {
        close(share.mass[1], salient);
        close(share.mass[2], 1.0 - exact);
        close(share.mass.iter().sum(), 1.0);
        close(share.norm.iter().sum(), 1.0);
        assert_eq!((share.norm[0], share.tokens), (0.0, CHUNK), "the window's values are zero");
        assert!(share.mass.iter().all(|&mass| mass > 0.0), "{share:?}");
    }
}

#[test]
fn branches_that_are_off_carry_nothing() {
    let on = Branches::default();
    let off = [
        Branches { salient: false, ..on },
        Branches { linear: false, ..on },
        Branches { window: false, ..on },
    ];
    for (branches, part) in off.into_iter().zip([1, 2, 0]) {
        let config = HybridConfig { branches, ..config() };
        let (shares, _) = both(&random_input(GEOMETRY, &config, TOKENS, 6), &config);
        for share in shares {
            // Without a window a token still sees itself.
            assert!(part == 0 || (share.mass[part], share.norm[part]) == (0.0, 0.0), "{share:?}");
            close(share.mass.iter().sum(), 1.0);
        }
    }
}

#[test]
fn two_chunks_have_nothing_to_share() {
    let config = config();
    let input = random_input(GEOMETRY, &config, 2 * CHUNK, 7);
    let tensors = tensors(&input, &config, |x| x as f32);
    let selection = naive::hybrid_attention(&input, &config, None).selection;
    let qkv = (&tensors.q, &tensors.k, &tensors.v);
    let shares = branch_shares(qkv, &tensors.weights, &config, &selection).unwrap();
    assert!(shares.iter().all(|share| *share == BranchShares::default()));
}
