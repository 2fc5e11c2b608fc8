//! One layer of SmolLM2-135M's shape (9 query heads, 3 KV heads of 64, 4 of 64 kept): reading, a step, training.
//!
//! `cargo bench -p still-attention`. Throughput is in tokens.

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use still_attention::{
    HeadGeometry, HybridState, HybridWeights, KvCache, PreparedWeights, RowDtype, StillConfig,
    dense_attention, hybrid_attention,
};

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 9, num_key_value_heads: 3, head_dim: 64 };

fn values(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|i| ((i * 7919 + seed) as f32 * 0.618).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn weights() -> HybridWeights {
    HybridWeights {
        feature_map_q: values(&[9, 64, 64], 4),
        feature_map_k: values(&[3, 64, 64], 5),
        householder_q: None,
        householder_k: None,
        log_lambda: Some(values(&[9], 6)),
        window_factor: None,
    }
}

fn inputs(tokens: usize) -> [Tensor; 3] {
    [values(&[1, 9, tokens, 64], 1), values(&[1, 3, tokens, 64], 2), values(&[1, 3, tokens, 64], 3)]
}

fn operator(criterion: &mut Criterion) {
    let config = StillConfig::uniform(1, GEOMETRY, 64, 4).layer(0).unwrap();
    let prepared: Arc<PreparedWeights> =
        PreparedWeights::new(GEOMETRY, &config, &weights()).unwrap();

    let mut group = criterion.benchmark_group("read 256 tokens");
    group.sample_size(20).throughput(Throughput::Elements(256));
    let [q, k, v] = inputs(256);
    for context in [0, 2048, 7680] {
        let [long_q, long_k, long_v] = inputs(context.max(1));
        let mut state = HybridState::new(prepared.clone(), 1, RowDtype::F32);
        state.advance(&long_q, &long_k, &long_v, None, None).unwrap();
        group.bench_function(BenchmarkId::new("hybrid", context), |bencher| {
            bencher.iter_batched_ref(
                || state.clone(),
                |state| state.advance(&q, &k, &v, None, None).unwrap(),
                criterion::BatchSize::LargeInput,
            );
        });
        let mut cache = KvCache::new(GEOMETRY, 1, RowDtype::F32);
        cache.advance(&long_q, &long_k, &long_v, None).unwrap();
        group.bench_function(BenchmarkId::new("dense", context), |bencher| {
            bencher.iter_batched_ref(
                || cache.clone(),
                |cache| cache.advance(&q, &k, &v, None).unwrap(),
                criterion::BatchSize::LargeInput,
            );
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("one token");
    group.sample_size(20);
    let [q, k, v] = inputs(1);
    for context in [512, 7680, 32_768] {
        let [long_q, long_k, long_v] = inputs(context);
        let mut state = HybridState::new(prepared.clone(), 1, RowDtype::Bf16);
        state.advance(&long_q, &long_k, &long_v, None, None).unwrap();
        group.bench_function(BenchmarkId::new("hybrid, bf16 rows", context), |bencher| {
            bencher.iter(|| state.advance(&q, &k, &v, None, None).unwrap());
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("train on 1024 tokens");
    group.sample_size(10).throughput(Throughput::Elements(1024));
    let [q, k, v] = inputs(1024);
    let vars = |x: &Tensor| Var::from_tensor(x).unwrap();
    let (map_q, map_k) = (vars(&weights().feature_map_q), vars(&weights().feature_map_k));
    let trained = HybridWeights {
        feature_map_q: map_q.as_tensor().clone(),
        feature_map_k: map_k.as_tensor().clone(),
        ..weights()
    };
    group.bench_function("attention transfer, forward and backward", |bencher| {
        bencher.iter(|| {
            let out = hybrid_attention(&q, &k, &v, &trained, None, &config, None).unwrap().out;
            out.sqr().unwrap().sum_all().unwrap().backward().unwrap()
        });
    });
    let (q, k, v) = (vars(&q), vars(&k), vars(&v));
    group.bench_function("finetuning, forward and backward", |bencher| {
        bencher.iter(|| {
            let out = hybrid_attention(&q, &k, &v, &trained, None, &config, None).unwrap().out;
            out.sqr().unwrap().sum_all().unwrap().backward().unwrap()
        });
    });
    group.bench_function("the teacher's attention", |bencher| {
        bencher.iter(|| dense_attention(&q, &k, &v, None).unwrap());
    });
    group.finish();
}

criterion_group!(benches, operator);
criterion_main!(benches);
