//! Sequences with a cache each, fed together.

use candle_core::{DType, Device};
use still_attention::{RowDtype, StillConfig};
use still_model::random::{random_model, tiny_config, tiny_sliding_config};
use still_model::{
    Cache, FeatureInit, LoraConfig, LoraTarget, Model, ModelConfig, Student, WeightFormat,
    Workspace,
};

fn student(config: ModelConfig, format: WeightFormat) -> Model {
    let teacher = random_model(config, 7).unwrap();
    let config = teacher.config().clone();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 16, 2);
    let mut student = Student::init(still, &config, FeatureInit::Identity, 7).unwrap();
    let lora = LoraConfig { rank: 2, alpha: 4.0, targets: LoraTarget::ALL.to_vec() };
    student.add_lora(&config, lora, 0).unwrap();
    let base = teacher.to_device_in(&Device::Cpu, DType::F32, format).unwrap();
    base.with_student(student)
}

fn models() -> Vec<Model> {
    let wide = ModelConfig { hidden_size: 64, intermediate_size: 96, ..tiny_config() };
    let dense = random_model(tiny_sliding_config(), 3).unwrap();
    let quantized = student(wide.clone(), WeightFormat::Q8_0);
    vec![student(wide, WeightFormat::File), quantized.teacher(), quantized, dense]
}

fn ids(sequence: usize) -> Vec<u32> {
    let tokens = 3 + 29 * sequence as u64 % 150;
    (0..tokens).map(|i| (((i + 31 * sequence as u64) * 2_654_435_761) >> 7) as u32 % 256).collect()
}

fn read(model: &Model, sequence: usize) -> Cache {
    let mut cache = model.new_cache(1, RowDtype::Bf16).unwrap();
    model.prefill(&ids(sequence), &mut cache).unwrap();
    cache
}

/// Whoever comes and goes beside it.
#[test]
fn a_sequence_has_bit_for_bit_the_logits_that_it_has_alone() {
    const SEQUENCES: usize = 33;
    for model in models() {
        let mut alone: Vec<Cache> = (0..SEQUENCES).map(|n| read(&model, n)).collect();
        let mut together = alone.clone();
        let mut workspace = Workspace::default();
        for step in 0..20 {
            let there: Vec<usize> =
                (0..SEQUENCES).filter(|n| step < 2 || (n * 7 + step) % 3 > 0).collect();
            // At last one alone, with what larger batches have left.
            let there = if step == 19 { vec![5] } else { there };
            let next: Vec<u32> = there.iter().map(|n| (n * 13 + step * 5) as u32 % 256).collect();
            let mut caches: Vec<&mut Cache> = Vec::new();
            for (n, cache) in together.iter_mut().enumerate() {
                if there.contains(&n) {
                    caches.push(cache);
                }
            }
            let logits = model.decode_many(&next, &mut caches, &mut workspace).unwrap();
            let width = logits.len() / there.len();
            assert_eq!(width, model.config().vocab_size);
            for ((n, id), logits) in there.iter().zip(&next).zip(logits.chunks_exact(width)) {
                let expected = model.decode(&[*id], &mut alone[*n]).unwrap();
                assert!(logits.iter().all(|x| x.is_finite()));
                assert_eq!(logits, expected, "sequence {n}, step {step}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_feeds_no_cache() {
    let model = student(tiny_config(), WeightFormat::File);
    let (mut a, mut b) = (read(&model, 0), read(&model, 1));
    let before = (a.position(0), b.position(0));
    let mut workspace = Workspace::default();
    let error = model.decode_many(&[1], &mut [&mut a, &mut b], &mut workspace).unwrap_err();
    assert_eq!(error.to_string(), "1 tokens for 2 caches");
    let error = model.decode_many(&[1, 999], &mut [&mut a, &mut b], &mut workspace).unwrap_err();
    assert!(error.to_string().contains("token id 999"), "{error}");
    let mut other = read(&model.teacher(), 0);
    let error = model.decode_many(&[1, 1], &mut [&mut a, &mut other], &mut workspace).unwrap_err();
    assert!(error.to_string().contains("another model"), "{error}");
    assert_eq!((a.position(0), b.position(0)), before);
    assert_eq!(model.decode_many(&[], &mut [], &mut workspace).unwrap(), &[] as &[f32]);
}
