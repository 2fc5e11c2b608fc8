//! The evaluators on a small random model.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Device, Tensor};
use still_attention::{Branches, FeatureMap, LinearNorm, Router, RowDtype, StillConfig};
use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::run::{AskOptions, Asked, ask, mean, silent};
use still_eval::task::{Generative, Item, Metric, Question, Task};
use still_eval::{
    Ablation, EvalError, Factors, ModelBench, Result, Skipped, THE_STUDENT, Variants,
    branch_shares_of, evaluate_windows, nll_of_hidden, random_tokens,
};
use still_model::random::{random_model, tiny_config};
use still_model::{FeatureInit, Model, Student};

fn teacher() -> Model {
    random_model(tiny_config(), 3).unwrap()
}

fn student() -> Model {
    let teacher = teacher();
    let config = teacher.config().clone();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
    let student = Student::init(still, &config, FeatureInit::Identity, 3).unwrap();
    teacher.with_student(student)
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u64).map(|i| (i.wrapping_mul(6_364_136_223_846_793_005) >> 57) as u32).collect()
}

#[test]
fn likelihoods_are_those_of_whole_logits() {
    for model in [teacher(), student()] {
        // Five windows: a full batch of them and one more.
        let ids = tokens(300);
        let nll = evaluate_windows(&model, &ids.repeat(5), 300, 5, RowDtype::F32, &|_| {}).unwrap();
        for other in &nll.per_token[1..] {
            let same = other.iter().zip(&nll.per_token[0]).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(same, "a window in a batch differs from the same window alone");
        }
        let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
        let input = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let hidden = model.forward(&input, &mut cache, None).unwrap().squeeze(0).unwrap();
        let logits = model.logits(&hidden).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(nll.per_token[0].len(), 299);
        for (i, &got) in nll.per_token[0].iter().enumerate() {
            let total: f64 = logits[i].iter().map(|&x| f64::from(x).exp()).sum();
            let expected = total.ln() - f64::from(logits[i][ids[i + 1] as usize]);
            assert!((f64::from(got) - expected).abs() < 1e-4, "token {i}: {got} {expected}");
        }
    }
}

#[test]
fn a_windows_beginning_is_a_shorter_window() {
    for model in [teacher(), student()] {
        let ids = tokens(1400);
        let long = evaluate_windows(&model, &ids, 1400, 1, RowDtype::F32, &|_| {}).unwrap();
        let short = evaluate_windows(&model, &ids, 700, 1, RowDtype::F32, &|_| {}).unwrap();
        let prefix = long.prefix(700);
        assert_eq!(prefix.tokens(), short.tokens());
        assert!((prefix.mean() - short.mean()).abs() < 1e-5);
    }
}

#[test]
fn progress_counts_every_token() {
    let seen = AtomicUsize::new(0);
    let count = |tokens| {
        seen.fetch_add(tokens, Ordering::Relaxed);
    };
    evaluate_windows(&teacher(), &tokens(2600), 1300, 2, RowDtype::F32, &count).unwrap();
    assert_eq!(seen.into_inner(), 2600);
}

#[test]
fn too_little_text_and_wrong_targets_are_refused() {
    let model = teacher();
    let error = evaluate_windows(&model, &tokens(99), 50, 2, RowDtype::F32, &|_| {}).unwrap_err();
    assert!(matches!(error, EvalError::TooShort { needed: 100, got: 99, .. }), "{error}");
    assert!(evaluate_windows(&model, &tokens(99), 1, 2, RowDtype::F32, &|_| {}).is_err());
    let hidden = Tensor::zeros((2, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!(nll_of_hidden(&model, &hidden, &[1]).is_err());
    assert!(nll_of_hidden(&model, &hidden, &[1, 9999]).is_err());
}

/// Items of a task for a model; `length` tokens each.
fn long(model: &Model, task: LongTask, length: usize, items: usize, seed: u64) -> Result<Task> {
    let options = LongOptions { length, items, seed, chat: false };
    task.build(&model.tokenizer, model.config().vocab_size, &LongFiles::default(), options)
}

fn asked(model: &Model, task: &Task, rows: RowDtype) -> Asked {
    let options = AskOptions { rows, batch_size: 1, ..AskOptions::default() };
    ask(model, task, Vec::new(), &options, &silent).unwrap()
}

fn written(item: &Item) -> &dyn Generative {
    let Question::Generation(question) = &item.question else { panic!("{item:?}") };
    question.as_ref()
}

#[test]
fn prompts_have_exactly_the_length_and_hold_their_key() {
    let model = teacher();
    let task = long(&model, LongTask::Passkey, 1000, 4, 5).unwrap();
    assert_eq!(task.items.len(), 4);
    let longest = task.items.iter().map(|item| written(item).max_new_tokens()).max().unwrap();
    let mut depths = Vec::new();
    for prompt in task.items.iter().map(written) {
        let ids = prompt.prompt_ids();
        assert_eq!(ids.len() + longest, 1000);
        let text = model.tokenizer.decode(ids, true).unwrap();
        let needle =
            format!("The pass key is {0}. Remember it. {0} is the pass key.", prompt.targets()[0]);
        assert_eq!(text.matches(&needle).count(), 1, "{text}");
        assert!(text.ends_with("What is the pass key? The pass key is "));
        depths.push(text.find(&needle).unwrap());
    }
    assert!(depths.is_sorted_by(|a, b| a < b), "{depths:?}");
    assert!(long(&model, LongTask::Passkey, 300, 1, 5).is_err());
}

#[test]
fn pass_keys_share_the_beginning() {
    for model in [teacher(), student()] {
        let task = long(&model, LongTask::Passkey, 1500, 3, 5).unwrap();
        let prompts: Vec<&[u32]> =
            task.items.iter().map(|item| written(item).prompt_ids()).collect();
        let shared = prompts
            .windows(2)
            .map(|pair| pair[0].iter().zip(pair[1]).take_while(|(a, b)| a == b).count());
        let to_read = prompts.concat().len() - shared.sum::<usize>();
        let found = asked(&model, &task, RowDtype::Bf16);
        assert_eq!(found.tokens, to_read);
        assert!(found.tokens < 3 * 1500, "nothing was shared");
        assert_eq!(found.samples.len(), 3);
    }
}

#[test]
fn speed_is_measured_with_the_bytes_of_the_cache() {
    // Layers, KV heads, channels and bytes of a row of V; keys lie in tiles of 16 rows.
    let row = 2 * 2 * 8 * 2;
    let dense_bytes = 1500 * row + 1504 * row;
    for (model, dense) in [(teacher(), true), (student(), false)] {
        let bench = ModelBench::new(&model, 1, RowDtype::Bf16).unwrap();
        let points = [200, 1500].map(|context| bench.time(context, 2).unwrap());
        assert_eq!(points.map(|point| point.context), [200, 1500]);
        let full = points[1].prefilled_cache_bytes;
        assert_eq!(full == dense_bytes, dense, "{full} bytes");
        assert!(points.iter().all(|point| point.decode_tokens_per_s > 0.0));
        for (context, new_tokens) in [(0, 1), (1, 0)] {
            assert!(bench.time(context, new_tokens).is_err());
        }
    }
    assert!(ModelBench::new(&teacher(), 0, RowDtype::F32).is_err());
}

#[test]
fn repeated_text_is_judged_by_its_second_copy() {
    let nll = |model: &Model, seed| {
        let task = long(model, LongTask::RepeatedText, 140, 1, seed).unwrap();
        mean(&asked(model, &task, RowDtype::F32).samples, Metric::Perplexity)
    };
    for model in [teacher(), student()] {
        let once = random_tokens(model.config().vocab_size, 70, 5);
        let whole =
            evaluate_windows(&model, &once.repeat(2), 140, 1, RowDtype::F32, &|_| {}).unwrap();
        // Of 139 predictions, the last 69 are of the copy without its first token.
        let copy = &whole.per_token[0][70..];
        let expected = copy.iter().map(|&x| f64::from(x)).sum::<f64>() / 69.0;
        assert_eq!(nll(&model, 5), expected);
        assert_ne!(nll(&model, 6), expected);
    }
    assert!(long(&teacher(), LongTask::RepeatedText, 2, 1, 5).is_err());
}

/// Sets what a variant's name says: `router: random`.
fn set(config: &mut StillConfig, part: &str) {
    let (name, value) = part.split_once(": ").unwrap();
    match name {
        "branches" => {
            let has = |branch: &str| value.split(" + ").any(|on| on == branch);
            let (window, salient, linear) = (has("window"), has("salient"), has("linear"));
            config.branches = Branches { window, salient, linear };
            if !salient {
                config.router = Router::None;
            }
        }
        "router" => {
            config.router = match value {
                "self_saliency" => Router::SelfSaliency,
                "received_attention" => Router::ReceivedAttention,
                "random" => Router::Random { seed: 0 },
                other => {
                    assert_eq!(other, "none");
                    Router::None
                }
            }
        }
        "budgets" => {
            let budget = value.split(' ').next().unwrap().parse().unwrap();
            config.budgets.iter_mut().flatten().for_each(|b| *b = budget);
        }
        "cap" => config.cap = value.parse().ok(),
        "recall_cache" => {
            if let Ok(cache) = value.parse() {
                *config = config.clone().with_recall_cache(cache);
            }
        }
        "feature_map" if value == "softmax" => config.feature_map = FeatureMap::Softmax,
        "feature_map" => config.feature_map = FeatureMap::NpMap { householder: false },
        other => {
            assert_eq!(other, "linear_norm");
            config.linear_norm = if value == "sum" { LinearNorm::Sum } else { LinearNorm::Mean };
        }
    }
}

#[test]
fn ablations_keep_what_was_learned() {
    let teacher = random_model(tiny_config(), 3).unwrap();
    let config = teacher.config();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
    let student = Student::init(still.clone(), config, FeatureInit::Normal, 1).unwrap();
    let tokens: Vec<u32> = (0..400).map(|t| (t * t + 3 * t) % 256).collect();
    let nll = |student: Student| {
        let model = teacher.with_student(student);
        evaluate_windows(&model, &tokens, 400, 1, RowDtype::F32, &|_| {}).unwrap().mean()
    };
    let itself = student.with_config(still.clone(), config).unwrap();
    assert_eq!(nll(itself), nll(student.clone()));
    // Every pair of parts, and the same as one part each.
    let pairs = Ablation::ALL.into_iter().enumerate().flat_map(|(n, first)| {
        let second = move |second: &Ablation| format!("{first}+{second}");
        Ablation::ALL[n + 1..].iter().map(second).chain([first.to_string()])
    });
    for factors in pairs {
        let Variants { asked, skipped } = factors.parse::<Factors>().unwrap().variants(&still);
        let mut found = HashMap::from([(THE_STUDENT.to_owned(), nll(student.clone()))]);
        for (name, variant) in asked {
            let value = nll(student.with_config(variant, config).unwrap());
            assert!(value.is_finite(), "{name}");
            found.insert(name, value);
        }
        // What is skipped is what its reason says.
        let literal = |name: &str| {
            let mut changed = still.clone();
            for part in name.split(", ") {
                set(&mut changed, part);
            }
            changed
        };
        for (name, why) in skipped {
            let Skipped::SameAs(same) = why else { continue };
            let value = nll(student.with_config(literal(&name), config).unwrap());
            assert_eq!(value, found[&same], "{name}: the same as {same}");
        }
    }
    let shares = branch_shares_of(&teacher.with_student(student), &tokens, &|| {}).unwrap();
    assert_eq!(shares.len(), config.num_hidden_layers);
    for share in shares.iter().flatten() {
        assert!((share.mass.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{share:?}");
        assert_eq!(share.tokens, 400 - 128);
    }
    assert!(branch_shares_of(&teacher, &tokens, &|| {}).is_err());
}
