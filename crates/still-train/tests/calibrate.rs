//! Calibrated budgets on a tiny model.

mod common;

use candle_core::{D, Device, Tensor};
use common::model;
use still_attention::{HeadSize, RowDtype, StillConfig};
use still_model::random::{random_model, tiny_sliding_config};
use still_model::{Model, Student};
use still_train::{AttentionRecipe, Budgets, CalibrateOptions, calibrate};

const CHUNK: usize = 8;

fn recipe() -> AttentionRecipe {
    AttentionRecipe { chunk: CHUNK, ..AttentionRecipe::default() }
}

fn options(cache_fraction: f64) -> CalibrateOptions {
    CalibrateOptions { cache_fraction, at_length: 256, copy_length: 48, ..Default::default() }
}

fn text() -> Vec<Vec<u32>> {
    (0..4).map(|n| (0..128).map(|t| (t * t + 7 * (t % 11) + 31 * n) % 256).collect()).collect()
}

fn slices(text: &[Vec<u32>]) -> Vec<&[u32]> {
    text.iter().map(Vec::as_slice).collect()
}

#[test]
fn budgets_take_what_they_may_and_a_state_takes_what_was_counted() {
    let (model, text) = (model(), text());
    for rows in [None, Some(RowDtype::Int8), Some(RowDtype::Int4)] {
        let recipe = AttentionRecipe { rows, ..recipe() };
        let mut before: Option<Vec<usize>> = None;
        for fraction in [0.4, 0.6, 0.9] {
            let found = || {
                calibrate(&model, &recipe, &slices(&text), &options(fraction), &|_, _, _| {})
                    .unwrap()
            };
            let (found, again) = (found(), found());
            assert!(found.cache_bytes as f64 <= fraction * found.dense_bytes as f64);
            assert_eq!(found, again, "not a function of its inputs");
            assert_eq!(found.budgets.rows, rows.unwrap_or(RowDtype::Bf16));
            // More bytes never mean a smaller cache.
            let budgets: Vec<usize> = found.heads.iter().map(|head| head.budget).collect();
            if let Some(before) = before.replace(budgets.clone()) {
                assert!(budgets.iter().sum::<usize>() >= before.iter().sum());
            }

            // The rows are the budgets' if the recipe says none.
            let attention = found.budgets.apply(&self::recipe()).unwrap();
            assert_eq!(attention.rows, rows);
            let still = attention.resolve(model.config()).unwrap();
            let student = Student::init(still, model.config(), Default::default(), 0).unwrap();
            let student = model.with_student(student);
            let mut cache = student.new_cache(1, student.cache_rows(RowDtype::Bf16)).unwrap();
            let ids: Vec<u32> = (0..256).map(|i| i * 7 % 250).collect();
            student.prefill(&ids[..248], &mut cache).unwrap();
            for id in &ids[248..] {
                student.decode(&[*id], &mut cache).unwrap();
            }
            assert_eq!(cache.size_bytes(), found.cache_bytes, "{rows:?} {fraction}");
            assert_eq!(cache.bytes_by_part(), Some(found.cache_parts), "{rows:?} {fraction}");
        }
    }
}

/// What a byte buys depends on how rows are stored.
#[test]
fn narrower_rows_keep_more_heads_whole() {
    let (model, text) = (model(), text());
    let whole = |rows| {
        let recipe = AttentionRecipe { rows: Some(rows), ..recipe() };
        let options = CalibrateOptions { retrieval_threshold: 0.0, ..options(0.65) };
        let found = calibrate(&model, &recipe, &slices(&text), &options, &|_, _, _| {}).unwrap();
        assert!(found.heads.iter().all(|head| head.budget > 0), "every head has its sink");
        found.heads.iter().filter(|head| head.retrieves && head.budget == CHUNK).count()
    };
    let found = [RowDtype::F32, RowDtype::Bf16, RowDtype::Int4].map(whole);
    assert!(found.is_sorted() && found[0] < found[2], "{found:?}");
}

#[test]
fn layers_with_a_window_count_at_their_window_and_have_no_budgets() {
    let model = random_model(tiny_sliding_config(), 11).unwrap();
    let (config, text) = (model.config(), text());
    let found = calibrate(&model, &recipe(), &slices(&text), &options(0.6), &|_, _, _| {}).unwrap();
    let layers: Vec<usize> = found.heads.iter().map(|head| head.layer).collect();
    assert_eq!(layers, [1, 1, 4, 4]);
    let given = &found.budgets.budgets;
    assert_eq!(given.iter().map(Vec::len).collect::<Vec<_>>(), [0, 2, 0, 0, 2]);
    let size =
        HeadSize { chunk: CHUNK, head_dim: 8, feature_dim: 8, cap: None, rows: RowDtype::Bf16 };
    let windows = 3 * 2 * size.sliding_bytes(12, 256);
    assert_eq!(found.dense_bytes, windows + 4 * size.dense_bytes(256));
    assert!(found.cache_bytes as f64 <= 0.6 * found.dense_bytes as f64);
    let attention = found.budgets.apply(&recipe()).unwrap();
    let student =
        Student::init(attention.resolve(config).unwrap(), config, Default::default(), 0).unwrap();
    let student = model.with_student(student);
    let mut cache = student.new_cache(1, RowDtype::Bf16).unwrap();
    let ids: Vec<u32> = (0..256).map(|i| i * 7 % 250).collect();
    student.prefill(&ids[..248], &mut cache).unwrap();
    for id in &ids[248..] {
        student.decode(&[*id], &mut cache).unwrap();
    }
    assert_eq!(cache.size_bytes(), found.cache_bytes);
    assert_eq!(cache.bytes_by_part(), Some(found.cache_parts));
}

/// A window of half the context in three layers of five: all of them, and a fifth of the two others.
#[test]
fn the_usual_share_leaves_room_for_windows() {
    let usual = |config| CalibrateOptions::usual_cache_fraction(&config, 64);
    assert_eq!(usual(model().config().clone()), 0.2);
    let mut config = tiny_sliding_config();
    config.sliding.as_mut().unwrap().window = 32;
    let (windows, others) = (3.0 * 32.0, 2.0 * 64.0);
    assert!((usual(config) - (windows + 0.2 * others) / (windows + others)).abs() < 1e-12);
}

#[test]
fn sizes_are_known_beforehand() {
    let model = model();
    let config = model.config();
    for (budget, cap, rows) in [
        (0, None, RowDtype::F32),
        (3, None, RowDtype::Int8),
        (2, None, RowDtype::Int4),
        (8, Some(20), RowDtype::Bf16),
    ] {
        let mut still = StillConfig::uniform(2, config.geometry(), CHUNK, budget);
        still.cap = cap;
        let student = Student::init(still, config, Default::default(), 0).unwrap();
        let student = model.with_student(student);
        let size = HeadSize { chunk: CHUNK, head_dim: 8, feature_dim: 8, cap, rows };
        for tokens in [1, 16, 17, 100] {
            let mut cache = student.new_cache(1, rows).unwrap();
            student.prefill(&vec![3; tokens], &mut cache).unwrap();
            let heads = 2 * config.num_key_value_heads;
            let (got, expected) = (cache.size_bytes(), heads * size.bytes(budget, tokens));
            assert_eq!(got, expected, "{budget}, {tokens} tokens");
        }
    }
}

#[test]
fn what_cannot_be_met_says_why() {
    let (model, text) = (model(), text());
    let hint =
        |result: still_train::Result<_>| result.map(|_: still_train::Calibration| ()).unwrap_err();
    // Before anything is computed.
    let told = &|phase, _: usize, _: usize| panic!("{phase:?} has begun");
    let small = hint(calibrate(&model, &recipe(), &slices(&text), &options(0.01), told));
    assert!(small.to_string().contains("too small"), "{small}");
    assert!(small.hint().unwrap().contains("--cache-fraction"));
    let none = AttentionRecipe { router: still_attention::Router::None, ..recipe() };
    let none = hint(calibrate(&model, &none, &slices(&text), &options(0.5), &|_, _, _| {}));
    assert!(none.to_string().contains("nothing to find"), "{none}");
    let short = hint(calibrate(&model, &recipe(), &[&[1, 2, 3]], &options(0.5), &|_, _, _| {}));
    assert!(short.to_string().contains("two chunks"), "{short}");
}

#[test]
fn a_file_of_budgets_comes_back_and_fits_only_its_recipe() {
    let (model, text) = (model(), text());
    let found = calibrate(&model, &recipe(), &slices(&text), &options(0.5), &|_, _, _| {}).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("budgets.json");
    found.budgets.save(&path).unwrap();
    let read = Budgets::read(&path).unwrap();
    assert_eq!(read, found.budgets);
    assert!(read.apply(&AttentionRecipe::default()).is_err(), "chunks of 64");
    let own = AttentionRecipe { budgets: Some(vec![]), ..recipe() };
    assert!(read.apply(&own).is_err());
    let others = AttentionRecipe { rows: Some(RowDtype::Int8), ..recipe() };
    assert!(read.apply(&others).unwrap_err().to_string().contains("rows in bf16"));
    let same = AttentionRecipe { rows: Some(RowDtype::Bf16), ..recipe() };
    let applied = read.apply(&same).unwrap();
    assert_eq!(applied.rows, same.rows);
    // An exponent a channel, of every KV head; a recipe's own are refused.
    assert_eq!(applied.key_exponents, found.budgets.key_exponents);
    let layers = applied.key_exponents.iter().map(|heads| heads[1].values().len());
    assert!(layers.eq(vec![model.config().head_dim; model.config().num_hidden_layers]));
    let own = AttentionRecipe { budgets: None, ..applied };
    assert!(read.apply(&own).unwrap_err().to_string().contains("key_exponents of its own"));
    std::fs::write(&path, "{}").unwrap();
    assert!(Budgets::read(&path).unwrap_err().to_string().contains("budgets.json"));
}

/// The estimate is of the KL divergence if the text is the teacher's own: one head at a time is given a small budget, and
/// what that really costs is measured.
#[test]
fn estimated_losses_are_near_real_ones() {
    let model = model();
    let sampling = still_model::GenerateOptions { temperature: 1.0, seed: 7, ..Default::default() };
    let mut sampler = still_model::Sampler::new(&sampling);
    let text: Vec<Vec<u32>> = (0..24)
        .map(|n| {
            let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
            let mut ids = vec![n];
            for _ in 1..160 {
                let logits = model.decode(&ids[ids.len() - 1..], &mut cache).unwrap();
                ids.push(sampler.sample(logits).unwrap());
            }
            ids
        })
        .collect();
    let found = calibrate(&model, &recipe(), &slices(&text), &options(0.5), &|_, _, _| {}).unwrap();
    let candidate = found.candidates.iter().position(|&budget| budget == 2).unwrap();
    let heads = model.config().num_key_value_heads;
    for head in &found.heads {
        let mut budgets = vec![vec![CHUNK; heads]; 2];
        budgets[head.layer][head.head] = 2;
        let attention = AttentionRecipe { budgets: Some(budgets), ..recipe() };
        let still = attention.resolve(model.config()).unwrap();
        let student = Student::init(still, model.config(), Default::default(), 0).unwrap();
        let student = model.with_student(student);
        let real =
            text.iter().map(|ids| kl(&model, &student, ids)).sum::<f64>() / text.len() as f64;
        let estimate = head.losses[candidate];
        let ratio = estimate / real;
        assert!((0.5..2.0).contains(&ratio), "{head:?}: estimated {estimate}, really {real}");
        assert_eq!(*head.losses.last().unwrap(), 0.0, "a whole head loses nothing");
    }
}

/// Mean over positions of KL(teacher ‖ student), nats.
fn kl(teacher: &Model, student: &Model, ids: &[u32]) -> f64 {
    let log_p = |model: &Model| {
        let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
        let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let hidden = model.forward(&ids, &mut cache, None).unwrap();
        let logits = model.logits(&hidden).unwrap().to_dtype(candle_core::DType::F64).unwrap();
        let max = logits.max_keepdim(D::Minus1).unwrap();
        let shifted = logits.broadcast_sub(&max).unwrap();
        let total = shifted.exp().unwrap().sum_keepdim(D::Minus1).unwrap().log().unwrap();
        shifted.broadcast_sub(&total).unwrap()
    };
    let (p, q) = (log_p(teacher), log_p(student));
    let terms = (p.exp().unwrap() * (p - q).unwrap()).unwrap();
    let total: f64 = terms.sum_all().unwrap().to_scalar().unwrap();
    total / ids.len() as f64
}
