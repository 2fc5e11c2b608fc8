//! Logs of samples, interruption, and questions that are answered in writing.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use still_attention::{RowDtype, StillConfig};
use still_eval::run::{
    Answer, AskOptions, Listener, LoggedModel, Sample, SampleLog, TaskScores, ask, difference,
};
use still_eval::task::{Generative, Item, Metric, Question, StandardOptions, Task, standard};
use still_eval::{EvalError, PairedBootstrap};
use still_model::random::{random_model, tiny_config};
use still_model::{FeatureInit, Model, ModelConfig, Student};

fn model(seed: u64) -> Model {
    random_model(ModelConfig { eos_token_ids: vec![], ..tiny_config() }, seed).unwrap()
}

fn piqa() -> Task {
    let data = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data"));
    standard("piqa", data, &StandardOptions::default()).unwrap()
}

/// Keeps a log, and stops after some answers.
struct Logging<'a> {
    log: &'a SampleLog,
    stop_after: usize,
    seen: AtomicUsize,
}

impl<'a> Logging<'a> {
    fn new(log: &'a SampleLog, stop_after: usize) -> Self {
        Self { log, stop_after, seen: AtomicUsize::new(0) }
    }
}

impl Listener for Logging<'_> {
    fn answered(&self, task: &Task, sample: &Sample) -> still_eval::Result<()> {
        self.seen.fetch_add(1, Ordering::SeqCst);
        self.log.append("m", &task.name, sample)
    }

    fn stop(&self) -> bool {
        self.seen.load(Ordering::SeqCst) >= self.stop_after
    }
}

const OPTIONS: AskOptions = AskOptions { rows: RowDtype::F32, batch_size: 1, compression: None };

fn logged(name: &str, model: &Model) -> LoggedModel {
    LoggedModel::new(name, model, RowDtype::F32).unwrap()
}

/// Asks with a log at `path`, going on with what it has; on one lane, so that it stops where it should.
fn run(model: &Model, task: &Task, path: &Path, stop_after: usize) -> (Vec<Sample>, bool, usize) {
    let log = SampleLog::resume(path).unwrap();
    log.begin(&logged("m", model)).unwrap();
    let listener = Logging::new(&log, stop_after);
    let known = log.known("m", task).unwrap();
    let one_lane = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let asked = one_lane.install(|| ask(model, task, known, &OPTIONS, &listener)).unwrap();
    (asked.samples, asked.complete, listener.seen.into_inner())
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let (model, task) = (model(3), piqa());
    let whole_path = dir.path().join("whole.jsonl");
    let (whole, complete, _) = run(&model, &task, &whole_path, usize::MAX);
    assert!(complete);

    let path = dir.path().join("cut.jsonl");
    let (part, complete, first) = run(&model, &task, &path, 1);
    assert!(!complete);
    assert_eq!(part.len(), 1);
    assert_eq!(part[..], whole[..part.len()]);
    // Killed while it wrote a line.
    let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"{\"model\":\"m\",\"task\":\"piqa\",\"id\":\"4").unwrap();
    let (samples, complete, second) = run(&model, &task, &path, usize::MAX);
    assert!(complete);
    assert_eq!(samples, whole);
    assert_eq!(first + second, task.items.len(), "an item was asked twice");
    assert_eq!(fs::read(&path).unwrap(), fs::read(&whole_path).unwrap());
    // Nothing is left to ask.
    let (samples, _, third) = run(&model, &task, &path, usize::MAX);
    assert_eq!((samples, third), (whole, 0));
}

#[test]
fn a_log_of_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (one, task) = (model(3), piqa());
    let path = dir.path().join("s.jsonl");
    run(&one, &task, &path, usize::MAX);

    let log = SampleLog::resume(&path).unwrap();
    let refused = |result: still_eval::Result<()>, words: &str, line: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(words) && message.contains(line), "{message}");
    };
    refused(log.begin(&logged("m", &model(4))), "other weights", "line 1:");
    let rows = LoggedModel::new("m", &one, RowDtype::Bf16).unwrap();
    refused(log.begin(&rows), "cache in f32", "line 1:");
    log.begin(&logged("m", &one)).unwrap();

    let mut other = piqa();
    if let Question::Choice(choice) = &mut other.items[2].question {
        choice.requests[1].continuation.push('!');
    }
    refused(log.known("m", &other).map(|_| ()), "item 2 of piqa", "line 4:");
    // Of an item that is not asked any more nothing is said.
    let mut fewer = piqa();
    fewer.items.truncate(2);
    assert_eq!(log.known("m", &fewer).unwrap().len(), 2);
    assert!(log.known("another", &task).unwrap().is_empty());

    // Its lock ends with it.
    drop(log);
    let text = fs::read_to_string(&path).unwrap().replacen("\"id\":\"1\"", "\"id\":1", 1);
    fs::write(&path, text).unwrap();
    refused(SampleLog::resume(&path).map(|_| ()), "no line of a log of samples", "line 3:");
    assert!(SampleLog::create(&path).is_err());
}

#[test]
fn a_broken_model_is_an_error() {
    let mut broken = model(3);
    let mut decoder = broken.decoder.as_ref().clone();
    decoder.norm.scale = (decoder.norm.scale * f64::NAN).unwrap();
    broken.decoder = std::sync::Arc::new(decoder);
    let dir = tempfile::tempdir().unwrap();
    let log = SampleLog::create(&dir.path().join("s.jsonl")).unwrap();
    let listener = Logging::new(&log, usize::MAX);
    let error = ask(&broken, &piqa(), Vec::new(), &OPTIONS, &listener).unwrap_err();
    assert!(matches!(error, EvalError::ItemNotFinite { .. }), "{error}");
}

#[test]
fn differences_are_paired() {
    let dir = tempfile::tempdir().unwrap();
    let task = piqa();
    let answers = [3, 4].map(|seed| {
        let path = dir.path().join(format!("{seed}.jsonl"));
        run(&model(seed), &task, &path, usize::MAX).0
    });
    let bootstrap = PairedBootstrap { resamples: 500, ..PairedBootstrap::default() };
    let interval = |a: &[Sample], b: &[Sample]| difference(a, b, Metric::Acc, &bootstrap).unwrap();
    let own = interval(&answers[0], &answers[0]);
    assert_eq!((own.mean, own.low, own.high), (0.0, 0.0, 0.0));
    let value = |samples: &[Sample]| TaskScores::of(&task, samples).unwrap().metrics[0].1.value;
    let other = interval(&answers[0], &answers[1]);
    assert!((other.mean - (value(&answers[0]) - value(&answers[1]))).abs() < 1e-12);
    assert!(other.low <= other.mean && other.mean <= other.high);
    // Over the items that both have.
    let some = interval(&answers[0][..2], &answers[1]);
    let first = |samples: &[Sample]| value(&samples[..2]);
    assert!((some.mean - (first(&answers[0]) - first(&answers[1]))).abs() < 1e-12);
    assert!(difference(&answers[0], &[], Metric::Acc, &bootstrap).is_err());
}

/// Wants an answer of so many tokens.
#[derive(Debug)]
struct Length {
    prompt: Vec<u32>,
    targets: Vec<String>,
}

impl Generative for Length {
    fn prompt_ids(&self) -> &[u32] {
        &self.prompt
    }

    fn max_new_tokens(&self) -> usize {
        5
    }

    fn targets(&self) -> &[String] {
        &self.targets
    }

    fn score(&self, answer: &str) -> f64 {
        f64::from(u8::from(!answer.is_empty()))
    }
}

/// What prompts begin with is read once, and answers are those of prompts read from their beginning.
#[test]
fn what_prompts_share_is_read_once() {
    let teacher = model(3);
    let still = StillConfig::uniform(2, teacher.config().geometry(), 64, 4);
    let student = Student::init(still, teacher.config(), FeatureInit::Identity, 3).unwrap();
    // Nothing in common, then 250 tokens, 300 of the same, and again nothing; the last is the beginning of its neighbor.
    let shared = [0, 250, 300, 300, 0, 64];
    let length = [320, 400, 340, 301, 200, 64];
    let prompt = |n: usize| -> Vec<u32> {
        let own = (n as u32 + 1) * 31;
        let token = |i: usize| if i < shared[n] { i as u32 * 7 } else { i as u32 * 5 + own };
        (0..length[n]).map(|i| token(i) % 256).collect()
    };
    let mut prompts: Vec<Vec<u32>> = (0..6).map(prompt).collect();
    prompts[4] = [prompts[5].clone(), prompts[4][64..].to_vec()].concat();
    let item = |n: usize| {
        let question = Length { prompt: prompts[n].clone(), targets: vec![] };
        let question = Question::Generation(Box::new(question));
        Item { id: n.to_string(), group: None, question }
    };
    let task = |items: Vec<Item>| Task {
        name: "written".into(),
        items,
        metrics: vec![Metric::Score],
        length: None,
    };
    let dir = tempfile::tempdir().unwrap();
    for (name, model) in [("teacher", &teacher), ("student", &teacher.with_student(student))] {
        let log = SampleLog::create(&dir.path().join(name)).unwrap();
        let listener = Logging::new(&log, usize::MAX);
        let asked = |task: &Task| ask(model, task, Vec::new(), &OPTIONS, &listener).unwrap();
        let together = asked(&task((0..6).map(item).collect()));
        let alone: Vec<_> = (0..6).map(|n| asked(&task(vec![item(n)]))).collect();
        for (n, alone) in alone.iter().enumerate() {
            assert_eq!(together.samples[n], alone.samples[0], "{name}, prompt {n}");
            assert_eq!(alone.tokens, length[n], "{name}, prompt {n}");
        }
        // The third begins with 250 tokens of the second, the fourth with 300 of the third; of the last all but the last token
        // were read with the fifth.
        let saved = 250 + 300 + 63;
        assert_eq!(together.tokens, length.iter().sum::<usize>() - saved, "{name}");
    }
}

#[test]
fn written_answers_are_judged_and_logged() {
    let dir = tempfile::tempdir().unwrap();
    let question = |n: u32| {
        let prompt = (0..200).map(|i| (i * 7 + n) % 256).collect();
        Box::new(Length { prompt, targets: vec!["anything".into()] })
    };
    let items = (0..3)
        .map(|n| Item {
            id: n.to_string(),
            group: None,
            question: Question::Generation(question(n)),
        })
        .collect();
    let task = Task { name: "written".into(), items, metrics: vec![Metric::Score], length: None };
    let model = model(3);
    let path = dir.path().join("s.jsonl");
    let (part, complete, _) = run(&model, &task, &path, 1);
    assert!(!complete && part.len() == 1);
    let (samples, complete, new) = run(&model, &task, &path, usize::MAX);
    assert!(complete && new == 2);
    for (n, sample) in samples.iter().enumerate() {
        let Answer::Generation { text, new_tokens, targets } = &sample.answer else {
            panic!("{sample:?}")
        };
        assert_eq!((*new_tokens, targets[0].as_str(), sample.tokens), (5, "anything", 200));
        assert_eq!(sample.scores[&Metric::Score], f64::from(u8::from(!text.is_empty())));
        // Greedy, token by token.
        let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
        let hidden = model.prefill(question(n as u32).prompt_ids(), &mut cache).unwrap();
        let logits = model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let mut ids = vec![still_model::likeliest(&logits)];
        while ids.len() < 5 {
            ids.push(still_model::likeliest(
                model.decode(&ids[ids.len() - 1..], &mut cache).unwrap(),
            ));
        }
        assert_eq!(text, &model.tokenizer.decode(&ids, true).unwrap());
    }
    let scores = TaskScores::of(&task, &samples).unwrap().to_json();
    assert_eq!(scores["n"], 3);
    assert!(scores["score"].is_number() && scores["chance"].is_null());
}
