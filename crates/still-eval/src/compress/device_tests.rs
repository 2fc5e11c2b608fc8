//! Every method on a GPU compared with the CPU: scores, then the selection, then reading on with the CPU's selection. Rows whose scores
//! are as good as equal may change places between devices, and answers with them, so that answers alone do not tell a fault.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use still_attention::RowDtype;
use still_model::random::{random_model, tiny_kernel_config};
use still_model::{Model, Weight, likeliest};
use still_testing::{Errors, assert_relative_rms, random_f32};

use super::context::{Compressor, Context};
use super::scores::Scores;
use super::select::Kept;
use super::{CompressedCache, Compression, Method};
use crate::long::random_tokens;

/// Of scores and hidden states, as of models on a GPU elsewhere.
const BOUND: f64 = 1e-3;

/// Scores that may change places: by so much of the largest of them.
const NEAR: f32 = 1e-3;

fn model() -> Model {
    random_model(tiny_kernel_config(), 3).unwrap()
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_selects_and_reads_on_as_the_cpu() {
    let gpu = still_model::device("cuda");
    let gpu = gpu.unwrap_or_else(|error| panic!("this test needs a GPU: {error}"));
    let cpu = model();
    let there = cpu.to_device(&gpu, candle_core::DType::F32).unwrap();
    compare([&cpu, &there]);
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_writes_as_the_cpu() {
    let gpu = still_model::device("cuda");
    let gpu = gpu.unwrap_or_else(|error| panic!("this test needs a GPU: {error}"));
    let cpu = model();
    let there = cpu.to_device(&gpu, candle_core::DType::F32).unwrap();
    compare_texts([&cpu, &there]);
}

/// The comparison itself: weights that differ as much as a GPU's products do.
#[test]
fn nearly_equal_models_select_and_read_on_alike() {
    compare(nearly_equal().each_ref());
}

#[test]
fn nearly_equal_models_write_alike() {
    compare_texts(nearly_equal().each_ref());
}

fn nearly_equal() -> [Model; 2] {
    let own = model();
    let mut decoder = (*own.decoder).clone();
    for (n, layer) in decoder.layers.iter_mut().enumerate() {
        let weight = layer.q_proj.weight.to_tensor().unwrap();
        let by = (random_f32(weight.dims(), n as u64) * 1e-5).unwrap();
        let shaken = (&weight + (&weight * by).unwrap()).unwrap();
        layer.q_proj.weight = Weight::Dense(shaken);
    }
    let shaken = Model { decoder: Arc::new(decoder), ..own.clone() };
    [own, shaken]
}

/// Prompts and greedy texts of the lengths that `tests/cuda.rs` has. Each side selects for itself, and says so where that differs;
/// then the second, its prompts together as a GPU takes them, follows the first's selection and texts: another token is the
/// likeliest only where both are as good as equal.
fn compare_texts(models: [&Model; 2]) {
    let prompts: Vec<Vec<u32>> =
        (0..7).map(|n| (0..90 + 400 * n).map(|i| (i * 7 + n) % 256).collect()).collect();
    for method in Method::ALL {
        let compression = Compression { method, fraction: 0.2 };
        for prompts in prompts.chunks(5) {
            let [expected, got] = models.map(|model| {
                let compressor = Compressor::new(model, compression, RowDtype::F32).unwrap();
                let read = |ids: &Vec<u32>| {
                    let (last, context) = ids.split_last().unwrap();
                    compressor.context(context, *last).unwrap()
                };
                prompts.iter().map(read).collect::<Vec<_>>()
            });
            for ((got, scores), (expected, expected_scores)) in got.iter().zip(&expected) {
                let case = format!("{}, a prompt", method.name());
                let expected = (&expected.kept, &expected_scores[..]);
                same_selection(&case, method, (&got.kept, scores), expected);
            }
            let kept = expected.iter().map(|(own, _)| &own.kept);
            let cache = |own: &Context, kept: &Kept, ids: &Vec<u32>| {
                CompressedCache::new(&own.layers, kept, ids.len() - 1, RowDtype::F32).unwrap()
            };
            let [expected, got] = [&expected, &got].map(|read| {
                let own = read.iter().zip(kept.clone()).zip(prompts);
                own.map(|(((own, _), kept), ids)| cache(own, kept, ids)).collect::<Vec<_>>()
            });
            same_texts(method, models, prompts, expected, &got.iter().collect::<Vec<_>>());
        }
    }
}

/// Twenty tokens after each prompt.
fn same_texts(
    method: Method,
    models: [&Model; 2],
    prompts: &[Vec<u32>],
    mut alone: Vec<CompressedCache>,
    together: &[&CompressedCache],
) {
    let mut together = CompressedCache::join(together).unwrap();
    let logits = |model: &Model, cache: &mut CompressedCache, ids: &[[u32; 1]]| {
        let ids: Vec<&[u32]> = ids.iter().map(<[u32; 1]>::as_slice).collect();
        let hidden = cache.feed(model, &ids).unwrap().squeeze(1).unwrap();
        model.logits(&hidden).unwrap().to_vec2::<f32>().unwrap()
    };
    let mut next: Vec<[u32; 1]> = prompts.iter().map(|ids| [*ids.last().unwrap()]).collect();
    for step in 0..20 {
        let expected: Vec<Vec<f32>> = alone
            .iter_mut()
            .zip(&next)
            .map(|(cache, id)| logits(models[0], cache, &[*id]).remove(0))
            .collect();
        let got = logits(models[1], &mut together, &next);
        for (n, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let case = format!("{}, prompt {n}, token {step}", method.name());
            assert_relative_rms(&case, got, expected, BOUND);
            let (token, other) = (likeliest(expected), likeliest(got));
            if token != other {
                let gap = expected[token as usize] - expected[other as usize];
                println!("{case}: {other} in place of {token}, {gap:e} less likely");
                assert!(gap <= NEAR * expected[token as usize].abs(), "{case}: {gap:e}");
            }
            next[n] = [token];
        }
    }
}

fn compare(models: [&Model; 2]) {
    // What comes after them differs in length too.
    let tokens = random_tokens(256, 1293, 7);
    let contexts = [90, 700, 1288].map(|context| tokens.split_at(context));
    for method in Method::ALL {
        let compression = Compression { method, fraction: 0.2 };
        let [expected, got] = models.map(|model| {
            let compressor = Compressor::new(model, compression, RowDtype::F32).unwrap();
            contexts.map(|(ids, rest)| compressor.context(ids, rest[0]).unwrap())
        });
        for ((ids, _), (got, expected)) in contexts.iter().zip(got.iter().zip(&expected)) {
            let case = format!("{} of {} tokens", method.name(), ids.len());
            let [got, expected] = [got, expected].map(|(own, scores)| (&own.kept, &scores[..]));
            same_selection(&case, method, got, expected);
        }
        let kept = expected.each_ref().map(|(own, _)| &own.kept);
        let caches = [&expected, &got].map(|read| {
            let own = read.iter().zip(kept).zip(contexts);
            own.map(|(((own, _), kept), (ids, _))| {
                CompressedCache::new(&own.layers, kept, ids.len(), RowDtype::F32).unwrap()
            })
            .collect::<Vec<_>>()
        });
        let rests = contexts.map(|(_, rest)| rest);
        let [expected, got] = [(models[0], &caches[0]), (models[1], &caches[1])]
            .map(|(model, caches)| read_on(model, &caches.iter().collect::<Vec<_>>(), &rests));
        let alone = caches[0].iter().zip(rests);
        let alone: Vec<Tensor> =
            alone.map(|(cache, rest)| read_on(models[0], &[cache], &[rest])).collect();
        let alone = Tensor::cat(&alone, 0).unwrap();
        assert_relative_rms(&format!("{method:?}, alone and together"), &expected, &alone, 1e-5);
        println!("{:.1e} {method:?}", Errors::of(method.name(), &got, &expected).relative_rms());
        assert_relative_rms(method.name(), &got, &expected, BOUND);
    }
}

/// Hidden states of sequences that go on together, in two calls, the first of different lengths: of one sequence after the other.
fn read_on(model: &Model, caches: &[&CompressedCache], rests: &[&[u32]]) -> Tensor {
    let mut cache = CompressedCache::join(caches).unwrap();
    let first: Vec<&[u32]> = rests.iter().map(|rest| &rest[..rest.len().min(8) - 1]).collect();
    let then: Vec<&[u32]> =
        first.iter().zip(rests).map(|(first, rest)| &rest[first.len()..first.len() + 1]).collect();
    let parts = [&first, &then].map(|fed| (fed, cache.feed(model, fed).unwrap()));
    let of = |n: usize| {
        parts.each_ref().map(|(fed, x)| x.get(n).unwrap().narrow(0, 0, fed[n].len()).unwrap())
    };
    let all: Vec<Tensor> = (0..rests.len()).flat_map(of).collect();
    Tensor::cat(&all, 0).unwrap().to_device(&Device::Cpu).unwrap()
}

/// Scores are as near as products are; and rows that one side alone keeps have scores that are as good as equal, in one head or, where
/// heads share what is kept, in all.
fn same_selection(
    case: &str,
    method: Method,
    (got, got_scores): (&Kept, &[Scores]),
    (expected, scores): (&Kept, &[Scores]),
) {
    let flat = |scores: &[Scores]| -> Vec<f32> {
        let scores = scores.iter().flatten().flatten().copied();
        scores.filter(|score| score.is_finite()).collect()
    };
    if scores.is_empty() {
        assert_eq!(got, expected, "{case}");
        return;
    }
    assert_relative_rms(&format!("{case}: scores"), &flat(got_scores), &flat(scores), BOUND);
    let heads = scores.iter().flatten();
    let kept = got.iter().flatten().zip(expected.iter().flatten());
    let moved = heads.zip(kept).map(|(scores, (got, expected))| {
        let rows = got.iter().filter(|row| !expected.contains(row));
        let rows = rows.chain(expected.iter().filter(|row| !got.contains(row)));
        rows.map(|&row| scores[row]).collect::<Vec<f32>>()
    });
    let moved: Vec<Vec<f32>> = match method {
        Method::KvZip => vec![moved.flatten().collect()],
        _ => moved.collect(),
    };
    for scores in moved.iter().filter(|scores| !scores.is_empty()) {
        println!("{case}: rows of scores {scores:?} changed places");
        let (least, most) = (
            scores.iter().copied().fold(f32::MAX, f32::min),
            scores.iter().copied().fold(0.0, f32::max),
        );
        assert!(most - least <= NEAR * most, "{case}: {scores:?}");
    }
}
