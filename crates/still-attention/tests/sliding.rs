//! Attention to a window of the last tokens against its naive twin, gradients included, and its cache against it in any split.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{flat, relative_rms};
use still_attention::{
    AttentionRows, AttentionState, HeadGeometry, RowDtype, SlidingKvCache, naive,
    sliding_attention, sliding_attention_backward,
};
use still_testing::random;

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 6 };

/// Rows of `batch` sequences in f64.
fn rows(batch: usize, tokens: usize, seed: u64) -> [Tensor; 3] {
    let HeadGeometry { num_heads, num_key_value_heads: kv, head_dim: d } = GEOMETRY;
    [(num_heads, 0), (kv, 1), (kv, 2)]
        .map(|(heads, n)| random(&[batch, heads, tokens, d], seed + n))
}

/// Scales of logits: the usual one, and one of a model's own.
const SCALES: [Option<f64>; 2] = [None, Some(0.7)];

/// The twin, sequence by sequence.
fn expected(rows: &[Tensor; 3], window: usize, scale: Option<f64>) -> Vec<f64> {
    let scale = scale.unwrap_or((GEOMETRY.head_dim as f64).powf(-0.5));
    let (batch, _, tokens, _) = rows[0].dims4().unwrap();
    let one = |n: usize| {
        let [q, k, v] = rows.each_ref().map(|x| flat(&x.get(n).unwrap()));
        naive::sliding_attention(GEOMETRY, (tokens, window), scale, [&q, &k, &v])
    };
    (0..batch).flat_map(one).collect()
}

fn narrow(rows: &[Tensor; 3]) -> [Tensor; 3] {
    rows.each_ref().map(|x| x.to_dtype(DType::F32).unwrap())
}

/// Windows of one token, of a part of a block and beyond the sequence; sequences of one token and of several blocks.
const CASES: [(usize, usize); 7] = [(1, 1), (1, 7), (9, 1), (40, 7), (150, 70), (150, 3), (33, 64)];

#[test]
fn values_are_the_twins() {
    for ((tokens, window), scale) in CASES.into_iter().flat_map(|case| SCALES.map(|s| (case, s))) {
        let what = format!("{tokens} tokens, window {window}, scale {scale:?}");
        let rows = rows(2, tokens, 1);
        let expected = expected(&rows, window, scale);
        let [q, k, v] = &rows;
        let got = flat(&sliding_attention(q, k, v, window, scale).unwrap());
        assert!(relative_rms(&got, &expected) < 1e-12, "{what}");
        let [q, k, v] = &narrow(&rows);
        let got = flat(&sliding_attention(q, k, v, window, scale).unwrap());
        assert!(relative_rms(&got, &expected) < 1e-5, "{what}, f32");
    }
    let [q, k, v] = &rows(1, 5, 1);
    assert!(sliding_attention(q, k, v, 0, None).is_err());
    assert!(sliding_attention(q, k, &q.clone(), 3, None).is_err());
    assert!(sliding_attention(q, k, v, 3, Some(0.0)).is_err());
}

#[test]
fn gradients_are_the_twins_differences() {
    for (tokens, window, scale) in
        [(1, 4, None), (11, 4, None), (70, 9, None), (11, 4, Some(0.7)), (70, 9, Some(0.7))]
    {
        let rows = rows(1, tokens, 5);
        let toward = random(rows[0].dims(), 9);
        let vars = rows.each_ref().map(|x| Var::from_tensor(x).unwrap());
        let out = sliding_attention(&vars[0], &vars[1], &vars[2], window, scale).unwrap();
        let grads = (&out * &toward).unwrap().sum_all().unwrap().backward().unwrap();
        // The same without a graph.
        let saved = sliding_attention_backward(rows.each_ref(), &toward, window, scale).unwrap();
        let narrowed = narrow(&rows);
        let in_f32 = sliding_attention_backward(
            narrowed.each_ref(),
            &toward.to_dtype(DType::F32).unwrap(),
            window,
            scale,
        )
        .unwrap();
        let weights = flat(&toward);
        for (n, var) in vars.iter().enumerate() {
            let got = flat(grads.get(var).unwrap());
            assert_eq!(got, flat(&saved[n]));
            assert!(relative_rms(&flat(&in_f32[n]), &got) < 1e-5);
            let values = flat(&rows[n]);
            for i in (0..values.len()).step_by(5) {
                let at = |delta: f64| -> f64 {
                    let mut moved = values.clone();
                    moved[i] += delta;
                    let mut rows = rows.clone();
                    rows[n] = Tensor::from_vec(moved, rows[n].shape(), &Device::Cpu).unwrap();
                    expected(&rows, window, scale).iter().zip(&weights).map(|(x, w)| x * w).sum()
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((got[i] - numeric).abs() < 1e-7, "{n}, {i}: {} and {numeric}", got[i]);
            }
        }
    }
}

/// Feeds calls of so many tokens for each sequence, padded to the longest; outputs in order of tokens.
fn feed(
    cache: &mut SlidingKvCache,
    rows: &[Tensor; 3],
    calls: &[Vec<usize>],
) -> Vec<Vec<Vec<f64>>> {
    let batch = rows[0].dim(0).unwrap();
    let mut at = vec![0; batch];
    let mut outputs = vec![Vec::new(); batch];
    for lengths in calls {
        let longest = *lengths.iter().max().unwrap();
        let piece = |x: &Tensor| {
            let one = |n: usize| {
                let own = x.get(n).unwrap().narrow(1, at[n], lengths[n]).unwrap();
                own.pad_with_zeros(1, 0, longest - lengths[n]).unwrap()
            };
            Tensor::stack(&(0..batch).map(one).collect::<Vec<_>>(), 0)
                .unwrap()
                .contiguous()
                .unwrap()
        };
        let [q, k, v] = rows.each_ref().map(piece);
        let given = AttentionRows { q: &q, k: &k, v: &v, gate: None };
        let out = cache.advance(given, Some(lengths)).unwrap();
        for n in 0..batch {
            for token in 0..lengths[n] {
                outputs[n].push(flat(&out.get(n).unwrap().narrow(1, token, 1).unwrap()));
            }
            at[n] += lengths[n];
        }
    }
    outputs
}

#[test]
fn the_cache_is_the_operator_in_any_split() {
    const TOKENS: usize = 61;
    let rows = narrow(&rows(2, TOKENS, 3));
    for window in [1, 5, 16, 20, 100] {
        let whole = sliding_attention(&rows[0], &rows[1], &rows[2], window, None).unwrap();
        for calls in [
            vec![vec![61, 61]],
            vec![vec![1, 1]; 61],
            vec![vec![3, 0], vec![40, 17], vec![1, 1], vec![17, 43]],
            vec![vec![20, 61], vec![41, 0]],
        ] {
            for (dtype, bound) in
                [(RowDtype::F32, 1e-5), (RowDtype::Bf16, 1e-2), (RowDtype::Int8, 2e-2)]
            {
                let mut cache = SlidingKvCache::new(GEOMETRY, window, 2, dtype).unwrap();
                let outputs = feed(&mut cache, &rows, &calls);
                for (n, tokens) in outputs.iter().enumerate() {
                    assert_eq!((tokens.len(), cache.position(n)), (TOKENS, TOKENS));
                    for (token, got) in tokens.iter().enumerate() {
                        let expected = flat(&whole.get(n).unwrap().narrow(1, token, 1).unwrap());
                        let error = relative_rms(got, &expected);
                        assert!(
                            error < bound,
                            "{dtype:?}, window {window}, token {token}: {error}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn memory_is_that_of_the_window() {
    let rows = narrow(&rows(1, 90, 7));
    let mut cache = SlidingKvCache::new(GEOMETRY, 32, 1, RowDtype::Bf16).unwrap();
    let size = still_attention::HeadSize {
        chunk: 4,
        head_dim: GEOMETRY.head_dim,
        feature_dim: 0,
        cap: None,
        rows: RowDtype::Bf16,
    };
    let mut fed = 0;
    for tokens in [1, 9, 21, 2, 50, 7] {
        let [q, k, v] = rows.each_ref().map(|x| x.narrow(2, fed, tokens).unwrap());
        cache.advance(AttentionRows { q: &q, k: &k, v: &v, gate: None }, None).unwrap();
        fed += tokens;
        let heads = GEOMETRY.num_key_value_heads;
        assert_eq!(cache.size_bytes(), heads * size.sliding_bytes(32, fed), "{fed} tokens");
    }
    // Keys lie in tiles of 16 rows; values of 6 channels take 2 bytes each.
    assert_eq!(cache.size_bytes(), 2 * (32 + 32) * 6 * 2);
}
