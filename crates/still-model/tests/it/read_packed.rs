//! Several sequences read at once, each by its own number of tokens, against each read alone.

use std::collections::BTreeMap;
use std::sync::Mutex;

use still_attention::{RowDtype, StillConfig};
use still_model::random::{random_model, tiny_config};
use still_model::{FeatureInit, Feed, Model, ModelError, Student};

fn models() -> [Model; 2] {
    let teacher = random_model(tiny_config(), 3).unwrap();
    let config = teacher.config().clone();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
    let student = Student::init(still, &config, FeatureInit::Identity, 3).unwrap();
    [teacher.clone(), teacher.with_student(student)]
}

fn ids(tokens: usize, seed: u64) -> Vec<u32> {
    (0..tokens as u64).map(|i| (((i + seed) * 2_654_435_761) >> 7) as u32 % 256).collect()
}

/// Final-normed hidden states of one sequence, `[tokens][E]`.
fn alone(model: &Model, ids: &[u32]) -> Vec<Vec<f32>> {
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let blocks = Mutex::new(BTreeMap::new());
    model
        .read(ids, &mut cache, |start, hidden| {
            blocks.lock().unwrap().insert(start, hidden.to_vec2::<f32>()?);
            Ok::<_, ModelError>(())
        })
        .unwrap();
    blocks.into_inner().unwrap().into_values().flatten().collect()
}

#[test]
fn together_is_as_alone() {
    for model in models() {
        // From a beginning, from what another call read, nothing at all; more than one pack.
        let sequences = [ids(300, 0), ids(7, 1), ids(1, 2), ids(200, 3), ids(130, 4)];
        let first = [120, 0, 1, 200, 64];
        let mut caches = vec![model.new_cache(1, RowDtype::F32).unwrap(); sequences.len()];
        let mut got = vec![Vec::new(); sequences.len()];
        for second in [false, true] {
            let mut feeds: Vec<Feed<'_>> = sequences
                .iter()
                .zip(first)
                .zip(&mut caches)
                .map(|((ids, first), cache)| {
                    let ids = if second { &ids[first..] } else { &ids[..first] };
                    Feed { ids, cache }
                })
                .collect();
            let base = if second { first } else { [0; 5] };
            model
                .read_packed(&mut feeds, |feed, start, hidden| {
                    assert_eq!(got[feed].len(), base[feed] + start, "out of order");
                    got[feed].extend(hidden.to_vec2::<f32>()?);
                    Ok::<_, ModelError>(())
                })
                .unwrap();
        }
        for ((ids, got), cache) in sequences.iter().zip(&got).zip(&caches) {
            let expected = alone(&model, ids);
            assert_eq!((got.len(), cache.position(0)), (ids.len(), ids.len()));
            for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
                assert!((got - expected).abs() < 1e-4, "{got} {expected}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let [teacher, student] = models();
    let read = |model: &Model, ids: &[u32], batch: usize| {
        let mut cache = teacher.new_cache(batch, RowDtype::F32).unwrap();
        let mut feeds = [Feed { ids, cache: &mut cache }];
        model.read_packed(&mut feeds, |_, _, _| Ok::<_, ModelError>(()))
    };
    assert!(read(&teacher, &[1, 2], 1).is_ok());
    assert!(read(&teacher, &[], 1).is_ok());
    assert!(read(&teacher, &[1, 9999], 1).is_err());
    assert!(read(&teacher, &[1], 2).is_err());
    assert!(read(&student, &[1], 1).is_err());
}
