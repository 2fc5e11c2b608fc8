//! Decode steps of sequences that have a cache each, on a CUDA GPU: together and alone.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it.

use std::thread;

use candle_core::{DType, Device};
use still_attention::{HeadGeometry, KeyExponents, Router, RowDtype, StillConfig};
use still_model::random::{random_model, tiny_kernel_config, tiny_student};
use still_model::{Cache, Model, Workspace, device};
use still_testing::assert_relative_rms;

const SEQUENCES: usize = 9;

fn gpu() -> Device {
    device("cuda").unwrap_or_else(|error| panic!("these tests need a CUDA GPU: {error}"))
}

fn teacher() -> Model {
    random_model(tiny_kernel_config(), 3).unwrap()
}

/// A student on the CPU, whose heads keep nothing, little and all.
fn student(change: impl FnOnce(&mut StillConfig)) -> Model {
    let teacher = teacher();
    let student = tiny_student(teacher.config(), change).unwrap();
    teacher.with_student(student)
}

fn linear_only() -> Model {
    student(|still| {
        let geometry = teacher().config().geometry();
        *still = StillConfig::linear_only(still.budgets.len(), geometry, 64);
    })
}

fn capped(still: &mut StillConfig) {
    still.budgets = vec![vec![4, 0], vec![9, 7]];
    still.cap = Some(13);
}

/// Exponents of coded keys, in every layer and head.
fn scaled(still: &mut StillConfig) {
    let HeadGeometry { num_key_value_heads, head_dim, .. } = teacher().config().geometry();
    let exponents = (0..head_dim).map(|c| [0, 1, -1][c % 3]).collect();
    let exponents = KeyExponents::new(exponents).unwrap();
    still.key_exponents = vec![vec![exponents; num_key_value_heads]; still.budgets.len()];
}

/// Every kind of state, and how its rows are stored.
fn models() -> Vec<(&'static str, Model, RowDtype)> {
    vec![
        ("dense", teacher(), RowDtype::F32),
        ("dense int8", teacher(), RowDtype::Int8),
        ("dense int4", teacher(), RowDtype::Int4),
        ("student", student(|_| {}), RowDtype::F32),
        ("int8", student(|_| {}), RowDtype::Int8),
        ("int4", student(|_| {}), RowDtype::Int4),
        ("scaled int8", student(scaled), RowDtype::Int8),
        ("scaled int4", student(scaled), RowDtype::Int4),
        ("capped", student(capped), RowDtype::F32),
        ("capped int8", student(capped), RowDtype::Int8),
        ("gate", student(|still| still.gate = true), RowDtype::F32),
        (
            "received attention",
            student(|still| still.router = Router::ReceivedAttention),
            RowDtype::F32,
        ),
        (
            "recall",
            student(|still| {
                capped(still);
                still.router = Router::SelfRecall;
            }),
            RowDtype::F32,
        ),
        // Has no step in a graph: one follows another.
        ("linear", linear_only(), RowDtype::F32),
    ]
}

fn ids(tokens: usize, seed: u64) -> Vec<u32> {
    (0..tokens as u64).map(|i| (((i + seed) * 2_654_435_761) >> 7) as u32 % 256).collect()
}

/// Prompts that end within a chunk, at its end and behind it.
fn read(model: &Model, rows: RowDtype, sequence: usize) -> Cache {
    let tokens = [3, 61, 64, 127, 128, 129, 190, 191, 330][sequence % SEQUENCES];
    let mut cache = model.new_cache(1, rows).unwrap();
    model.prefill(&ids(tokens, 31 * sequence as u64), &mut cache).unwrap();
    cache
}

/// Who takes part in a step: some join and leave in the middle of a chunk.
fn there(step: usize) -> Vec<usize> {
    match step {
        0..2 => (0..SEQUENCES).collect(),
        // At times a few, or one alone.
        step if step % 11 == 5 => vec![step % SEQUENCES],
        step if step % 11 == 6 => vec![1, 4],
        step => (0..SEQUENCES).filter(|n| (n * 7 + step) % 5 > 0).collect(),
    }
}

fn pick<'c>(caches: &'c mut [Cache], there: &[usize]) -> Vec<&'c mut Cache> {
    let all = caches.iter_mut().enumerate();
    all.filter(|(n, _)| there.contains(n)).map(|(_, cache)| cache).collect()
}

fn next(there: &[usize], step: usize) -> Vec<u32> {
    there.iter().map(|n| (n * 13 + step * 5) as u32 % 256).collect()
}

#[test]
fn sequences_with_a_cache_each_decode_as_alone() {
    let device = gpu();
    for (name, model, rows) in models() {
        let model = model.to_device(&device, DType::F32).unwrap();
        let mut alone: Vec<Cache> = (0..SEQUENCES).map(|n| read(&model, rows, n)).collect();
        let mut together = alone.clone();
        let mut workspace = Workspace::default();
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        // Every sequence retires twice or more, each at a step of its own.
        for step in 0..200 {
            let there = there(step);
            let next = next(&there, step);
            let mut caches = pick(&mut together, &there);
            let logits = model.decode_many(&next, &mut caches, &mut workspace).unwrap();
            assert_eq!(logits.len(), there.len() * model.config().vocab_size);
            got.extend_from_slice(logits);
            assert_eq!(workspace.logits().unwrap().len(), there.len() * model.config().vocab_size);
            for (n, id) in there.iter().zip(&next) {
                expected.extend_from_slice(model.decode(&[*id], &mut alone[*n]).unwrap());
            }
        }
        let coded = rows.is_coded();
        assert_relative_rms(name, &got, &expected, if coded { 1e-2 } else { 1e-3 });
        for (a, b) in alone.iter().zip(&together) {
            assert_eq!(a.position(0), b.position(0));
        }
        // Each goes on alone, from what it has.
        for (n, (a, b)) in alone.iter_mut().zip(&mut together).enumerate() {
            let expected = model.decode(&[n as u32], a).unwrap();
            let got = model.decode(&[n as u32], b).unwrap();
            assert_relative_rms(name, got, expected, if coded { 1e-2 } else { 1e-3 });
        }
    }
}

/// Where every step has the same shape, whoever is in it and in whichever row.
#[test]
fn steps_of_one_shape_give_the_same_bits_alone_and_together() {
    let device = gpu();
    for (name, model, rows) in models().into_iter().filter(|(name, ..)| *name != "linear") {
        let plain = rows == RowDtype::F32;
        for dtype in [DType::F32, DType::BF16] {
            let model = model.to_device(&device, dtype).unwrap();
            let rows = if plain && dtype == DType::BF16 { RowDtype::Bf16 } else { rows };
            if (name, dtype) == ("dense int4", DType::BF16) {
                let refused = model.new_cache(1, rows).unwrap_err().to_string();
                assert!(refused.contains("int4 in bf16"), "{refused}");
                continue;
            }
            let mut alone: Vec<Cache> = (0..SEQUENCES).map(|n| read(&model, rows, n)).collect();
            let mut together = alone.clone();
            let mut workspaces = [Workspace::of_rows(12), Workspace::of_rows(12)];
            for step in 0..150 {
                let mut there = there(step);
                let mut caches = pick(&mut together, &there);
                if step % 2 == 1 {
                    caches.reverse();
                    there.reverse();
                }
                let next = next(&there, step);
                let [a, b] = &mut workspaces;
                let logits = model.decode_many(&next, &mut caches, a).unwrap();
                let width = logits.len() / there.len();
                for ((n, id), logits) in there.iter().zip(&next).zip(logits.chunks_exact(width)) {
                    let expected = model.decode_many(&[*id], &mut [&mut alone[*n]], b).unwrap();
                    assert!(logits.iter().all(|x| x.is_finite()));
                    assert!(logits == expected, "{name}, {dtype:?}: sequence {n}, step {step}");
                }
            }
        }
    }
}

/// More sequences than a step has rows take several steps.
#[test]
fn more_sequences_than_rows() {
    let device = gpu();
    let model = student(|_| {}).to_device(&device, DType::F32).unwrap();
    let mut alone: Vec<Cache> = (0..SEQUENCES).map(|n| read(&model, RowDtype::F32, n)).collect();
    let mut together = alone.clone();
    let all: Vec<usize> = (0..SEQUENCES).collect();
    let (mut few, mut many) = (Workspace::of_rows(4), Workspace::of_rows(4));
    for step in 0..5 {
        let next = next(&all, step);
        let mut caches = pick(&mut together, &all);
        let logits = model.decode_many(&next, &mut caches, &mut many).unwrap().to_vec();
        let expected: Vec<f32> = (all.iter().zip(&next))
            .flat_map(|(n, id)| {
                let mut cache = [&mut alone[*n]];
                model.decode_many(&[*id], &mut cache, &mut few).unwrap().to_vec()
            })
            .collect();
        assert!(logits == expected);
        assert!(many.logits().unwrap() == expected);
    }
}

/// Stores and dense caches grow under a captured step; caches end, and others take their memory.
#[test]
fn caches_grow_and_make_room_for_others() {
    let device = gpu();
    for model in [teacher(), student(|_| {})] {
        let model = model.to_device(&device, DType::F32).unwrap();
        let mut workspace = Workspace::default();
        let mut alone: Vec<Cache> = (0..4).map(|n| read(&model, RowDtype::F32, n)).collect();
        let mut together = alone.clone();
        let before = together[0].size_bytes();
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        for step in 0..1300 {
            if step % 400 == 399 {
                // A sequence ends, and another one begins.
                let n = step / 400;
                together[n] = read(&model, RowDtype::F32, n + 4);
                alone[n] = together[n].clone();
            }
            if step % 500 == 499 {
                // A copy goes on in place of a cache.
                together[3] = together[3].clone();
            }
            let next = next(&[0, 1, 2, 3], step);
            let mut caches = pick(&mut together, &[0, 1, 2, 3]);
            got.extend_from_slice(model.decode_many(&next, &mut caches, &mut workspace).unwrap());
            for (cache, id) in alone.iter_mut().zip(&next) {
                expected.extend_from_slice(model.decode(&[*id], cache).unwrap());
            }
        }
        assert_relative_rms("1300 steps", &got, &expected, 1e-3);
        assert!(together[3].size_bytes() > before);
    }
}

#[test]
fn a_workspace_goes_from_thread_to_thread_and_from_model_to_model() {
    let device = gpu();
    let mut workspace = Workspace::default();
    let models = [student(|_| {}), teacher(), student(capped), student(|still| still.gate = true)];
    let models = models.map(|model| model.to_device(&device, DType::F32).unwrap());
    for turn in 0..3 {
        for model in &models {
            let mut alone: Vec<Cache> = (0..5).map(|n| read(model, RowDtype::F32, n)).collect();
            let mut together = alone.clone();
            let all = [0, 1, 2, 3, 4];
            let next = next(&all, turn);
            let workspace = &mut workspace;
            let got = thread::scope(|scope| {
                let step = || {
                    let mut caches = pick(&mut together, &all);
                    model.decode_many(&next, &mut caches, workspace).unwrap().to_vec()
                };
                scope.spawn(step).join().unwrap()
            });
            let expected: Vec<f32> = (alone.iter_mut().zip(&next))
                .flat_map(|(cache, id)| model.decode(&[*id], cache).unwrap().to_vec())
                .collect();
            assert_relative_rms("another thread", &got, &expected, 1e-3);
        }
    }
}

#[test]
fn states_that_are_not_alike_take_no_step_together() {
    let model = student(|_| {}).to_device(&gpu(), DType::F32).unwrap();
    let (mut plain, mut coded) = (read(&model, RowDtype::F32, 1), read(&model, RowDtype::Int8, 2));
    let before = [plain.position(0), coded.position(0)];
    let mut workspace = Workspace::default();
    let mut both = [&mut plain, &mut coded];
    let error = model.decode_many(&[1, 2], &mut both, &mut workspace).unwrap_err();
    assert!(error.to_string().contains("row format"), "{error}");
    assert_eq!([plain.position(0), coded.position(0)], before);
    // Either goes on.
    for cache in [&mut plain, &mut coded] {
        let logits = model.decode_many(&[1], &mut [cache], &mut workspace).unwrap();
        assert!(logits.iter().all(|x| x.is_finite()));
    }
}
