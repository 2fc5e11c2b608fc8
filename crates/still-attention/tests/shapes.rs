//! The kernels against the float64 twin at the head counts and widths of real models, over several chunks and at odd lengths.

mod common;

use candle_core::{Tensor, Var};
use common::{flat, random_input, relative_rms, tensors};
use still_attention::{
    Branches, FeatureMap, HeadGeometry, HybridConfig, HybridState, HybridWeights, LinearNorm,
    PreparedWeights, Router, RowDtype, SelectionHead, hybrid_attention, naive,
};

/// `(query heads, KV heads, head dim)`: groups of 1, 3, 4 and 8.
const SHAPES: [(usize, usize, usize); 5] =
    [(2, 2, 80), (9, 3, 64), (4, 1, 96), (8, 1, 128), (8, 2, 128)];

fn config(geometry: HeadGeometry, selection_head: SelectionHead) -> HybridConfig {
    let heads = geometry.selection_heads(selection_head);
    HybridConfig {
        layer: 0,
        chunk: 16,
        router: Router::SelfSaliency,
        selection_head,
        // Ragged: none, a few, all.
        budgets: (0..heads).map(|head| [3, 0, 16, 1][head % 4]).collect(),
        cap: None,
        feature_map: FeatureMap::default(),
        feature_dim: geometry.head_dim,
        linear_norm: LinearNorm::Mean,
        gate: false,
        branches: Branches::default(),
    }
}

#[test]
fn every_shape_equals_the_twin_whole_and_step_by_step() {
    for (num_heads, num_key_value_heads, head_dim) in SHAPES {
        let geometry = HeadGeometry { num_heads, num_key_value_heads, head_dim };
        for selection_head in [SelectionHead::KvHead, SelectionHead::QueryHead] {
            for tokens in [1, 37, 75] {
                let config = config(geometry, selection_head);
                let input = random_input(geometry, &config, tokens, 7);
                let twin = naive::hybrid_attention(&input, &config, None);
                let x = tensors(&input, &config, |x| x as f32);
                let whole =
                    hybrid_attention(&x.q, &x.k, &x.v, &x.weights, None, &config, None).unwrap();
                let shape = (num_heads, num_key_value_heads, head_dim, tokens);
                assert_eq!(whole.selection, twin.selection, "{shape:?}");
                let error = relative_rms(&flat(&whole.out), &twin.out);
                assert!(error <= 1e-5, "{shape:?}: {error:e}");

                let weights = PreparedWeights::new(geometry, &config, &x.weights).unwrap();
                let mut state = HybridState::new(weights, 1, RowDtype::F32);
                let row = |x: &Tensor, t| x.narrow(2, t, 1).unwrap();
                let steps: Vec<Tensor> = (0..tokens)
                    .map(|t| {
                        let (q, k, v) = (row(&x.q, t), row(&x.k, t), row(&x.v, t));
                        state.advance(&q, &k, &v, None, None).unwrap()
                    })
                    .collect();
                let error = relative_rms(&flat(&Tensor::cat(&steps, 2).unwrap()), &twin.out);
                assert!(error <= 1e-5, "{shape:?}, step by step: {error:e}");
            }
        }
    }
}

/// Along one random direction in all inputs and weights at once: a directional derivative costs the twin two runs.
#[test]
fn every_shape_has_the_gradient_of_the_twin() {
    for (num_heads, num_key_value_heads, head_dim) in SHAPES {
        let geometry = HeadGeometry { num_heads, num_key_value_heads, head_dim };
        for selection_head in [SelectionHead::KvHead, SelectionHead::QueryHead] {
            let config = config(geometry, selection_head);
            let input = random_input(geometry, &config, 75, 7);
            let direction = random_input(geometry, &config, 75, 8);
            let twin = naive::hybrid_attention(&input, &config, None);
            let x = tensors(&input, &config, |x| x);
            let var = |tensor: &Tensor| Var::from_tensor(tensor).unwrap();
            let (q, k, v) = (var(&x.q), var(&x.k), var(&x.v));
            let (map_q, map_k) = (var(&x.weights.feature_map_q), var(&x.weights.feature_map_k));
            let log_lambda = var(x.weights.log_lambda.as_ref().unwrap());
            let weights = HybridWeights {
                feature_map_q: map_q.as_tensor().clone(),
                feature_map_k: map_k.as_tensor().clone(),
                log_lambda: Some(log_lambda.as_tensor().clone()),
                ..x.weights.clone()
            };
            let selection = Some(&twin.selection);
            let out = hybrid_attention(&q, &k, &v, &weights, None, &config, selection).unwrap().out;
            let grads = out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let along: f64 = [
                (&q, &direction.q),
                (&k, &direction.k),
                (&v, &direction.v),
                (&map_q, &direction.feature_map_q),
                (&map_k, &direction.feature_map_k),
                (&log_lambda, direction.log_lambda.as_ref().unwrap()),
            ]
            .into_iter()
            .map(|(var, direction)| {
                let gradient = flat(grads.get(var).unwrap());
                gradient.iter().zip(direction).map(|(g, d)| g * d).sum::<f64>()
            })
            .sum();

            let objective = |step: f64| -> f64 {
                let mut moved = input.clone();
                let add = |to: &mut Vec<f64>, direction: &Vec<f64>| {
                    to.iter_mut().zip(direction).for_each(|(to, d)| *to += step * d);
                };
                add(&mut moved.q, &direction.q);
                add(&mut moved.k, &direction.k);
                add(&mut moved.v, &direction.v);
                add(&mut moved.feature_map_q, &direction.feature_map_q);
                add(&mut moved.feature_map_k, &direction.feature_map_k);
                let log_lambda = moved.log_lambda.as_mut().unwrap();
                add(log_lambda, direction.log_lambda.as_ref().unwrap());
                let out = naive::hybrid_attention(&moved, &config, selection).out;
                out.iter().map(|x| x * x).sum()
            };
            let numeric = (objective(1e-6) - objective(-1e-6)) / 2e-6;
            let shape = (num_heads, num_key_value_heads, head_dim, selection_head);
            let error = (along - numeric).abs() / numeric.abs();
            assert!(error < 1e-6, "{shape:?}: {along} vs {numeric}");
        }
    }
}
