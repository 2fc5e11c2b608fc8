//! Comparators and cases that the operator's tests share.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod case;
#[cfg(feature = "cuda")]
pub mod codes;
pub mod device;
#[cfg(feature = "cuda")]
pub mod gpu;

use candle_core::{Device, Tensor, WithDType};
use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use still_attention::{
    FeatureMap, HeadGeometry, HybridConfig, HybridWeights, KeyExponents, LinearNorm, Selection,
    naive,
};
use still_testing::Errors;

/// Relative RMS error; where all expected values are zero, the norm of the others.
pub fn relative_rms(got: &[f64], expected: &[f64]) -> f64 {
    let errors = Errors::of("relative RMS", got, expected);
    if errors.expected_norm == 0.0 { errors.norm } else { errors.relative_rms() }
}

pub fn flat(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(candle_core::DType::F64).unwrap();
    tensor.contiguous().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn tensor<T: WithDType>(values: &[f64], shape: &[usize], to: impl Fn(f64) -> T) -> Tensor {
    let values: Vec<T> = values.iter().map(|&x| to(x)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Standard normal values.
pub fn normal(rng: &mut ChaCha8Rng, count: usize, scale: f64) -> Vec<f64> {
    (0..count)
        .map(|_| {
            let (u, v): (f64, f64) = (rng.random_range(f64::EPSILON..1.0), rng.random());
            scale * (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
        })
        .collect()
}

/// A random sequence for a configuration. Channels of keys are as large as its exponents say.
pub fn random_input(
    geometry: HeadGeometry,
    config: &HybridConfig,
    tokens: usize,
    seed: u64,
) -> naive::Input {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let HeadGeometry { num_heads: h, num_key_value_heads: k, head_dim: d } = geometry;
    let s = geometry.selection_heads(config.selection_head);
    let f = config.feature_dim;
    let mut normal = |count, scale| normal(&mut rng, count, scale);
    let householder = matches!(config.feature_map, FeatureMap::NpMap { householder: true });
    // Rounded to f32, so that f32 kernels and the float64 twin see the same numbers.
    let round = |values: Vec<f64>| values.into_iter().map(|x| f64::from(x as f32)).collect();
    let mut input = naive::Input {
        geometry,
        tokens,
        q: round(normal(h * tokens * d, 1.3)),
        k: round(normal(k * tokens * d, 1.3)),
        v: round(normal(k * tokens * d, 1.0)),
        feature_map_q: round(normal(h * d * f, (d as f64).powf(-0.5))),
        feature_map_k: round(normal(s * d * f, (d as f64).powf(-0.5))),
        householder_q: householder.then(|| round(normal(h * d, 1.0))),
        householder_k: householder.then(|| round(normal(s * d, 1.0))),
        gate: config.gate.then(|| {
            round(
                normal(h * tokens * d, 1.0).into_iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            )
        }),
        log_lambda: (config.linear_norm == LinearNorm::Mean)
            .then(|| round(normal(h, 0.5).into_iter().map(|x| x + 8.0_f64.ln()).collect())),
        window_factor: config
            .window_factor
            .then(|| round(normal(h, 0.5).into_iter().map(|x| x - 2.197).collect())),
    };
    for (keys, exponents) in input.k.chunks_mut(tokens * d).zip(&config.key_exponents) {
        let exponents = exponents.values().iter().cycle();
        keys.iter_mut().zip(exponents).for_each(|(x, &e)| *x *= 2.0_f64.powi(e.into()));
    }
    input
}

/// Exponents for every KV head, no two of a head's neighbouring channels alike.
pub fn some_exponents(geometry: HeadGeometry) -> Vec<KeyExponents> {
    let of_head = |head: usize| {
        let of_channel = |c: usize| [0, -1, -7, 1, -2][(c + head) % 5];
        KeyExponents::new((0..geometry.head_dim).map(of_channel).collect()).unwrap()
    };
    (0..geometry.num_key_value_heads).map(of_head).collect()
}

/// The tensors of one sequence, `batch = 1`.
pub struct Tensors {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub gate: Option<Tensor>,
    pub weights: HybridWeights,
}

pub fn tensors<T: WithDType>(
    input: &naive::Input,
    config: &HybridConfig,
    to: impl Fn(f64) -> T + Copy,
) -> Tensors {
    let HeadGeometry { num_heads: h, num_key_value_heads: k, head_dim: d } = input.geometry;
    let s = input.geometry.selection_heads(config.selection_head);
    let (n, f) = (input.tokens, config.feature_dim);
    Tensors {
        q: tensor(&input.q, &[1, h, n, d], to),
        k: tensor(&input.k, &[1, k, n, d], to),
        v: tensor(&input.v, &[1, k, n, d], to),
        gate: input.gate.as_ref().map(|gate| tensor(gate, &[1, h, n, d], to)),
        weights: HybridWeights {
            feature_map_q: tensor(&input.feature_map_q, &[h, d, f], to),
            feature_map_k: tensor(&input.feature_map_k, &[s, d, f], to),
            householder_q: input.householder_q.as_ref().map(|u| tensor(u, &[h, d], to)),
            householder_k: input.householder_k.as_ref().map(|u| tensor(u, &[s, d], to)),
            log_lambda: input.log_lambda.as_ref().map(|l| tensor(l, &[h], to)),
            window_factor: input.window_factor.as_ref().map(|w| tensor(w, &[h], to)),
        },
    }
}

/// The Parity rule: selections may differ only among tokens whose scores differ by at most 1e-4.
///
/// `score` is the reference's, `[S, N]`. Returns how many (head, chunk, token) entries differ.
pub fn assert_same_selection(got: &Selection, expected: &Selection, score: &[f64]) -> usize {
    assert_eq!(
        (got.heads, got.tokens, got.chunk),
        (expected.heads, expected.tokens, expected.chunk)
    );
    let mut differences = 0;
    for head in 0..got.heads {
        let score = &score[head * got.tokens..(head + 1) * got.tokens];
        for chunk in 0..got.tokens.div_ceil(got.chunk) {
            let only = |a: &Selection, b: &Selection| -> Vec<usize> {
                (0..got.tokens)
                    .filter(|&t| {
                        a.is_salient(0, head, chunk, t) && !b.is_salient(0, head, chunk, t)
                    })
                    .collect()
            };
            let (ours, theirs) = (only(got, expected), only(expected, got));
            assert_eq!(ours.len(), theirs.len(), "head {head}, chunk {chunk}: different counts");
            differences += ours.len();
            for &a in &ours {
                for &b in &theirs {
                    assert!(
                        (score[a] - score[b]).abs() <= 1e-4,
                        "head {head}, chunk {chunk}: token {a} (score {}) kept instead of {b} ({})",
                        score[a],
                        score[b],
                    );
                }
            }
        }
    }
    differences
}
