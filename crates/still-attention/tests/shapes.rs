//! The kernels against the float64 twin at the head counts and widths of real models, over several chunks and at odd lengths.

mod common;

use candle_core::{Tensor, Var};
use common::{flat, random_input, relative_rms, tensors};
use still_attention::{
    Branches, FeatureMap, HeadGeometry, HybridConfig, HybridState, HybridWeights, LinearNorm, Mode,
    PreparedWeights, Router, RowDtype, SelectionHead, StillConfig, hybrid_attention, naive,
};

/// `(query heads, KV heads, head dim)`: groups of 1, 3, 4 and 8.
const SHAPES: [(usize, usize, usize); 5] =
    [(2, 2, 80), (9, 3, 64), (4, 1, 96), (8, 1, 128), (8, 2, 128)];

fn config(geometry: HeadGeometry, selection_head: SelectionHead) -> HybridConfig {
    let heads = geometry.selection_heads(selection_head);
    HybridConfig {
        layer: 0,
        mode: Mode::Hybrid,
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
        window_factor: false,
        logit_scale: None,
        branches: Branches::default(),
        key_exponents: Vec::new(),
    }
}

/// The operator as it is by default and its variants.
fn variants(geometry: HeadGeometry, selection_head: SelectionHead) -> Vec<HybridConfig> {
    let hybrid = config(geometry, selection_head);
    let received = HybridConfig { router: Router::ReceivedAttention, ..hybrid.clone() };
    let lolcats = StillConfig {
        selection_head,
        budgets: vec![vec![0; hybrid.budgets.len()]],
        ..StillConfig::lolcats(1, geometry, hybrid.chunk)
    };
    // Salient terms have the factor too.
    let factor = HybridConfig { window_factor: true, ..hybrid.clone() };
    let linear_only = StillConfig {
        selection_head,
        budgets: lolcats.budgets.clone(),
        ..StillConfig::linear_only(1, geometry, hybrid.chunk)
    };
    let lola = lolcats.clone().with_recall_cache(20);
    let [lolcats, lola, linear_only] =
        [lolcats, lola, linear_only].map(|config| config.layer(0).unwrap());
    vec![hybrid, received, lolcats, lola, factor, linear_only]
}

/// Every shape at both granularities in every variant.
fn cases() -> impl Iterator<Item = (HeadGeometry, HybridConfig)> {
    SHAPES.into_iter().flat_map(|(num_heads, num_key_value_heads, head_dim)| {
        let geometry = HeadGeometry { num_heads, num_key_value_heads, head_dim };
        [SelectionHead::KvHead, SelectionHead::QueryHead]
            .into_iter()
            .flat_map(move |selection_head| variants(geometry, selection_head))
            .map(move |config| (geometry, config))
    })
}

#[test]
fn every_shape_equals_the_twin_whole_and_step_by_step() {
    for (geometry, config) in cases() {
        for tokens in [1, 37, 75] {
            let input = random_input(geometry, &config, tokens, 7);
            let twin = naive::hybrid_attention(&input, &config, None);
            let x = tensors(&input, &config, |x| x as f32);
            let whole =
                hybrid_attention(&x.q, &x.k, &x.v, &x.weights, None, &config, None).unwrap();
            let case = (geometry, tokens, &config);
            assert_eq!(*whole.routing.selection().unwrap(), twin.selection, "{case:?}");
            let error = relative_rms(&flat(&whole.out), &twin.out);
            assert!(error <= 1e-5, "{case:?}: {error:e}");

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
            assert!(error <= 1e-5, "{case:?}, step by step: {error:e}");
        }
    }
}

/// Many queries and single ones take different kernels, of which some multiply in 16 bits: rounding is to be the same.
#[test]
fn bf16_rows_give_the_same_whole_and_step_by_step() {
    let tokens = 299;
    for (num_heads, num_key_value_heads, head_dim) in SHAPES {
        let geometry = HeadGeometry { num_heads, num_key_value_heads, head_dim };
        // Scores that no rounding changes; up to 272 salient tokens a head.
        let config =
            HybridConfig { router: Router::FirstTokens, ..config(geometry, SelectionHead::KvHead) };
        let config = HybridConfig { budgets: vec![16; config.budgets.len()], ..config };
        let input = random_input(geometry, &config, tokens, 9);
        let x = tensors(&input, &config, |x| x as f32);
        let run = |rows: RowDtype, piece: usize| {
            let weights = PreparedWeights::new(geometry, &config, &x.weights).unwrap();
            let mut state = HybridState::new(weights, 1, rows);
            let steps: Vec<Tensor> = (0..tokens)
                .step_by(piece)
                .map(|start| {
                    let part = |x: &Tensor| x.narrow(2, start, piece.min(tokens - start)).unwrap();
                    state.advance(&part(&x.q), &part(&x.k), &part(&x.v), None, None).unwrap()
                })
                .collect();
            flat(&Tensor::cat(&steps, 2).unwrap())
        };
        let whole = run(RowDtype::Bf16, tokens);
        for piece in [1, 5, 13] {
            let error = relative_rms(&run(RowDtype::Bf16, piece), &whole);
            assert!(error <= 1e-5, "{geometry:?}, {piece} at a time: {error:e}");
        }
        let error = relative_rms(&whole, &run(RowDtype::F32, tokens));
        assert!(error > 0.0 && error <= 5e-3, "{geometry:?}, against f32 rows: {error:e}");
    }
}

/// Along one random direction in all inputs and weights at once: a directional derivative costs the twin two runs.
#[test]
fn every_shape_has_the_gradient_of_the_twin() {
    for (geometry, config) in cases() {
        let input = random_input(geometry, &config, 75, 7);
        let mut direction = random_input(geometry, &config, 75, 8);
        let twin = naive::hybrid_attention(&input, &config, None);
        let x = tensors(&input, &config, |x| x);
        let var = |tensor: &Tensor| Var::from_tensor(tensor).unwrap();
        let (q, k, v) = (var(&x.q), var(&x.k), var(&x.v));
        let (map_q, map_k) = (var(&x.weights.feature_map_q), var(&x.weights.feature_map_k));
        let log_lambda = x.weights.log_lambda.as_ref().map(var);
        let window_factor = x.weights.window_factor.as_ref().map(var);
        let weights = HybridWeights {
            feature_map_q: map_q.as_tensor().clone(),
            feature_map_k: map_k.as_tensor().clone(),
            log_lambda: log_lambda.as_ref().map(|var| var.as_tensor().clone()),
            window_factor: window_factor.as_ref().map(|var| var.as_tensor().clone()),
            ..x.weights.clone()
        };
        let selection = Some(&twin.selection);
        let routing = twin.selection.clone().into();
        let out =
            hybrid_attention(&q, &k, &v, &weights, None, &config, Some(&routing)).unwrap().out;
        let grads = out.sqr().unwrap().sum_all().unwrap().backward().unwrap();

        type Field = fn(&mut naive::Input) -> Option<&mut Vec<f64>>;
        let fields: [(Option<&Var>, Field); 7] = [
            (Some(&q), |i| Some(&mut i.q)),
            (Some(&k), |i| Some(&mut i.k)),
            (Some(&v), |i| Some(&mut i.v)),
            (Some(&map_q), |i| Some(&mut i.feature_map_q)),
            (Some(&map_k), |i| Some(&mut i.feature_map_k)),
            (log_lambda.as_ref(), |i| i.log_lambda.as_mut()),
            (window_factor.as_ref(), |i| i.window_factor.as_mut()),
        ];
        let mut along = 0.0;
        let mut steps = [1e-6, -1e-6].map(|step| (step, input.clone()));
        for (var, field) in fields {
            let Some(direction) = field(&mut direction) else { continue };
            let gradient = flat(grads.get(var.unwrap()).unwrap());
            along += gradient.iter().zip(&*direction).map(|(g, d)| g * d).sum::<f64>();
            for (step, moved) in &mut steps {
                let to = field(moved).unwrap();
                to.iter_mut().zip(&*direction).for_each(|(to, d)| *to += *step * d);
            }
        }
        let [plus, minus] = steps.map(|(_, moved)| {
            let out = naive::hybrid_attention(&moved, &config, selection).out;
            out.iter().map(|x| x * x).sum::<f64>()
        });
        let numeric = (plus - minus) / 2e-6;
        let error = (along - numeric).abs() / numeric.abs();
        assert!(error < 1e-6, "{geometry:?}, {config:?}: {along} vs {numeric}");
    }
}
