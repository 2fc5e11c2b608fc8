//! A cache that went through a file, or back to fewer tokens, generates what it would have.

use still_attention::{RowDtype, StillConfig};
use still_model::random::{random_model, tiny_config};
use still_model::tensor_file::{read_tensors, save_tensors};
use still_model::{Cache, FeatureInit, Model, Student};

fn models() -> [Model; 2] {
    let teacher = random_model(tiny_config(), 7).unwrap();
    let config = teacher.config().clone();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 16, 2);
    let student = Student::init(still, &config, FeatureInit::Identity, 7).unwrap();
    [teacher.clone(), teacher.with_student(student)]
}

fn ids(tokens: usize) -> Vec<u32> {
    (0..tokens as u64).map(|i| ((i * 2_654_435_761) >> 7) as u32 % 256).collect()
}

/// Logits after each of some tokens, fed one by one.
fn logits(model: &Model, cache: &mut Cache, ids: &[u32]) -> Vec<f32> {
    ids.iter().flat_map(|&id| model.decode(&[id], cache).unwrap().to_vec()).collect()
}

fn assert_near(got: &[f32], expected: &[f32]) {
    let error = still_testing::Errors::of("logits", got, expected).relative_rms();
    assert!(error < 1e-6, "{error}");
}

#[test]
fn a_cache_goes_through_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.safetensors");
    for model in models() {
        for rows in RowDtype::ALL {
            let mut cache = model.new_cache(1, rows).unwrap();
            model.prefill(&ids(75), &mut cache).unwrap();
            save_tensors(&path, &cache.save().unwrap()).unwrap();
            let mut back = model.new_cache(1, rows).unwrap();
            back.restore(read_tensors(&path, true).unwrap()).unwrap();
            assert_eq!(back.position(0), 75);
            let next = ids(40);
            let expected = logits(&model, &mut cache, &next);
            assert_near(&logits(&model, &mut back, &next), &expected);
        }
    }
}

#[test]
fn a_cache_of_another_model_is_refused() {
    let [teacher, student] = models();
    let mut cache = teacher.new_cache(1, RowDtype::F32).unwrap();
    teacher.prefill(&ids(9), &mut cache).unwrap();
    let saved = cache.save().unwrap();
    let mut other = student.new_cache(1, RowDtype::F32).unwrap();
    let error = other.restore(saved.clone()).unwrap_err().to_string();
    assert!(error.contains("no tensor \"0.position\""), "{error}");
    let mut more = saved;
    let any = more["layers.0.0.k"].clone();
    more.insert("layers.99.0.k".into(), any);
    let error = cache.restore(more).unwrap_err().to_string();
    assert!(error.contains("\"layers.99.0.k\" that is of no layer"), "{error}");
}

#[test]
fn an_answer_is_taken_back() {
    for (model, far) in models().into_iter().zip([true, false]) {
        let mut cache = model.new_cache(1, RowDtype::Bf16).unwrap();
        model.prefill(&ids(68), &mut cache).unwrap();
        let first = logits(&model, &mut cache, &[5, 6, 7]);
        cache.truncate(0, 68).unwrap();
        assert_eq!(cache.position(0), 68);
        assert_near(&logits(&model, &mut cache, &[5, 6, 7]), &first);
        // An earlier chunk has left the student's window.
        assert_eq!(cache.truncate(0, 40).is_ok(), far);
        assert_eq!(cache.position(0), if far { 40 } else { 71 });
        cache.truncate(0, 0).unwrap();
        model.prefill(&ids(68), &mut cache).unwrap();
        assert_near(&logits(&model, &mut cache, &[5, 6, 7]), &first);
    }
}
