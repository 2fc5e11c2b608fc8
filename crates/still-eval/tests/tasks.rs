//! The standard tasks on hand-made data and small random models: prompts, scores against one sequence at a time, batches.

use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use still_attention::{RowDtype, StillConfig};
use still_eval::operator::Pass;
use still_eval::run::{Answer, AskOptions, Asked, Listener, Sample, TaskScores, ask};
use still_eval::task::{
    Metric, Question, Request, STANDARD, StandardOptions, Task, WindowOptions, standard, windows,
};
use still_eval::{EvalError, evaluate_windows};
use still_model::random::{random_model, tiny_config};
use still_model::{FeatureInit, Model, ModelConfig, Student};

/// Reads on, and hears nothing.
struct Deaf;

impl Listener for Deaf {
    fn answered(&self, _: &Task, _: &Sample) -> still_eval::Result<()> {
        Ok(())
    }
}

fn teacher() -> Model {
    let config = ModelConfig { max_position_embeddings: 4096, ..tiny_config() };
    random_model(config, 3).unwrap()
}

/// Whose contexts of one byte a token are several chunks long.
fn student() -> Model {
    let teacher = teacher();
    let config = teacher.config().clone();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
    let student = Student::init(still, &config, FeatureInit::Identity, 3).unwrap();
    teacher.with_student(student)
}

fn data() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data"))
}

fn task(name: &str) -> Task {
    let shots = Some(3);
    standard(name, data(), &StandardOptions { shots, ..StandardOptions::default() }).unwrap()
}

fn asked(model: &Model, task: &Task, batch_size: usize) -> Asked {
    ask(model, task, Vec::new(), &AskOptions { batch_size, ..AskOptions::default() }, &Deaf)
        .unwrap()
}

/// Log-likelihoods of a choice, or of the one continuation.
fn loglikelihoods(sample: &Sample) -> Vec<f64> {
    match &sample.answer {
        Answer::Choice { loglikelihoods, .. } => loglikelihoods.clone(),
        Answer::Continuation { loglikelihood, .. } => vec![*loglikelihood],
        other => panic!("no likelihoods in {other:?}"),
    }
}

fn requests(task: &Task, item: usize) -> &[Request] {
    match &task.items[item].question {
        Question::Choice(choice) => &choice.requests,
        Question::Continuation(request) => std::slice::from_ref(request),
        other => panic!("no requests in {other:?}"),
    }
}

/// The whole of context and continuation at once, the log-softmax in float64.
fn naive(model: &Model, request: &Request) -> (f64, bool) {
    let text = format!("{}{}", request.context, request.continuation);
    let ids = model.tokenizer.encode(&text, true).unwrap();
    let before = model.tokenizer.encode(request.context.trim_end(), true).unwrap().len();
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let input = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let hidden = model.forward(&input, &mut cache, None).unwrap().squeeze(0).unwrap();
    let logits = model.logits(&hidden).unwrap().to_vec2::<f32>().unwrap();
    let (mut sum, mut greedy) = (0.0, true);
    for position in before..ids.len() {
        let row = &logits[position - 1];
        let total: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        let target = row[ids[position] as usize];
        sum += f64::from(target) - total.ln();
        greedy &= row.iter().all(|&x| x <= target);
    }
    (sum, greedy)
}

#[test]
fn prompts_are_the_harness_s() {
    let shown = |name: &str, item: usize| {
        let task = task(name);
        requests(&task, item).to_vec()
    };
    let request = |context: &str, continuation: &str| Request {
        context: context.into(),
        continuation: continuation.into(),
    };
    assert_eq!(
        shown("piqa", 1),
        [
            request("Question: kettle\nAnswer:", " holds a library"),
            request("Question: kettle\nAnswer:", " holds water"),
        ]
    );
    let light = "Question: Which of these gives its own light?\nAnswer:";
    assert_eq!(
        shown("arc_easy", 0),
        [request(light, " the Moon"), request(light, " a star"), request(light, " a mirror")]
    );
    let rowing = "Rowing: Two women carry a boat to the river. The women";
    assert_eq!(shown("hellaswag", 0)[1], request(rowing, " set the boat down and get in."));
    let coat = "Home: How to dry a coat. Hang it up. Give it room on every side.";
    assert_eq!(shown("hellaswag", 1)[3], request(coat, " Pour water on it."));
    assert_eq!(
        shown("winogrande", 1),
        [
            request("Ann thanked Joan, since Ann", " had helped so much."),
            request("Ann thanked Joan, since Joan", " had helped so much."),
        ]
    );
    let rain = "It had rained for nine days, and on the tenth day it still";
    assert_eq!(shown("lambada_openai", 2), [request(rain, " rained")]);
    let melts = "The following are multiple choice questions (with answers) about kitchen science.\n\n\
                 What makes dough rise?\nA. salt\nB. yeast\nC. sand\nD. ice\nAnswer: B\n\n\
                 At sea level water boils at\nA. 50 °C\nB. 80 °C\nC. 100 °C\nD. 120 °C\nAnswer: C\n\n\
                 Which of these is an acid?\nA. vinegar\nB. flour\nC. oil\nD. sugar\nAnswer: A\n\n\
                 Which melts first in a warm room?\nA. iron\nB. chocolate\nC. salt\nD. glass\nAnswer:";
    assert_eq!(shown("mmlu", 1), ["A", "B", "C", "D"].map(|x| request(melts, &format!(" {x}"))));
}

#[test]
fn every_task_scores_as_one_sequence_at_a_time() {
    for model in [teacher(), student()] {
        for name in STANDARD {
            let task = task(name);
            let got = asked(&model, &task, 2);
            assert!(got.complete && got.samples.len() == task.items.len());
            let mut longest = 0;
            for (n, sample) in got.samples.iter().enumerate() {
                let expected: Vec<(f64, bool)> =
                    requests(&task, n).iter().map(|request| naive(&model, request)).collect();
                for (got, (expected, _)) in loglikelihoods(sample).iter().zip(&expected) {
                    assert!((got - expected).abs() < 1e-3, "{name} {n}: {got} {expected}");
                }
                let likeliest = (0..expected.len())
                    .max_by(|&a, &b| expected[a].0.total_cmp(&expected[b].0))
                    .unwrap();
                let right = match &task.items[n].question {
                    Question::Choice(choice) => likeliest == choice.gold,
                    _ => expected[0].1,
                };
                assert_eq!(sample.scores[&Metric::Acc], f64::from(u8::from(right)), "{name} {n}");
                longest = longest.max(sample.tokens);
            }
            assert!(name != "mmlu" || longest > 300, "{longest} tokens end within the window");
        }
    }
}

#[test]
fn batches_change_no_answer() {
    for model in [teacher(), student()] {
        for name in STANDARD {
            let task = task(name);
            let alone = asked(&model, &task, 1);
            for batch_size in [2, 16] {
                let together = asked(&model, &task, batch_size);
                for (a, b) in alone.samples.iter().zip(&together.samples) {
                    let same = loglikelihoods(a)
                        .iter()
                        .zip(loglikelihoods(b))
                        .all(|(a, b)| (a - b).abs() < 1e-4);
                    assert!(same && a.scores == b.scores, "{name}: {a:?} {b:?}");
                }
            }
        }
    }
}

#[test]
fn the_same_run_gives_the_same_numbers() {
    let (model, task) = (student(), task("arc_easy"));
    let [a, b] = [0, 1].map(|_| asked(&model, &task, 16));
    assert_eq!(a.samples, b.samples);
    let scores = |samples| TaskScores::of(&task, samples).unwrap();
    assert_eq!(scores(&a.samples), scores(&b.samples));
}

#[test]
fn what_questions_share_is_read_once() {
    let (model, task) = (teacher(), task("mmlu"));
    let length = |text: &str| model.tokenizer.encode(text, true).unwrap().len();
    let whole: usize = (0..task.items.len()).map(|n| length(&requests(&task, n)[0].context)).sum();
    // Every lane would read the examples itself.
    let one_lane = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let got = one_lane.install(|| asked(&model, &task, 16).tokens);
    assert!(got < whole * 2 / 3, "{got} of {whole} tokens");
}

#[test]
fn a_long_beginning_is_cut_off_as_the_harness_does() {
    let config = ModelConfig { max_position_embeddings: 100, ..tiny_config() };
    let model = random_model(config, 3).unwrap();
    let task = task("mmlu");
    let got = asked(&model, &task, 16);
    for (n, sample) in got.samples.iter().enumerate() {
        assert!(sample.truncated);
        assert_eq!(sample.tokens, 100);
        for (request, got) in requests(&task, n).iter().zip(loglikelihoods(sample)) {
            let text = format!("{}{}", request.context, request.continuation);
            // A byte is a token, and the last one predicts nothing.
            let context = request.context[text.len() - 101..].to_owned();
            let cut = Request { context, continuation: request.continuation.clone() };
            let (expected, _) = naive(&model, &cut);
            assert!((got - expected).abs() < 1e-3, "{n}: {got} {expected}");
        }
    }
    assert_eq!(TaskScores::of(&task, &got.samples).unwrap().truncated, task.items.len());
}

#[test]
fn chance_is_the_mean_over_items() {
    // 3, 4 and 5 choices.
    let expected = (1.0 / 3.0 + 1.0 / 4.0 + 1.0 / 5.0) / 3.0;
    assert!((task("arc_easy").chance().unwrap() - expected).abs() < 1e-12);
    assert_eq!(task("piqa").chance(), Some(0.5));
    assert_eq!(task("lambada_openai").chance(), None);
}

#[test]
fn limits_take_the_first_items() {
    let limited = |name: &str, limit: usize| {
        let options = StandardOptions { limit: Some(limit), shots: Some(0) };
        let task = standard(name, data(), &options).unwrap();
        task.items.into_iter().map(|item| item.id).collect::<Vec<_>>()
    };
    assert_eq!(limited("piqa", 2), ["0", "1"]);
    assert_eq!(limited("piqa", 99).len(), 5);
    assert_eq!(limited("mmlu", 3), ["kitchen_science/0", "kitchen_science/1", "map_reading/0"]);
}

#[test]
fn broken_data_names_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = r#"{"query": "q", "choices": ["a", "b"], "gold": 1}"#;
    let cases: [(&[u8], &str); 8] = [
        (b"{\"query\": \"q\", \"choices\": [\"a\"", "line 2: the line is cut short"),
        (b"{\"query\": \"q\", \"gold\": 0}", "line 2: missing field `choices`"),
        (b"{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 2}", "line 2: gold is 2"),
        (b"{\"query\": \"q\", \"choices\": [\"a\"], \"gold\": 0}", "line 2: 1 choices"),
        (
            b"{\"query\": \"q\", \"choices\": [\"a\", \"\"], \"gold\": 0}",
            "line 2: choice 1 is empty",
        ),
        (b"{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": -1}", "line 2: invalid value"),
        (b"\xff\xfe", "line 2: not UTF-8"),
        (b"[1]", "line 2: invalid type"),
    ];
    let path = dir.path().join("arc_easy.jsonl");
    for (line, words) in cases {
        let text = [good.as_bytes(), b"\n", line, b"\n", good.as_bytes(), b"\n"].concat();
        fs::write(&path, text).unwrap();
        let error = standard("arc_easy", dir.path(), &StandardOptions::default()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(words) && message.contains("arc_easy.jsonl"), "{message}");
        assert!(error.hint().is_some());
    }
    fs::write(&path, "\n\n").unwrap();
    let error = standard("arc_easy", dir.path(), &StandardOptions::default()).unwrap_err();
    assert!(error.to_string().contains("no items"), "{error}");
    let error = standard("piqa", dir.path(), &StandardOptions::default()).unwrap_err();
    assert!(matches!(error, EvalError::NoData { .. }), "{error}");
    assert!(error.to_string().contains("piqa.jsonl"), "{error}");
}

#[test]
fn missing_examples_are_no_silent_zero_shots() {
    let options = StandardOptions { shots: Some(4), limit: None };
    let error = standard("mmlu", data(), &options).unwrap_err();
    assert!(error.to_string().contains("3 examples of kitchen_science, 4"), "{error}");
}

#[test]
fn perplexity_is_that_of_windows() {
    let text = "The tide comes in twice a day, and twice a day it goes. ".repeat(12);
    for model in [teacher(), student()] {
        let ids = model.tokenizer.encode(&text, true).unwrap();
        let options = WindowOptions { length: 200, stride: None, limit: None };
        let task = windows(&text, &model.tokenizer, &options).unwrap();
        assert_eq!((task.name.as_str(), task.items.len()), ("perplexity_200", ids.len() / 200));
        let got = asked(&model, &task, 16);
        let expected =
            evaluate_windows(&model, &ids, 200, task.items.len(), RowDtype::F32, &|_| {}).unwrap();
        let scores = TaskScores::of(&task, &got.samples).unwrap();
        let (metric, estimate) = scores.metrics[0];
        assert_eq!(metric, Metric::Perplexity);
        assert!((estimate.value / expected.perplexity() - 1.0).abs() < 1e-4);
        assert!(estimate.stderr.is_some_and(|stderr| stderr > 0.0));
        // One byte a token.
        let bits = scores.bits_per_byte.unwrap();
        assert!((bits - expected.mean() / std::f64::consts::LN_2).abs() < 1e-4);
        assert_eq!((scores.curve[0].from, scores.curve.last().unwrap().to), (0, 200));
    }
}

#[test]
fn sliding_windows_score_every_token_once() {
    let text = "The tide comes in twice a day, and twice a day it goes. ".repeat(4);
    let model = student();
    let ids = model.tokenizer.encode(&text, true).unwrap();
    let options = WindowOptions { length: 100, stride: Some(30), limit: None };
    let task = windows(&text, &model.tokenizer, &options).unwrap();
    let got = asked(&model, &task, 3);
    let mut next = 1;
    for (n, sample) in got.samples.iter().enumerate() {
        let Answer::Window { nll, scored_from, .. } = &sample.answer else { panic!("{sample:?}") };
        assert_eq!(n * 30 + scored_from, next);
        next += nll.len();
        let window = &ids[n * 30..n * 30 + 100];
        let expected = evaluate_windows(&model, window, 100, 1, RowDtype::F32, &|_| {}).unwrap();
        let expected = &expected.per_token[0][scored_from - 1..];
        let same = nll.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(same && nll.len() == expected.len(), "window {n}");
    }
    assert_eq!(next, ids.len() - (ids.len() - 100) % 30);
    for (length, stride) in [(1, None), (10, Some(10)), (10, Some(0)), (100_000, None)] {
        let options = WindowOptions { length, stride, limit: None };
        assert!(windows(&text, &model.tokenizer, &options).is_err(), "{length} {stride:?}");
    }
}

#[test]
fn passes_of_the_operator_are_found_by_their_names() {
    for pass in Pass::ALL {
        assert_eq!(pass.to_string().parse::<Pass>().unwrap(), pass);
        assert_eq!(serde_json::to_value(pass).unwrap(), pass.name());
    }
    let told = "backward".parse::<Pass>().unwrap_err().to_string();
    assert!(told.contains("forward, forward-backward, decode"), "{told}");
}
