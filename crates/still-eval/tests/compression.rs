//! Tasks asked of a model with a compressed cache.

use std::path::Path;

use still_attention::{RowDtype, StillConfig};
use still_eval::compress::{Compression, Method};
use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::random_tokens;
use still_eval::run::{Answer, AskOptions, Sample, ask, silent};
use still_eval::task::{Question, StandardOptions, Task, id_windows, standard};
use still_model::random::{random_model, tiny_config};
use still_model::{FeatureInit, Model, ModelConfig, Student};

fn model() -> Model {
    let config = ModelConfig { max_position_embeddings: 4096, ..tiny_config() };
    random_model(config, 3).unwrap()
}

fn options(compression: Option<Compression>) -> AskOptions {
    AskOptions { rows: RowDtype::F32, batch_size: 3, compression }
}

fn asked(model: &Model, task: &Task, compression: Option<Compression>) -> Vec<Sample> {
    ask(model, task, Vec::new(), &options(compression), &silent).unwrap().samples
}

fn long(model: &Model, task: LongTask, length: usize) -> Task {
    let options = LongOptions { length, items: 3, seed: 1, chat: false };
    task.build(&model.tokenizer, model.config().vocab_size, &LongFiles::default(), options).unwrap()
}

/// A task of every kind of question.
fn tasks(model: &Model) -> Vec<Task> {
    let data = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data"));
    let standard = |name| standard(name, data, &StandardOptions::default()).unwrap();
    vec![
        long(model, LongTask::Passkey, 500),
        long(model, LongTask::RepeatedText, 200),
        id_windows("windows", [random_tokens(256, 130, 1), random_tokens(256, 131, 2)]),
        standard("arc_easy"),
        standard("winogrande"),
        standard("lambada_openai"),
    ]
}

/// Log-likelihoods, or the bytes of what was written.
fn values(answer: &Answer) -> Vec<f64> {
    match answer {
        Answer::Choice { loglikelihoods, .. } => loglikelihoods.clone(),
        Answer::Continuation { loglikelihood, .. } => vec![*loglikelihood],
        Answer::Window { nll, .. } => nll.iter().map(|&nll| f64::from(nll)).collect(),
        Answer::Generation { text, .. } => text.bytes().map(f64::from).collect(),
    }
}

fn furthest(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn a_cache_that_keeps_everything_answers_as_the_dense_one() {
    let model = model();
    for task in tasks(&model) {
        let dense = asked(&model, &task, None);
        for method in Method::ALL {
            let whole = asked(&model, &task, Some(Compression { method, fraction: 1.0 }));
            assert_eq!(whole.len(), dense.len());
            for (whole, dense) in whole.iter().zip(&dense) {
                assert_eq!(
                    (&whole.id, &whole.asked, whole.tokens),
                    (&dense.id, &dense.asked, dense.tokens)
                );
                let furthest = furthest(&values(&whole.answer), &values(&dense.answer));
                assert!(furthest < 1e-3, "{} of {}: {furthest}", method.name(), task.name);
            }
        }
    }
}

#[test]
fn a_cache_that_keeps_a_part_is_smaller_and_answers_otherwise() {
    let model = model();
    let task = long(&model, LongTask::RepeatedText, 400);
    let dense = asked(&model, &task, None);
    for method in Method::ALL {
        let part = asked(&model, &task, Some(Compression { method, fraction: 0.1 }));
        for (part, dense) in part.iter().zip(&dense) {
            // Rows of 2 layers and 2 heads, K and V of 8 values; 200 of the context, of which at most 20 stay, and 199 more.
            let row = 2 * 2 * 2 * 8 * 4;
            assert!(dense.cache_bytes.unwrap() >= 399 * row);
            let bytes = part.cache_bytes.unwrap();
            assert!(bytes <= 219 * row && bytes > 199 * row, "{}: {bytes}", method.name());
            assert!(furthest(&values(&part.answer), &values(&dense.answer)) > 1e-3);
        }
    }
}

#[test]
fn a_windows_first_half_is_the_dense_models() {
    let model = model();
    let task = id_windows("windows", [random_tokens(256, 200, 1)]);
    let compression = Compression { method: Method::StreamingLlm, fraction: 0.05 };
    let part = values(&asked(&model, &task, Some(compression))[0].answer);
    let dense = values(&asked(&model, &task, None)[0].answer);
    // 199 tokens are read, and 99 of them before the cache is compressed.
    assert!(furthest(&part[..99], &dense[..99]) < 1e-4);
    assert!((99..199).all(|at| (part[at] - dense[at]).abs() > 1e-6));
}

#[test]
fn only_a_prompt_aware_method_sees_the_question() {
    let model = model();
    let task = long(&model, LongTask::Passkey, 500);
    let Question::Generation(question) = &task.items[0].question else { panic!("{task:?}") };
    let (prompt, context) = (question.prompt_ids().len(), question.context_tokens());
    let text = model.tokenizer.decode(&question.prompt_ids()[context..], false).unwrap();
    assert_eq!(text, "\n\nWhat is the pass key? The pass key is ");
    // Of one head: K and V of 8 values. There are 4 heads.
    let row = 2 * 8 * 4;
    for method in Method::ALL {
        let sample = &asked(&model, &task, Some(Compression { method, fraction: 0.1 }))[0];
        let Answer::Generation { new_tokens, .. } = &sample.answer else { panic!("{sample:?}") };
        let cut = if method.sees_question() { prompt - 1 } else { context };
        let most = 4 * cut / 10 + 4 * (prompt - cut + new_tokens.saturating_sub(1));
        let bytes = sample.cache_bytes.unwrap();
        assert!(bytes <= most * row, "{}: {bytes} of {}", method.name(), most * row);
        // Whole rows of each head are not quite the share, and whole heads less so.
        let slack = if method == Method::DuoAttention { cut } else { 40 };
        assert!(bytes + slack * row > most * row, "{}: {bytes} of {}", method.name(), most * row);
    }
    assert_eq!(Method::ALL.map(Method::sees_question), [true, false, false, false, false, false]);
}

#[test]
fn what_was_answered_is_not_asked_again() {
    let model = model();
    let task = long(&model, LongTask::Passkey, 500);
    let compression = Some(Compression { method: Method::H2o, fraction: 0.2 });
    let all = ask(&model, &task, Vec::new(), &options(compression), &silent).unwrap();
    let again =
        ask(&model, &task, all.samples[..2].to_vec(), &options(compression), &silent).unwrap();
    assert_eq!(again.samples, all.samples);
    assert_eq!(3 * again.tokens, all.tokens);
}

#[test]
fn a_student_is_refused() {
    let teacher = model();
    let config = teacher.config().clone();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
    let student = Student::init(still, &config, FeatureInit::Identity, 3).unwrap();
    let student = teacher.with_student(student);
    let task = id_windows("windows", [random_tokens(256, 20, 1)]);
    let compression = Compression { method: Method::Random, fraction: 0.5 };
    let error = ask(&student, &task, Vec::new(), &options(Some(compression)), &silent).unwrap_err();
    assert!(error.to_string().contains("this is a student"), "{error}");
}
