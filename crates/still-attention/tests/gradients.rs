//! Gradients of every input of the operator against finite differences of the naive twin, in float64.

mod common;

use candle_core::{Tensor, Var};
use common::{flat, normal, random_input, relative_rms, tensors};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use still_attention::{
    Branches, FeatureMap, HeadGeometry, HybridConfig, HybridWeights, LinearNorm, Mode, Router,
    SelectionHead, hybrid_attention, naive,
};

fn config() -> HybridConfig {
    HybridConfig {
        layer: 0,
        mode: Mode::Hybrid,
        chunk: 4,
        router: Router::SelfSaliency,
        selection_head: SelectionHead::KvHead,
        budgets: vec![1, 3],
        cap: None,
        feature_map: FeatureMap::NpMap { householder: true },
        feature_dim: 3,
        linear_norm: LinearNorm::Mean,
        gate: true,
        window_factor: false,
        logit_scale: None,
        branches: Branches::default(),
        key_exponents: Vec::new(),
    }
}

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 4 };
const TOKENS: usize = 19;

/// Checks `d(Σ out ⊙ weight)` for every input value.
fn check(config: &HybridConfig, seed: u64) {
    let input = random_input(GEOMETRY, config, TOKENS, seed);
    let reference = naive::hybrid_attention(&input, config, None);
    let mut rng = ChaCha8Rng::seed_from_u64(seed + 1);
    let weight = normal(&mut rng, reference.out.len(), 1.0);

    // The kernel's gradients, every input a variable.
    let x = tensors(&input, config, |x| x);
    let var = |tensor: &Tensor| Var::from_tensor(tensor).unwrap();
    let optional = |tensor: &Option<Tensor>| tensor.as_ref().map(var);
    let (q, k, v) = (var(&x.q), var(&x.k), var(&x.v));
    let gate = optional(&x.gate);
    let (map_q, map_k) = (var(&x.weights.feature_map_q), var(&x.weights.feature_map_k));
    let (u_q, u_k) = (optional(&x.weights.householder_q), optional(&x.weights.householder_k));
    let log_lambda = optional(&x.weights.log_lambda);
    let window_factor = optional(&x.weights.window_factor);
    let inner = |var: &Option<Var>| var.as_ref().map(|var| var.as_tensor().clone());
    let weights = HybridWeights {
        feature_map_q: map_q.as_tensor().clone(),
        feature_map_k: map_k.as_tensor().clone(),
        householder_q: inner(&u_q),
        householder_k: inner(&u_k),
        log_lambda: inner(&log_lambda),
        window_factor: inner(&window_factor),
    };
    let routing = reference.selection.clone().into();
    let got =
        hybrid_attention(&q, &k, &v, &weights, gate.as_deref(), config, Some(&routing)).unwrap();
    assert!(relative_rms(&flat(&got.out), &reference.out) < 1e-10);
    let shape = got.out.shape().clone();
    let weight_tensor = Tensor::from_vec(weight.clone(), shape, got.out.device()).unwrap();
    let grads = (got.out * weight_tensor).unwrap().sum_all().unwrap().backward().unwrap();

    // Central differences of the twin, the selection held.
    let objective = |input: &naive::Input| -> f64 {
        let out = naive::hybrid_attention(input, config, Some(&reference.selection)).out;
        out.iter().zip(&weight).map(|(o, w)| o * w).sum()
    };
    type Field = fn(&mut naive::Input) -> Option<&mut Vec<f64>>;
    let fields: [(&str, Option<&Var>, Field); 10] = [
        ("q", Some(&q), |i| Some(&mut i.q)),
        ("k", Some(&k), |i| Some(&mut i.k)),
        ("v", Some(&v), |i| Some(&mut i.v)),
        ("feature_map_q", Some(&map_q), |i| Some(&mut i.feature_map_q)),
        ("feature_map_k", Some(&map_k), |i| Some(&mut i.feature_map_k)),
        ("householder_q", u_q.as_ref(), |i| i.householder_q.as_mut()),
        ("householder_k", u_k.as_ref(), |i| i.householder_k.as_mut()),
        ("gate", gate.as_ref(), |i| i.gate.as_mut()),
        ("log_lambda", log_lambda.as_ref(), |i| i.log_lambda.as_mut()),
        ("window_factor", window_factor.as_ref(), |i| i.window_factor.as_mut()),
    ];
    for (name, var, field) in fields {
        let mut probe = input.clone();
        let Some(len) = field(&mut probe).map(|values| values.len()) else {
            assert!(var.is_none());
            continue;
        };
        let numeric: Vec<f64> = (0..len)
            .map(|i| {
                let at = |delta: f64| {
                    let mut moved = input.clone();
                    field(&mut moved).unwrap()[i] += delta;
                    objective(&moved)
                };
                let h = 1e-5;
                (at(h) - at(-h)) / (2.0 * h)
            })
            .collect();
        let analytic = match grads.get(var.unwrap()) {
            Some(grad) => flat(grad),
            None => vec![0.0; len],
        };
        let error = relative_rms(&analytic, &numeric);
        assert!(error < 1e-6, "{name}: relative RMS {error:e}");
        let moves = numeric.iter().any(|g| g.abs() > 1e-8);
        assert!(moves || !config.branches.linear, "{name}: a gradient of zero checks nothing");
    }
}

#[test]
fn all_inputs_with_everything_on() {
    check(&config(), 1);
}

#[test]
fn summed_state_without_gate_or_reflection() {
    let config = HybridConfig {
        linear_norm: LinearNorm::Sum,
        gate: false,
        feature_map: FeatureMap::NpMap { householder: false },
        ..config()
    };
    check(&config, 2);
}

#[test]
fn softmax_feature_map() {
    check(&HybridConfig { feature_map: FeatureMap::Softmax, ..config() }, 3);
}

#[test]
fn a_window_factor_over_a_sum_and_over_a_mean() {
    let sum = HybridConfig { linear_norm: LinearNorm::Sum, window_factor: true, ..config() };
    check(&sum, 9);
    check(&HybridConfig { window_factor: true, ..config() }, 10);
    // LoLCATs.
    let (feature_map, gate) = (FeatureMap::Softmax, false);
    check(
        &HybridConfig { budgets: vec![0, 0], router: Router::None, feature_map, gate, ..sum },
        11,
    );
}

#[test]
fn linear_attention_alone() {
    let linear_only = HybridConfig {
        mode: Mode::LinearOnly,
        budgets: vec![0, 0],
        router: Router::None,
        linear_norm: LinearNorm::Sum,
        gate: false,
        ..config()
    };
    check(&linear_only, 13);
    check(&HybridConfig { feature_map: FeatureMap::Softmax, ..linear_only.clone() }, 14);
    let (selection_head, budgets) = (SelectionHead::QueryHead, vec![0; 4]);
    check(&HybridConfig { selection_head, budgets, ..linear_only }, 15);
}

#[test]
fn attention_received() {
    check(&HybridConfig { router: Router::ReceivedAttention, ..config() }, 12);
}

#[test]
fn self_recall_with_a_cap() {
    let config = HybridConfig { router: Router::SelfRecall, cap: Some(5), ..config() };
    check(&config, 13);
}

#[test]
fn query_head_routing() {
    let config = HybridConfig {
        selection_head: SelectionHead::QueryHead,
        budgets: vec![0, 1, 4, 2],
        ..config()
    };
    check(&config, 4);
}

#[test]
fn a_cap_with_demotions() {
    check(&HybridConfig { cap: Some(4), ..config() }, 5);
}

/// Queries reach the output through scaled logits and through unscaled feature maps.
#[test]
fn a_scale_of_the_models_own() {
    let config = HybridConfig { logit_scale: Some(0.9), ..config() };
    check(&config, 16);
    check(&HybridConfig { window_factor: true, cap: Some(4), ..config.clone() }, 17);
    let config = HybridConfig { logit_scale: Some(0.15), gate: false, ..config };
    check(&HybridConfig { router: Router::ReceivedAttention, ..config }, 18);
}

#[test]
fn each_branch_off() {
    let on = Branches::default();
    for (seed, branches) in [
        Branches { window: false, ..on },
        Branches { salient: false, ..on },
        Branches { linear: false, ..on },
    ]
    .into_iter()
    .enumerate()
    {
        check(&HybridConfig { branches, ..config() }, 6 + seed as u64);
    }
}
