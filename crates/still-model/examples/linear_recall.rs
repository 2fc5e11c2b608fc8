//! What a linear state recalls by itself in float64: the additive one of the linear branch, and those of the delta rule.
//!
//! `cargo run --release -p still-model --example linear_recall -- MODEL TEXT [TOKENS]`, one JSON object a line.
//!
//! Keys and values are a model's own over a text. Each KV head binds every value to the features of its key; then a key asks for
//! its value again. A model that is not a student has an untrained NP-Map. Asked are the last 64 tokens and 64 that are spread
//! evenly. `error` is the mean of `‖v̂ − v‖ / ‖v‖` over heads and tokens, `recalled` the share of values that lie nearer to what
//! was recalled than those of the 63 others do.

use std::error::Error;

use candle_core::{DType, Tensor};
use still_attention::FeatureMap;
use still_attention::naive::{DeltaState, feature_row};
use still_model::{Model, ModelError, StudentLayer};

/// Tokens that are asked for.
const ASKED: usize = 64;
/// Decay and rate of each delta rule.
const RULES: [(f64, f64); 4] = [(1.0, 1.0), (1.0, 0.5), (1.0, 0.1), (0.999, 0.5)];

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(model), Some(text)) = (args.next(), args.next()) else {
        return Err("usage: linear_recall MODEL TEXT [TOKENS]".into());
    };
    let tokens = args.next().map_or(Ok(4096), |tokens| tokens.parse())?;
    let model = Model::load(&model)?;
    let ids = model.tokenizer.encode(&std::fs::read_to_string(text)?, true)?;
    let ids = ids.get(..tokens).ok_or("the text is too short")?;
    for (rule, recalls) in measure(&model, ids)? {
        for (asked, recall) in ["last", "spread"].into_iter().zip(recalls) {
            let of = |sum: f64| sum / recall.asked as f64;
            let (error, recalled) = (of(recall.error), of(recall.right as f64));
            let line = serde_json::json!({
                "tokens": tokens, "rule": rule, "asked": asked, "error": error, "recalled": recalled,
            });
            println!("{line}");
        }
    }
    Ok(())
}

/// Sums over heads: relative errors, right ones, values asked for.
#[derive(Clone, Copy, Default)]
struct Recall {
    error: f64,
    right: usize,
    asked: usize,
}

impl Recall {
    fn add(&mut self, recalled: &[Vec<f64>], values: &[&Vec<f64>]) {
        for (n, got) in recalled.iter().enumerate() {
            let distance = |value: &[f64]| {
                got.iter().zip(value).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
            };
            let norm = values[n].iter().map(|x| x * x).sum::<f64>().sqrt();
            self.error += distance(values[n]) / norm.max(1e-12);
            let nearest = (0..values.len())
                .min_by(|&a, &b| distance(values[a]).total_cmp(&distance(values[b])));
            self.right += usize::from(nearest == Some(n));
            self.asked += 1;
        }
    }
}

/// `S` `[2F, D]` and `z` `[2F]` of the linear branch.
struct Additive {
    s: Vec<f64>,
    z: Vec<f64>,
}

impl Additive {
    fn absorb(&mut self, phi: &[f64], v: &[f64]) {
        for ((s, z), phi) in self.s.chunks_mut(v.len()).zip(&mut self.z).zip(phi) {
            *z += phi;
            s.iter_mut().zip(v).for_each(|(s, v)| *s += phi * v);
        }
    }

    fn recall(&self, phi: &[f64]) -> Vec<f64> {
        let d = self.s.len() / self.z.len();
        let sum: f64 = phi.iter().zip(&self.z).map(|(phi, z)| phi * z).sum();
        let of = |e| phi.iter().enumerate().map(|(f, phi)| phi * self.s[f * d + e]).sum::<f64>();
        (0..d).map(|e| of(e) / sum).collect()
    }
}

/// A rule's name, and what it recalls of the last tokens and of tokens all over.
type Measured = Vec<(String, [Recall; 2])>;

fn measure(model: &Model, ids: &[u32]) -> Result<Measured, ModelError> {
    let delta = RULES.map(|(alpha, beta)| format!("delta rule, decay {alpha}, rate {beta}"));
    let names = [vec!["additive".to_owned()], delta.to_vec()].concat();
    let mut found: Measured = names.into_iter().map(|name| (name, Default::default())).collect();
    let student = model.student.as_ref();
    let rotation = model.decoder.rotation(0, ids.len())?;
    let x = model.decoder.embed(ids)?;
    model.decoder.visit_layers::<ModelError>(x, &rotation, student, |n, layer, inputs| {
        let rows = |rows: &Tensor| rows.squeeze(0)?.to_dtype(DType::F64)?.to_vec3::<f64>();
        let (keys, values) = (rows(&inputs.k)?, rows(&inputs.v)?);
        let learned = student.and_then(|student| student.layer(n));
        for (head, (keys, values)) in keys.iter().zip(&values).enumerate() {
            one_head(&features(keys, head, learned)?, values, &mut found);
        }
        layer.softmax_attention(inputs)
    })?;
    Ok(found)
}

/// `φ_k` of every key of a head, `[N][2F]`.
fn features(
    keys: &[Vec<f64>],
    head: usize,
    learned: Option<&StudentLayer>,
) -> Result<Vec<Vec<f64>>, ModelError> {
    let d = keys[0].len();
    let identity = || (0..d * d).map(|i| f64::from(u8::from(i / d == i % d))).collect();
    let (map, w, householder) = match learned {
        None => (FeatureMap::NpMap { householder: false }, identity(), None),
        Some(StudentLayer { config, attention, .. }) => {
            let row = |tensor: &Tensor| {
                let tensor = tensor.get(head.min(tensor.dim(0)? - 1))?.flatten_all()?;
                tensor.to_dtype(DType::F64)?.to_vec1::<f64>()
            };
            let householder = attention.householder_k.as_ref().map(row).transpose()?;
            (config.feature_map, row(&attention.feature_map_k)?, householder)
        }
    };
    Ok(keys.iter().map(|key| feature_row(map, key, &w, householder.as_deref())).collect())
}

/// Adds what each rule recalls of one head's values.
fn one_head(phi: &[Vec<f64>], values: &[Vec<f64>], found: &mut Measured) {
    let (tokens, features, d) = (values.len(), phi[0].len(), values[0].len());
    let mut additive = Additive { s: vec![0.0; features * d], z: vec![0.0; features] };
    let mut delta = RULES.map(|_| DeltaState::new(features, d));
    for (phi, v) in phi.iter().zip(values) {
        additive.absorb(phi, v);
        for (state, (alpha, beta)) in delta.iter_mut().zip(RULES) {
            state.absorb(phi, v, alpha, beta);
        }
    }
    let last: Vec<usize> = (tokens.saturating_sub(ASKED)..tokens).collect();
    let spread: Vec<usize> = (0..ASKED).map(|i| i * tokens / ASKED).collect();
    for (place, asked) in [last, spread].into_iter().enumerate() {
        let wanted: Vec<&Vec<f64>> = asked.iter().map(|&t| &values[t]).collect();
        let mut rules = found.iter_mut().map(|(_, recalls)| &mut recalls[place]);
        let recalled = asked.iter().map(|&t| additive.recall(&phi[t])).collect::<Vec<_>>();
        rules.by_ref().take(1).for_each(|recall| recall.add(&recalled, &wanted));
        for (recall, state) in rules.zip(&delta) {
            let recalled = asked.iter().map(|&t| state.recall(&phi[t])).collect::<Vec<_>>();
            recall.add(&recalled, &wanted);
        }
    }
}
