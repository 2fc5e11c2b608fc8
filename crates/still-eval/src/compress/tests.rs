//! Every method compared with its twin: scores, then the selection of the twin's scores, then attention of one selection.

use candle_core::{DType, Device, Tensor};
use still_attention::RowDtype;
use still_model::Model;
use still_model::random::{random_model, tiny_config, tiny_sliding_config};
use still_testing::{assert_max_error, assert_relative_rms, random_f32};

use super::attention::later;
use super::context::{Compressor, scale_of};
use super::naive::{self, Heads, heads, is_best};
use super::reconstruction::{largest, repetitions};
use super::retrieval::{induction, retrieval};
use super::scores::{h2o, snapkv};
use super::select::{Kept, SINKS, Sizes};
use super::{CompressedCache, Compression, Method};
use crate::error::EvalError;
use crate::long::random_tokens;

/// More than a block of queries, and no multiple of it.
const TOKENS: usize = 301;
const SCALE: f64 = 0.4;

/// Four query heads and two KV heads.
fn queries_and_keys(tokens: usize) -> (Tensor, Tensor) {
    (random_f32((1, 4, tokens, 8), 1), random_f32((1, 2, tokens, 8), 2))
}

fn flat(scores: &[Vec<f32>]) -> Vec<f32> {
    scores.concat()
}

fn narrow(scores: &[Vec<f64>]) -> Vec<f32> {
    scores.concat().iter().map(|&score| score as f32).collect()
}

fn wide(scores: &[Vec<f32>]) -> Vec<Vec<f64>> {
    scores.iter().map(|scores| scores.iter().map(|&score| f64::from(score)).collect()).collect()
}

#[test]
fn scores_are_the_twins() {
    let (q, k) = queries_and_keys(TOKENS);
    let (nq, nk) = (heads(&q), heads(&k));
    for observed in [1, 32] {
        let got = snapkv(&q, &k, observed, SCALE).unwrap();
        let expected = naive::snapkv(&nq, &nk, observed, SCALE);
        assert_relative_rms("snapkv", &flat(&got), &narrow(&expected), 1e-5);
    }
    let got = h2o(&q, &k, SCALE).unwrap();
    assert_relative_rms("h2o", &flat(&got), &narrow(&naive::h2o(&nq, &nk, SCALE)), 1e-5);
    let got = induction(&q.narrow(2, 0, 300).unwrap(), &k.narrow(2, 0, 300).unwrap(), SCALE);
    let cut = |heads: &Heads| heads.iter().map(|head| head[..300].to_vec()).collect::<Heads>();
    let expected = naive::induction(&cut(&nq), &cut(&nk), SCALE);
    assert_relative_rms("induction", &got.unwrap(), &narrow(&[expected]), 1e-5);
    let (asked, own) = (random_f32((1, 4, 270, 8), 3), random_f32((1, 2, 270, 8), 4));
    for piece in [(SINKS, 90), (200, TOKENS)] {
        let later = later(270, &Device::Cpu).unwrap();
        let got = largest(&asked, &k, &own, piece, SCALE, &later).unwrap();
        let expected = naive::largest(&heads(&asked), &nk, &heads(&own), piece, SCALE);
        assert_relative_rms("kvzip", &flat(&got), &narrow(&expected), 1e-5);
    }
}

#[test]
fn selections_are_the_twins() {
    // Two layers; few values, so that some are equal.
    let coarse = |seed: u64| -> Vec<Vec<f32>> {
        let scores = (random_f32((2, TOKENS), seed) * 8.0).unwrap().round().unwrap().abs().unwrap();
        scores.to_vec2().unwrap()
    };
    let scores = vec![coarse(5), coarse(6)];
    let twin: Vec<Vec<Vec<f64>>> = scores.iter().map(|layer| wide(layer)).collect();
    for fraction in [0.003, 0.1, 0.5, 0.99, 1.0] {
        let sizes = Sizes { tokens: TOKENS, layers: 2, kv_heads: 2, fraction };
        let each = ((fraction * TOKENS as f64) as usize).max(1);
        let recent = each / 2;
        let heavy = |scores: &[f64], row| {
            row >= TOKENS - recent || is_best(&scores[..TOKENS - recent], row, each - recent)
        };
        assert_eq!(sizes.h2o(&scores), naive::each_head(&twin, TOKENS, heavy), "{fraction}");
        let observed = recent.min(32);
        let before = TOKENS - observed;
        let cut = |scores: &Vec<Vec<f32>>| {
            scores.iter().map(|scores| scores[..before].to_vec()).collect::<Vec<_>>()
        };
        let seen =
            |scores: &[f64], row| row >= before || is_best(&scores[..before], row, each - observed);
        let cut: Vec<_> = scores.iter().map(cut).collect();
        assert_eq!(sizes.snapkv(&cut, observed), naive::each_head(&twin, TOKENS, seen));
        let ends = |_: &[f64], row| row < SINKS.min(each) || row + each >= TOKENS + SINKS.min(each);
        assert_eq!(sizes.streaming_llm(), naive::each_head(&twin, TOKENS, ends), "{fraction}");
        let all = twin.concat().concat();
        let most = ((fraction * all.len() as f64) as usize).max(4 * SINKS);
        let kept = sizes.kvzip(&scores);
        for (head, kept) in kept.concat().iter().enumerate() {
            let best = |row: &usize| is_best(&all, head * TOKENS + row, most);
            assert_eq!(*kept, (0..TOKENS).filter(best).collect::<Vec<_>>(), "{fraction}");
        }
    }
}

fn count(kept: &Kept) -> usize {
    kept.iter().flatten().map(Vec::len).sum()
}

#[test]
fn no_method_keeps_more_than_its_share() {
    let layers: Vec<Vec<Vec<f32>>> =
        (0..3).map(|layer| random_f32((2, 1000), layer).to_vec2().unwrap()).collect();
    for fraction in [0.05, 0.1, 0.25, 0.7, 1.0] {
        let sizes = Sizes { tokens: 1000, layers: 3, kv_heads: 2, fraction };
        let most = (6000.0 * fraction) as usize;
        let cut: Vec<Vec<Vec<f32>>> = layers
            .iter()
            .map(|layer| layer.iter().map(|head| head[..1000 - 25].to_vec()).collect())
            .collect();
        let heads: Vec<Vec<f32>> = random_f32((3, 2), 9).to_vec2().unwrap();
        for (method, kept) in [
            ("snapkv", sizes.snapkv(&cut, 25)),
            ("kvzip", sizes.kvzip(&layers)),
            ("h2o", sizes.h2o(&layers)),
            ("streaming_llm", sizes.streaming_llm()),
            ("random", sizes.random(7)),
        ] {
            assert_eq!(count(&kept), most, "{method} at {fraction}");
            let ascending = |rows: &Vec<usize>| rows.is_sorted_by(|a, b| a < b);
            assert!(kept.iter().flatten().all(ascending), "{method} at {fraction}");
        }
        // Heads are whole or not: what is left over is less than a head.
        let kept = sizes.duo_attention(&heads);
        assert!(
            count(&kept) <= most && count(&kept) + 1000 > most,
            "{} at {fraction}",
            count(&kept)
        );
        let whole = |head: &usize| kept[head / 2][head % 2].len() == 1000;
        let flat = heads.concat();
        let worst_whole = (0..6).filter(whole).map(|head| flat[head]).reduce(f32::min);
        let best_other = (0..6).filter(|head| !whole(head)).map(|head| flat[head]).reduce(f32::max);
        if let (Some(whole), Some(other)) = (worst_whole, best_other) {
            assert!(whole > other, "a streaming head scores {other}, a retrieval head {whole}");
        }
    }
}

#[test]
fn random_selections_differ_by_head_and_seed() {
    let sizes = Sizes { tokens: 1000, layers: 2, kv_heads: 2, fraction: 0.1 };
    let kept = sizes.random(7);
    assert_eq!(kept, sizes.random(7));
    assert_ne!(kept, sizes.random(8));
    assert_ne!(kept[0][0], kept[0][1]);
    assert_ne!(kept[0][0], kept[1][0]);
}

fn model() -> Model {
    random_model(tiny_config(), 3).unwrap()
}

/// Rows that a method keeps of a context, as [`Compressor::read`] decides.
fn kept(compressor: &Compressor<'_>, ids: &[u32], next: u32) -> Kept {
    compressor.context(ids, next).unwrap().0.kept
}

/// Final-normed hidden states `[N, E]` of a sequence, its attention computed by the twin.
fn naive_hidden(model: &Model, ids: &[u32], context: usize, kept: &Kept) -> Tensor {
    let decoder = &model.decoder;
    let rotation = decoder.rotation(0, ids.len()).unwrap();
    let x = decoder
        .visit_layers::<EvalError>(
            decoder.embed(ids).unwrap(),
            &rotation,
            None,
            |n, layer, inputs| {
                let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(heads);
                let output = naive::attend(&q, &k, &v, &kept[n], context, scale_of(layer));
                let flat: Vec<f32> = output.concat().concat().iter().map(|&x| x as f32).collect();
                Ok(Tensor::from_vec(flat, inputs.q.dims(), &Device::Cpu)?)
            },
        )
        .unwrap();
    decoder.final_norm(&x).unwrap().squeeze(0).unwrap()
}

#[test]
fn reading_on_is_attention_to_the_rows_that_were_kept() {
    let model = model();
    let (context, rest) = (90, 20);
    for method in Method::ALL {
        for fraction in [0.1, 0.35] {
            let compression = Compression { method, fraction };
            let compressor = Compressor::new(&model, compression, RowDtype::F32).unwrap();
            // Two sequences of different lengths, read on in two steps: the second one's padding must not be seen.
            let sequences: [Vec<u32>; 2] =
                [0, 1].map(|n| random_tokens(256, context - 17 * n + rest - 5 * n, n as u64));
            let contexts = [context, context - 17];
            let read: Vec<CompressedCache> = sequences
                .iter()
                .zip(contexts)
                .map(|(ids, context)| compressor.read(&ids[..context], ids[context]).unwrap().0)
                .collect();
            let mut cache = CompressedCache::join(&read.iter().collect::<Vec<_>>()).unwrap();
            let rest: Vec<&[u32]> =
                sequences.iter().zip(contexts).map(|(ids, context)| &ids[context..]).collect();
            let first: Vec<&[u32]> = rest.iter().map(|ids| &ids[..ids.len() - 3]).collect();
            let last: Vec<&[u32]> = rest.iter().map(|ids| &ids[ids.len() - 3..]).collect();
            let parts = [&first, &last].map(|ids| cache.feed(&model, ids).unwrap());
            for (n, (ids, context)) in sequences.iter().zip(contexts).enumerate() {
                let kept = kept(&compressor, &ids[..context], ids[context]);
                let expected = naive_hidden(&model, ids, context, &kept);
                let expected = expected.narrow(0, context, rest[n].len()).unwrap();
                let of = |part: usize, length: usize| {
                    parts[part].get(n).unwrap().narrow(0, 0, length).unwrap()
                };
                let got = Tensor::cat(&[of(0, first[n].len()), of(1, 3)], 0).unwrap();
                assert_max_error(&format!("{compression}, sequence {n}"), &got, &expected, 2e-5);
                let rows = count(&kept) + 4 * rest[n].len();
                assert_eq!(cache.size_bytes(n), rows * 2 * 8 * 4, "{compression}");
            }
        }
    }
}

#[test]
fn a_prompt_aware_method_observes_the_last_token_and_others_do_not() {
    let model = model();
    let ids = random_tokens(256, 90, 5);
    for method in Method::ALL {
        let compressor =
            Compressor::new(&model, Compression { method, fraction: 0.1 }, RowDtype::F32).unwrap();
        let of = |next: u32| kept(&compressor, &ids, next);
        // Some token of a few changes what is observed.
        let differs = (1..40).any(|next| of(next) != of(0));
        assert_eq!(differs, method.sees_question(), "{}", method.name());
        assert!(of(0).iter().flatten().flatten().all(|&row| row < ids.len()));
    }
}

#[test]
fn the_context_is_read_as_the_dense_model_reads_it() {
    let model = model();
    let ids = random_tokens(256, 90, 5);
    let compression = Compression { method: Method::KvZip, fraction: 0.2 };
    let compressor = Compressor::new(&model, compression, RowDtype::F32).unwrap();
    let hidden = compressor.read(&ids, 7).unwrap().1.unwrap();
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let input = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let expected = model.forward(&input, &mut cache, None).unwrap().squeeze(0).unwrap();
    assert_max_error("hidden states", &hidden, &expected, 2e-5);
}

#[test]
fn an_empty_context_leaves_nothing_to_attend_to() {
    let model = model();
    let ids = random_tokens(256, 12, 5);
    let compression = Compression { method: Method::StreamingLlm, fraction: 0.5 };
    let compressor = Compressor::new(&model, compression, RowDtype::F32).unwrap();
    let (mut cache, hidden) = compressor.read(&[], ids[0]).unwrap();
    assert!(hidden.is_none());
    let got = cache.feed(&model, &[&ids]).unwrap().squeeze(0).unwrap();
    let nothing = vec![vec![Vec::new(); 2]; 2];
    assert_max_error("hidden states", &got, &naive_hidden(&model, &ids, 0, &nothing), 2e-5);
    assert_eq!(cache.size_bytes(0), 4 * 12 * 2 * 8 * 4);
}

#[test]
fn repetitions_cover_a_context_once() {
    let model = model();
    for tokens in [3, 4, 5, 700, 4500] {
        let ids = random_tokens(256, tokens, 1);
        let repetitions = repetitions(&model, &ids).unwrap();
        let mut next = SINKS.min(tokens);
        for repetition in &repetitions {
            assert_eq!(repetition.from, next);
            next = repetition.to;
            assert!(repetition.ids.ends_with(&ids[repetition.from..repetition.to]));
        }
        assert_eq!(next, tokens);
    }
}

#[test]
fn rows_are_rounded_as_the_cache_stores_them() {
    let model = model();
    let ids = random_tokens(256, 60, 5);
    let compression = Compression { method: Method::H2o, fraction: 1.0 };
    let hidden = |dtype| {
        let compressor = Compressor::new(&model, compression, dtype).unwrap();
        let mut cache = compressor.read(&ids[..50], ids[50]).unwrap().0;
        (cache.feed(&model, &[&ids[50..]]).unwrap(), cache.size_bytes(0))
    };
    let ((exact, bytes), (rounded, half)) = (hidden(RowDtype::F32), hidden(RowDtype::Bf16));
    assert_eq!(bytes, 2 * half);
    let difference = (exact - rounded).unwrap().abs().unwrap().flatten_all().unwrap();
    let largest = difference.max(0).unwrap().to_dtype(DType::F32).unwrap().to_scalar::<f32>();
    let largest = largest.unwrap();
    assert!(largest > 1e-6 && largest < 0.05, "{largest}");
}

#[test]
fn heads_have_a_score_each_for_looking_back() {
    let scores = retrieval(&model()).unwrap();
    assert_eq!(scores.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
    assert!(scores.concat().iter().all(|&score| score > 0.0 && score < 1.0), "{scores:?}");
}

#[test]
fn what_cannot_be_compressed_is_refused() {
    let compression = Compression { method: Method::Random, fraction: 0.5 };
    let sliding = random_model(tiny_sliding_config(), 3).unwrap();
    let error = Compressor::new(&sliding, compression, RowDtype::F32).unwrap_err().to_string();
    assert!(error.contains("sliding window"), "{error}");
    let error = Compressor::new(&model(), compression, RowDtype::Int8).unwrap_err().to_string();
    assert!(error.contains("--cache-dtype"), "{error}");
}
