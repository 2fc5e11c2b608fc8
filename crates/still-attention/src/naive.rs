//! The operator as a slow loop in float64, token by token: the twin that every kernel is tested against.
//!
//! Nothing here is shared with a kernel but the configuration and the random router's hash: the score
//! is computed by its definition, chunks retire one token at a time, and no product is blocked.

use crate::config::{
    FeatureMap, HeadGeometry, HybridConfig, LinearNorm, MIN_DENOMINATOR, Mode, Router,
    SelectionHead,
};
use crate::router::{SALIENCY_EPSILON, random_score};
use crate::selection::Selection;

/// One sequence and the layer's weights, row-major float64.
#[derive(Clone, Debug)]
pub struct Input {
    /// Head counts.
    pub geometry: HeadGeometry,
    /// Tokens `N`.
    pub tokens: usize,
    /// `[H, N, D]` after RoPE.
    pub q: Vec<f64>,
    /// `[K, N, D]` after RoPE.
    pub k: Vec<f64>,
    /// `[K, N, D]`
    pub v: Vec<f64>,
    /// `[H, D, F]`
    pub feature_map_q: Vec<f64>,
    /// `[S, D, F]`
    pub feature_map_k: Vec<f64>,
    /// `[H, D]`
    pub householder_q: Option<Vec<f64>>,
    /// `[S, D]`
    pub householder_k: Option<Vec<f64>>,
    /// `γ`, `[H, N, D]`
    pub gate: Option<Vec<f64>>,
    /// `ℓ`, `[H]`
    pub log_lambda: Option<Vec<f64>>,
    /// `w`, `[H]`
    pub window_factor: Option<Vec<f64>>,
}

/// What the operator gives and leaves behind.
#[derive(Clone, Debug)]
pub struct Output {
    /// `[H, N, D]`
    pub out: Vec<f64>,
    /// Router scores, `[S, N]`.
    pub score: Vec<f64>,
    /// Which tokens were salient, and until when.
    pub selection: Selection,
    /// `S`, `[S, 2F, D]`
    pub state_s: Vec<f64>,
    /// `z`, `[S, 2F]`
    pub state_z: Vec<f64>,
    /// `n`, `[S]`
    pub state_count: Vec<usize>,
}

/// Softmax over a row.
fn softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.into_iter().map(|x| x / sum).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `φ(x)` of one row `x` `[D]` under `w` `[D, F]` and an optional Householder vector: `[2F]`.
pub fn feature_row(map: FeatureMap, x: &[f64], w: &[f64], householder: Option<&[f64]>) -> Vec<f64> {
    let features = w.len() / x.len();
    let mut y = x.to_vec();
    if let Some(u) = householder {
        let length = dot(u, u).sqrt();
        let along = dot(x, u) / length;
        y.iter_mut().zip(u).for_each(|(y, u)| *y -= 2.0 * along * u / length);
    }
    let mut u: Vec<f64> =
        (0..features).map(|j| (0..x.len()).map(|i| y[i] * w[i * features + j]).sum()).collect();
    if let FeatureMap::NpMap { .. } = map {
        let scale = dot(x, x).sqrt() / dot(&u, &u).sqrt().max(1e-12);
        u.iter_mut().for_each(|u| *u *= scale);
    }
    let minus: Vec<f64> = u.iter().map(|u| -u).collect();
    [softmax(&u), softmax(&minus)].concat()
}

/// Self-Saliency Score of each token of one query head, by the definition (two distributions, then their KL).
///
/// `q` and `k` are `[N, D]`.
pub fn self_saliency(q: &[f64], k: &[f64], head_dim: usize, chunk: usize) -> Vec<f64> {
    let row = |x: &'_ [f64], t: usize| x[t * head_dim..(t + 1) * head_dim].to_vec();
    let scale = (head_dim as f64).sqrt();
    (0..q.len() / head_dim)
        .map(|t| {
            let first = (t + 1).saturating_sub(chunk);
            let s: Vec<f64> = (first..=t).map(|j| dot(&row(k, j), &row(q, t)) / scale).collect();
            let a = softmax(&s);
            let mut b = softmax(&s[..s.len() - 1]);
            b.push(0.0);
            let eps = SALIENCY_EPSILON;
            a.iter().zip(&b).map(|(a, b)| a * ((a + eps) / (b + eps)).ln()).sum()
        })
        .collect()
}

/// Attention that each token of one query head receives, by the definition: the mean over the later tokens of its own
/// chunk and the next of their softmax over their local keys. Of a sequence that ends before, over those there are.
///
/// `q` and `k` are `[N, D]`.
pub fn received_attention(q: &[f64], k: &[f64], head_dim: usize, chunk: usize) -> Vec<f64> {
    let tokens = q.len() / head_dim;
    let row = |x: &'_ [f64], t: usize| x[t * head_dim..(t + 1) * head_dim].to_vec();
    let scale = (head_dim as f64).sqrt();
    let first_local = |t: usize| (t / chunk).saturating_sub(1) * chunk;
    let local: Vec<Vec<f64>> = (0..tokens)
        .map(|t| {
            let logit = |j| dot(&row(k, j), &row(q, t)) / scale;
            softmax(&(first_local(t)..=t).map(logit).collect::<Vec<f64>>())
        })
        .collect();
    (0..tokens)
        .map(|j| {
            let queries = j + 1..tokens.min((j / chunk + 2) * chunk);
            let count = queries.len().max(1) as f64;
            queries.map(|t| local[t][j - first_local(t)]).sum::<f64>() / count
        })
        .collect()
}

/// `‖φ(k)ᵀS / φ(k)ᵀz − v‖²`; an empty state recalls 0.
///
/// `phi` is `[2F]`, `s` `[2F, D]`, `z` `[2F]`, `v` `[D]`.
pub fn recall_error(phi: &[f64], s: &[f64], z: &[f64], v: &[f64]) -> f64 {
    let denominator = dot(phi, z).max(MIN_DENOMINATOR);
    let recalled = |e: usize| -> f64 {
        phi.iter().enumerate().map(|(f, phi)| phi * s[f * v.len() + e]).sum::<f64>() / denominator
    };
    v.iter().enumerate().map(|(e, v)| (recalled(e) - v) * (recalled(e) - v)).sum()
}

/// `o_t = Σ_{j≤t} φ(q_t)ᵀφ(k_j) v_j / Σ_{j≤t} φ(q_t)ᵀφ(k_j)`, as sums over tokens.
fn linear_only(input: &Input, config: &HybridConfig) -> Output {
    let HeadGeometry { num_heads, num_key_value_heads, head_dim: d } = input.geometry;
    let (n, f) = (input.tokens, config.feature_dim);
    let heads = input.geometry.selection_heads(config.selection_head);
    let map = |x: &[f64], index: usize, w: &[f64], u: &Option<Vec<f64>>, head: usize| {
        let x = &x[index * d..(index + 1) * d];
        let u = u.as_ref().map(|u| &u[head * d..(head + 1) * d]);
        feature_row(config.feature_map, x, &w[head * d * f..(head + 1) * d * f], u)
    };
    let kv_of = |s: usize| s * num_key_value_heads / heads;
    let phi_k: Vec<Vec<f64>> = (0..heads * n)
        .map(|i| {
            let row = kv_of(i / n) * n + i % n;
            map(&input.k, row, &input.feature_map_k, &input.householder_k, i / n)
        })
        .collect();
    let mut output = Output {
        out: vec![f64::NAN; num_heads * n * d],
        score: vec![0.0; heads * n],
        selection: Selection {
            chunk: config.chunk,
            batch: 1,
            heads,
            tokens: n,
            absorbed_at: (0..heads * n).map(|i| (i % n / config.chunk) as u32).collect(),
        },
        state_s: vec![0.0; heads * 2 * f * d],
        state_z: vec![0.0; heads * 2 * f],
        state_count: vec![n; heads],
    };
    for h in 0..num_heads {
        let s = h * heads / num_heads;
        for t in 0..n {
            let phi = map(&input.q, h * n + t, &input.feature_map_q, &input.householder_q, h);
            let weights: Vec<f64> = (0..=t).map(|j| dot(&phi, &phi_k[s * n + j])).collect();
            let denominator = weights.iter().sum::<f64>().max(MIN_DENOMINATOR);
            for e in 0..d {
                let value = |j: usize| input.v[(kv_of(s) * n + j) * d + e];
                let numerator: f64 = weights.iter().enumerate().map(|(j, w)| w * value(j)).sum();
                output.out[(h * n + t) * d + e] = numerator / denominator;
            }
        }
    }
    for (i, phi) in phi_k.iter().enumerate() {
        let s = i / n;
        for (c, phi) in phi.iter().enumerate() {
            output.state_z[s * 2 * f + c] += phi;
            for e in 0..d {
                let value = input.v[(kv_of(s) * n + i % n) * d + e];
                output.state_s[(s * 2 * f + c) * d + e] += phi * value;
            }
        }
    }
    output
}

/// Runs the operator over one sequence; `selection` (of one sequence) replaces the router if given.
pub fn hybrid_attention(
    input: &Input,
    config: &HybridConfig,
    selection: Option<&Selection>,
) -> Output {
    if config.mode == Mode::LinearOnly {
        return linear_only(input, config);
    }
    let HeadGeometry { num_heads, num_key_value_heads, head_dim: d } = input.geometry;
    let n = input.tokens;
    let chunk = config.chunk;
    let heads = input.geometry.selection_heads(config.selection_head);
    let group = num_heads / heads;
    let kv_of = |s: usize| s * num_key_value_heads / heads;
    let features = 2 * config.feature_dim;
    let map_size = d * config.feature_dim;
    let row = |x: &'_ [f64], head: usize, t: usize| {
        x[(head * n + t) * d..(head * n + t + 1) * d].to_vec()
    };
    let map = |x: &[f64], w: &[f64], u: &Option<Vec<f64>>, head: usize| {
        let u = u.as_ref().map(|u| &u[head * d..(head + 1) * d]);
        feature_row(config.feature_map, x, &w[head * map_size..(head + 1) * map_size], u)
    };

    let mut output = Output {
        out: vec![f64::NAN; num_heads * n * d],
        score: vec![f64::NAN; heads * n],
        selection: Selection {
            chunk,
            batch: 1,
            heads,
            tokens: n,
            absorbed_at: vec![Selection::NEVER; heads * n],
        },
        state_s: vec![0.0; heads * features * d],
        state_z: vec![0.0; heads * features],
        state_count: vec![0; heads],
    };

    for s in 0..heads {
        for t in 0..n {
            output.score[s * n + t] = match config.router {
                Router::Random { seed } => random_score(seed, config.layer, s, t),
                Router::FirstTokens => -(t as f64),
                // By queries, below, or by the state, when a chunk retires.
                Router::SelfSaliency
                | Router::ReceivedAttention
                | Router::SelfRecall
                | Router::None => 0.0,
            };
        }
        let by_queries = match config.router {
            Router::SelfSaliency => Some(self_saliency as fn(&_, &_, _, _) -> _),
            Router::ReceivedAttention => Some(received_attention as fn(&_, &_, _, _) -> _),
            Router::SelfRecall | Router::FirstTokens | Router::Random { .. } | Router::None => None,
        };
        if let Some(by_queries) = by_queries {
            let span = |head: usize| head * n * d..(head + 1) * n * d;
            for h in s * group..(s + 1) * group {
                let score: Vec<f64> =
                    by_queries(&input.q[span(h)], &input.k[span(kv_of(s))], d, chunk);
                for t in 0..n {
                    output.score[s * n + t] += score[t] / group as f64;
                }
            }
        }

        let mut score = output.score[s * n..(s + 1) * n].to_vec();
        let budget = if config.router == Router::None { 0 } else { config.budgets[s] };
        let mut kept: Vec<usize> = Vec::new();
        for t in 0..n {
            let c = t / chunk;
            if t % chunk == 0 && c >= 2 {
                let arriving: Vec<usize> = ((c - 2) * chunk..(c - 1) * chunk).collect();
                if config.router == Router::SelfRecall {
                    for &j in kept.iter().chain(&arriving) {
                        let key = row(&input.k, kv_of(s), j);
                        let phi = map(&key, &input.feature_map_k, &input.householder_k, s);
                        let span = s * features..(s + 1) * features;
                        let (state_s, state_z) =
                            (&output.state_s[span.start * d..span.end * d], &output.state_z[span]);
                        score[j] =
                            recall_error(&phi, state_s, state_z, &row(&input.v, kv_of(s), j));
                    }
                    for &j in &arriving {
                        output.score[s * n + j] = score[j];
                    }
                }
                let by_rank = |a: &usize, b: &usize| score[*b].total_cmp(&score[*a]).then(a.cmp(b));
                let mut absorbed: Vec<usize>;
                match selection {
                    Some(given) => {
                        let pool: Vec<usize> = kept.iter().chain(&arriving).copied().collect();
                        let leaves = |j: &usize| given.row(0, s)[*j] as usize == c;
                        absorbed = pool.iter().copied().filter(leaves).collect();
                        kept = pool.iter().copied().filter(|j| !leaves(j)).collect();
                    }
                    None => {
                        let mut order = arriving;
                        order.sort_by(by_rank);
                        absorbed = order.split_off(budget);
                        kept.extend(order);
                        if let Some(cap) = config.cap
                            && kept.len() > cap
                        {
                            kept.sort_by(by_rank);
                            absorbed.extend(kept.split_off(cap));
                        }
                    }
                }
                kept.sort_unstable();
                for &j in &absorbed {
                    output.selection.absorbed_at[s * n + j] = c as u32;
                    if !config.branches.linear {
                        continue;
                    }
                    let key = row(&input.k, kv_of(s), j);
                    let phi = map(&key, &input.feature_map_k, &input.householder_k, s);
                    let value = row(&input.v, kv_of(s), j);
                    for (f, phi) in phi.iter().enumerate() {
                        output.state_z[s * features + f] += phi;
                        for (e, value) in value.iter().enumerate() {
                            output.state_s[(s * features + f) * d + e] += phi * value;
                        }
                    }
                    output.state_count[s] += 1;
                }
            }

            let mut keys = if config.branches.salient { kept.clone() } else { Vec::new() };
            match config.branches.window {
                true => keys.extend(c.saturating_sub(1) * chunk..=t),
                false => keys.push(t),
            }
            for h in s * group..(s + 1) * group {
                let query = row(&input.q, h, t);
                let logits: Vec<f64> = keys
                    .iter()
                    .map(|&j| dot(&row(&input.k, kv_of(s), j), &query) / (d as f64).sqrt())
                    .collect();
                let factor =
                    input.window_factor.as_ref().map_or(1.0, |w| 1.0 / (1.0 + (-w[h]).exp()));
                let m = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let mut denominator = 0.0;
                let mut numerator = vec![0.0; d];
                for (&j, logit) in keys.iter().zip(&logits) {
                    let e = factor * (logit - m).exp();
                    denominator += e;
                    let value = row(&input.v, kv_of(s), j);
                    numerator.iter_mut().zip(&value).for_each(|(o, v)| *o += e * v);
                }
                if config.branches.linear {
                    let count = output.state_count[s].max(1) as f64;
                    let scale = match (config.linear_norm, &input.log_lambda) {
                        (LinearNorm::Mean, Some(log_lambda)) => log_lambda[h].exp() / count,
                        _ => 1.0,
                    };
                    let phi = map(&query, &input.feature_map_q, &input.householder_q, h);
                    denominator +=
                        scale * dot(&phi, &output.state_z[s * features..(s + 1) * features]);
                    for (e, o) in numerator.iter_mut().enumerate() {
                        let linear: f64 = (0..features)
                            .map(|f| phi[f] * output.state_s[(s * features + f) * d + e])
                            .sum();
                        let gate =
                            input.gate.as_ref().map_or(1.0, |gate| gate[(h * n + t) * d + e]);
                        *o += scale * gate * linear;
                    }
                }
                for (e, numerator) in numerator.into_iter().enumerate() {
                    output.out[(h * n + t) * d + e] = numerator / denominator;
                }
            }
        }
    }
    debug_assert!(config.selection_head == SelectionHead::KvHead || group == 1);
    output
}
