//! Sequences continued together, against each alone.

use std::ops::ControlFlow;

use still_attention::{RowDtype, StillConfig};
use still_model::random::{random_model, tiny_config};
use still_model::{
    FeatureInit, Finish, GenerateOptions, Model, Student, generate, generate_together,
};

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

#[test]
fn together_is_as_alone() {
    for model in models() {
        let prompts = [ids(300, 0), ids(7, 1), ids(1, 2), ids(190, 3), ids(64, 4)];
        let limits = [9, 30, 17, 0, 1];
        let views: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let mut cache = model.new_cache(prompts.len(), RowDtype::F32).unwrap();
        let together = generate_together(&model, &views, &limits, &mut cache).unwrap();
        let mut ended = Vec::new();
        for ((prompt, max_new_tokens), got) in prompts.iter().zip(limits).zip(&together) {
            let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
            let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
            let ignore = &mut |_: &str| ControlFlow::Continue(());
            let alone = generate(&model, prompt, &mut cache, &options, ignore).unwrap();
            assert_eq!((&got.ids, &got.text, got.finish), (&alone.ids, &alone.text, alone.finish));
            ended.push(got.finish);
        }
        assert!(ended.contains(&Finish::Length), "{ended:?}");
    }
}

#[test]
fn what_cannot_be_continued_together_is_refused() {
    let [model, _] = models();
    let mut cache = model.new_cache(2, RowDtype::F32).unwrap();
    assert!(generate_together(&model, &[&[1], &[]], &[1, 1], &mut cache).is_err());
    assert!(generate_together(&model, &[&[1], &[2]], &[1], &mut cache).is_err());
    assert!(generate_together(&model, &[&[1]], &[1], &mut cache).is_err());
    generate_together(&model, &[&[1], &[2]], &[1, 1], &mut cache).unwrap();
    let error = generate_together(&model, &[&[1], &[2]], &[1, 1], &mut cache).unwrap_err();
    assert!(error.to_string().contains("empty cache"), "{error}");
}
