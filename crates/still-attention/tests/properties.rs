//! What must hold of any input: splits, batches, causality, the two extreme budgets, caps.

mod common;

use candle_core::Tensor;
use common::{flat, random_input, relative_rms, some_exponents, tensors};
use proptest::prelude::*;
use still_attention::{
    AttentionState, Branches, FeatureMap, HeadGeometry, HybridConfig, HybridState, KvCache,
    LinearNorm, Mode, PreparedWeights, Router, RowDtype, SelectionHead, dense_attention,
    hybrid_attention, naive,
};

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 8 };

prop_compose! {
    fn configs()(
        chunk in 1_usize..9,
        router in prop_oneof![
            Just(Router::SelfSaliency),
            Just(Router::ReceivedAttention),
            Just(Router::SelfRecall),
            Just(Router::FirstTokens),
            any::<u64>().prop_map(|seed| Router::Random { seed }),
            Just(Router::None),
        ],
        per_query_head: bool,
        householder: bool,
        softmax_map: bool,
        mean: bool,
        gate: bool,
        window_factor: bool,
        feature_dim in 1_usize..9,
        cap in prop_oneof![Just(None), (0_usize..12).prop_map(Some)],
        off in 0_usize..4,
        budgets in prop::collection::vec(0_usize..9, 4),
        scaled_keys: bool,
    ) -> HybridConfig {
        let heads = if per_query_head { 4 } else { 2 };
        HybridConfig {
            layer: 3,
            mode: Mode::Hybrid,
            chunk,
            router,
            selection_head: if per_query_head { SelectionHead::QueryHead } else { SelectionHead::KvHead },
            budgets: budgets[..heads].iter().map(|&b| b.min(chunk)).collect(),
            cap,
            feature_map: if softmax_map { FeatureMap::Softmax } else { FeatureMap::NpMap { householder } },
            feature_dim,
            linear_norm: if mean { LinearNorm::Mean } else { LinearNorm::Sum },
            gate,
            window_factor,
            logit_scale: None,
            branches: Branches { window: off != 1, salient: off != 2, linear: off != 3 },
            key_exponents: if scaled_keys { some_exponents(GEOMETRY) } else { Vec::new() },
        }
    }
}

/// The configuration without anything exact.
fn linear_only(config: HybridConfig) -> HybridConfig {
    HybridConfig {
        mode: Mode::LinearOnly,
        budgets: vec![0; config.budgets.len()],
        router: Router::None,
        cap: None,
        linear_norm: LinearNorm::Sum,
        gate: false,
        window_factor: false,
        logit_scale: None,
        branches: Branches::default(),
        key_exponents: Vec::new(),
        ..config
    }
}

/// Of either mode.
fn any_config() -> impl Strategy<Value = HybridConfig> {
    prop_oneof![4 => configs(), 1 => configs().prop_map(linear_only)]
}

/// Feeds a sequence to a fresh state in pieces that end at the given cuts.
fn run_state(
    input: &naive::Input,
    config: &HybridConfig,
    cuts: &[usize],
    rows: RowDtype,
) -> (Tensor, HybridState) {
    let x = tensors(input, config, |x| x as f32);
    let weights = PreparedWeights::new(input.geometry, config, &x.weights).unwrap();
    let mut state = HybridState::new(weights, 1, rows).keeping_positions();
    let mut start = 0;
    let mut parts = Vec::new();
    for &end in cuts.iter().chain([&input.tokens]) {
        if end <= start {
            continue;
        }
        let piece = |tensor: &Tensor| tensor.narrow(2, start, end - start).unwrap();
        let gate = x.gate.as_ref().map(piece);
        parts.push(
            state.advance(&piece(&x.q), &piece(&x.k), &piece(&x.v), gate.as_ref(), None).unwrap(),
        );
        start = end;
    }
    (Tensor::cat(&parts, 2).unwrap(), state)
}

/// Whether two runs selected alike. If not, the Parity rule must excuse every difference: the twin's
/// scores of the tokens in question, over rows rounded as the state stores them, differ by at most 1e-4.
fn same_selection(
    a: &HybridState,
    b: &HybridState,
    input: &naive::Input,
    config: &HybridConfig,
    rows: RowDtype,
) -> bool {
    let mut input = input.clone();
    input.k.iter_mut().for_each(|k| {
        *k = match rows {
            RowDtype::F32 => *k,
            RowDtype::Bf16 | RowDtype::Int8 | RowDtype::Int4 => half::bf16::from_f64(*k).to_f64(),
            RowDtype::F16 => half::f16::from_f64(*k).to_f64(),
        }
    });
    let score = naive::hybrid_attention(&input, config, None).score;
    let mut same = true;
    for head in 0..heads(config) {
        let [ours, theirs] = [a, b].map(|state| state.salient_positions(0, head).unwrap());
        assert_eq!(ours.len(), theirs.len());
        for &x in ours.iter().filter(|x| !theirs.contains(x)) {
            same = false;
            for &y in theirs.iter().filter(|y| !ours.contains(y)) {
                let at = |token: u32| score[head * input.tokens + token as usize];
                assert!((at(x) - at(y)).abs() <= 1e-4, "token {x} instead of {y}");
            }
        }
    }
    same
}

fn heads(config: &HybridConfig) -> usize {
    GEOMETRY.selection_heads(config.selection_head)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn kernel_equals_the_naive_twin(config in any_config(), tokens in 1_usize..60, seed: u64) {
        let input = random_input(GEOMETRY, &config, tokens, seed);
        let twin = naive::hybrid_attention(&input, &config, None);
        let x = tensors(&input, &config, |x| x);
        let got = hybrid_attention(
            &x.q, &x.k, &x.v, &x.weights, x.gate.as_ref(), &config, Some(&twin.selection.clone().into()),
        ).unwrap();
        prop_assert!(relative_rms(&flat(&got.out), &twin.out) < 1e-10);
        for (a, b) in got.routing.scores().unwrap().iter().zip(&twin.score) {
            prop_assert!((f64::from(*a) - b).abs() < 1e-5, "{a} vs {b}");
        }
    }

    #[test]
    fn any_split_gives_the_same_output_and_state(
        config in any_config(),
        tokens in 1_usize..60,
        mut cuts in prop::collection::vec(1_usize..60, 0..6),
        seed: u64,
        rows in prop_oneof![
            Just(RowDtype::F32), Just(RowDtype::Bf16), Just(RowDtype::F16), Just(RowDtype::Int8),
            Just(RowDtype::Int4),
        ],
    ) {
        let input = random_input(GEOMETRY, &config, tokens, seed);
        cuts.retain(|&cut| cut < tokens);
        cuts.sort_unstable();
        let every: Vec<usize> = (1..tokens).collect();
        let (whole, whole_state) = run_state(&input, &config, &[], rows);
        for cuts in [&cuts, &every] {
            let (parts, state) = run_state(&input, &config, cuts, rows);
            prop_assert_eq!(state.position(0), tokens);
            if !same_selection(&state, &whole_state, &input, &config, rows) {
                continue;
            }
            prop_assert!(relative_rms(&flat(&parts), &flat(&whole)) <= 1e-5);
            for head in 0..heads(&config) {
                let (a, b) = (state.linear(0, head), whole_state.linear(0, head));
                prop_assert_eq!(a.count, b.count);
                let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
                prop_assert!(relative_rms(&wide(&a.s), &wide(&b.s)) <= 1e-5);
                prop_assert!(relative_rms(&wide(&a.z), &wide(&b.z)) <= 1e-5);
            }
            prop_assert_eq!(state.size_bytes(), whole_state.size_bytes());
        }
    }

    #[test]
    fn training_form_equals_the_state(config in any_config(), tokens in 1_usize..60, seed: u64) {
        let input = random_input(GEOMETRY, &config, tokens, seed);
        let x = tensors(&input, &config, |x| x as f32);
        let whole = hybrid_attention(
            &x.q, &x.k, &x.v, &x.weights, x.gate.as_ref(), &config, None,
        ).unwrap();
        let (stepped, _) = run_state(&input, &config, &[], RowDtype::F32);
        prop_assert!(relative_rms(&flat(&stepped), &flat(&whole.out)) <= 1e-5);
    }

    #[test]
    fn a_batch_of_unequal_lengths_equals_each_alone(
        config in any_config(),
        lengths in prop::collection::vec((0_usize..40, 0_usize..20), 1..4),
        seed: u64,
    ) {
        // Two calls, so that sequences stand at different positions in the second.
        let inputs: Vec<naive::Input> = lengths
            .iter()
            .enumerate()
            .map(|(i, (a, b))| random_input(GEOMETRY, &config, (a + b).max(1), seed.wrapping_add(i as u64)))
            .collect();
        let weights = tensors(&inputs[0], &config, |x| x as f32).weights;
        let prepared = PreparedWeights::new(GEOMETRY, &config, &weights).unwrap();
        let mut batch = HybridState::new(prepared.clone(), inputs.len(), RowDtype::F32);
        let mut alone: Vec<HybridState> =
            inputs.iter().map(|_| HybridState::new(prepared.clone(), 1, RowDtype::F32)).collect();
        for call in 0..2 {
            let spans: Vec<(usize, usize)> =
                lengths.iter().map(|&(a, b)| if call == 0 { (0, a) } else { (a, a + b) }).collect();
            let widest = spans.iter().map(|(a, b)| b - a).max().unwrap().max(1);
            let stack = |pick: &dyn Fn(&naive::Input) -> Option<Tensor>| -> Option<Tensor> {
                let rows: Option<Vec<Tensor>> = inputs.iter().zip(&spans).map(|(input, &(a, b))| {
                    let piece = pick(input)?.narrow(2, a, b - a).unwrap();
                    // Padding is NaN: whatever reads it shows.
                    let (_, heads, _, d) = piece.dims4().unwrap();
                    let pad = Tensor::full(f32::NAN, (1, heads, widest - (b - a), d), piece.device()).unwrap();
                    Some(Tensor::cat(&[piece, pad], 2).unwrap())
                }).collect();
                Some(Tensor::cat(&rows?, 0).unwrap())
            };
            let tensors_of = |input: &naive::Input| tensors(input, &config, |x| x as f32);
            let (q, k, v) = (
                stack(&|i| Some(tensors_of(i).q)).unwrap(),
                stack(&|i| Some(tensors_of(i).k)).unwrap(),
                stack(&|i| Some(tensors_of(i).v)).unwrap(),
            );
            let gate = stack(&|i| tensors_of(i).gate);
            let valid: Vec<usize> = spans.iter().map(|(a, b)| b - a).collect();
            let out = batch.advance(&q, &k, &v, gate.as_ref(), Some(&valid)).unwrap();
            for (i, state) in alone.iter_mut().enumerate() {
                let row = |tensor: &Tensor| tensor.narrow(0, i, 1).unwrap().narrow(2, 0, valid[i]).unwrap();
                if valid[i] == 0 {
                    continue;
                }
                let gate = gate.as_ref().map(row);
                let one = state.advance(&row(&q), &row(&k), &row(&v), gate.as_ref(), None).unwrap();
                prop_assert!(relative_rms(&flat(&row(&out)), &flat(&one)) <= 1e-5);
            }
        }
    }

    #[test]
    fn the_future_never_changes_the_past(config in any_config(), tokens in 2_usize..60, at in 1_usize..59, seed: u64) {
        let at = at.min(tokens - 1);
        let input = random_input(GEOMETRY, &config, tokens, seed);
        let other = random_input(GEOMETRY, &config, tokens, seed ^ 1);
        let x = tensors(&input, &config, |x| x);
        let y = tensors(&other, &config, |x| x);
        let splice = |a: &Tensor, b: &Tensor| {
            Tensor::cat(&[a.narrow(2, 0, at).unwrap(), b.narrow(2, at, tokens - at).unwrap()], 2).unwrap()
        };
        let gate = x.gate.as_ref().zip(y.gate.as_ref()).map(|(a, b)| splice(a, b));
        let run = |q: &Tensor, k: &Tensor, v: &Tensor, gate: Option<&Tensor>| {
            let out = hybrid_attention(q, k, v, &x.weights, gate, &config, None).unwrap().out;
            flat(&out.narrow(2, 0, at).unwrap())
        };
        let before = run(&x.q, &x.k, &x.v, x.gate.as_ref());
        let after = run(&splice(&x.q, &y.q), &splice(&x.k, &y.k), &splice(&x.v, &y.v), gate.as_ref());
        prop_assert_eq!(before, after);
    }

    #[test]
    fn full_budget_is_dense_softmax(mut config in configs(), tokens in 1_usize..60, seed: u64) {
        config.router = Router::SelfSaliency;
        config.cap = None;
        config.branches = Branches::default();
        config.budgets = vec![config.chunk; heads(&config)];
        let input = random_input(GEOMETRY, &config, tokens, seed);
        let x = tensors(&input, &config, |x| x as f32);
        let hybrid = hybrid_attention(
            &x.q, &x.k, &x.v, &x.weights, x.gate.as_ref(), &config, None,
        ).unwrap();
        let dense = dense_attention(&x.q, &x.k, &x.v, None).unwrap();
        prop_assert!(relative_rms(&flat(&hybrid.out), &flat(&dense)) <= 1e-5);
    }

    #[test]
    fn zero_budget_is_window_plus_linear(mut config in configs(), tokens in 1_usize..60, seed: u64) {
        config.branches = Branches::default();
        config.router = Router::SelfSaliency;
        config.budgets = vec![0; heads(&config)];
        let input = random_input(GEOMETRY, &config, tokens, seed);
        let got = naive::hybrid_attention(&input, &config, None);
        let retired = tokens.saturating_sub(1) / config.chunk;
        let absorbed = retired.saturating_sub(1) * config.chunk;
        prop_assert!(got.state_count.iter().all(|&n| n == absorbed));
        let none = naive::hybrid_attention(&input, &HybridConfig { router: Router::None, ..config.clone() }, None);
        prop_assert!(relative_rms(&got.out, &none.out) < 1e-12);
        let no_salient = Branches { salient: false, ..config.branches };
        let without = HybridConfig { branches: no_salient, ..config };
        let without = naive::hybrid_attention(&input, &without, None);
        prop_assert!(relative_rms(&got.out, &without.out) < 1e-12);
    }

    #[test]
    fn a_cap_is_never_exceeded(mut config in configs(), cap in 0_usize..12, seed: u64) {
        config.cap = Some(cap);
        let tokens = 60;
        let input = random_input(GEOMETRY, &config, tokens, seed);
        let x = tensors(&input, &config, |x| x as f32);
        let weights = PreparedWeights::new(GEOMETRY, &config, &x.weights).unwrap();
        let mut state = HybridState::new(weights, 1, RowDtype::F32);
        for t in 0..tokens {
            let at = |tensor: &Tensor| tensor.narrow(2, t, 1).unwrap();
            let gate = x.gate.as_ref().map(at);
            state.advance(&at(&x.q), &at(&x.k), &at(&x.v), gate.as_ref(), None).unwrap();
            for head in 0..heads(&config) {
                prop_assert!(state.salient_positions(0, head).unwrap().len() <= cap);
            }
        }
    }

    #[test]
    fn dense_cache_split_and_batch(tokens in 1_usize..50, cut in 0_usize..50, seed: u64) {
        let config = HybridConfig {
            gate: false,
            ..some_config()
        };
        let input = random_input(GEOMETRY, &config, tokens, seed);
        let x = tensors(&input, &config, |x| x as f32);
        let whole = dense_attention(&x.q, &x.k, &x.v, None).unwrap();
        let mut cache = KvCache::new(GEOMETRY, 1, RowDtype::F32);
        let cut = cut.min(tokens);
        let mut parts = Vec::new();
        for (start, end) in [(0, cut), (cut, tokens)] {
            if end > start {
                let piece = |tensor: &Tensor| tensor.narrow(2, start, end - start).unwrap();
                parts.push(cache.advance(&piece(&x.q), &piece(&x.k), &piece(&x.v), None).unwrap());
            }
        }
        prop_assert_eq!(cache.position(0), tokens);
        // Keys lie in tiles of 16 rows.
        let rows = tokens + tokens.next_multiple_of(16);
        prop_assert_eq!(cache.size_bytes(), rows * 2 * 8 * 4);
        prop_assert!(relative_rms(&flat(&Tensor::cat(&parts, 2).unwrap()), &flat(&whole)) <= 1e-5);
    }
}

fn some_config() -> HybridConfig {
    HybridConfig {
        layer: 0,
        mode: Mode::Hybrid,
        chunk: 4,
        router: Router::SelfSaliency,
        selection_head: SelectionHead::KvHead,
        budgets: vec![1, 1],
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

#[test]
fn memory_is_constant_after_the_cap() {
    let config = HybridConfig { cap: Some(6), ..some_config() };
    let input = random_input(GEOMETRY, &config, 120, 7);
    let size = |tokens: usize| {
        let (_, state) = run_state(&naive_prefix(&input, tokens), &config, &[], RowDtype::Bf16);
        state.size_bytes()
    };
    assert_eq!(size(60), size(120));
    // The declared layout: ring, scores, salient rows with score and position, S, z, n.
    // Keys lie in tiles of 16 rows: one for the window's 8, one for the 6 salient ones.
    let (row, tile, heads) = (8 * 2, 16 * 8 * 2, 2);
    let window = tile + 8 * row + 8 * 4;
    let salient = tile + 6 * (row + 8);
    assert_eq!(size(120), heads * (window + salient + (16 * 8 + 16) * 4 + 8));
}

fn naive_prefix(input: &naive::Input, tokens: usize) -> naive::Input {
    let d = GEOMETRY.head_dim;
    let cut = |values: &Vec<f64>| -> Vec<f64> {
        values.chunks(input.tokens * d).flat_map(|head| head[..tokens * d].to_vec()).collect()
    };
    naive::Input { tokens, q: cut(&input.q), k: cut(&input.k), v: cut(&input.v), ..input.clone() }
}

#[test]
fn narrow_rows_stay_within_their_rounding() {
    let config = some_config();
    let input = random_input(GEOMETRY, &config, 200, 11);
    let (exact, exact_state) = run_state(&input, &config, &[], RowDtype::F32);
    let mut sizes = Vec::new();
    for (rows, bound) in [
        (RowDtype::F16, 1e-3),
        (RowDtype::Bf16, 5e-3),
        (RowDtype::Int8, 1e-2),
        (RowDtype::Int4, 1.5e-1),
    ] {
        let (rounded, state) = run_state(&input, &config, &[], rows);
        for head in 0..2 {
            let [a, b] =
                [&exact_state, &state].map(|state| state.salient_positions(0, head).unwrap());
            assert_eq!(a, b, "this seed has no scores within the rounding of each other");
        }
        let error = relative_rms(&flat(&rounded), &flat(&exact));
        assert!(error > 0.0 && error < bound, "{rows:?}: {error:e}");
        sizes.push(state.size_bytes());
    }
    assert!(sizes[0] == sizes[1] && sizes[2] < sizes[1] && sizes[3] < sizes[2], "{sizes:?}");
}

#[test]
fn row_formats_are_found_by_their_names() {
    for rows in RowDtype::ALL {
        assert_eq!(rows.to_string().parse::<RowDtype>().unwrap(), rows);
    }
    let told = "f64".parse::<RowDtype>().unwrap_err().to_string();
    assert!(told.contains("\"f64\"") && told.contains("f32, bf16, f16, int8, int4"), "{told}");
}
