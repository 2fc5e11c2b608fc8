//! Tasks asked on a CUDA GPU against the same on the CPU.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it.

use candle_core::DType;
use still_attention::RowDtype;
use still_eval::compress::{Compression, Method};
use still_eval::run::{Answer, AskOptions, Sample, ask, silent};
use still_eval::task::{Choice, Generative, Item, Metric, Question, Request, Task, Window};
use still_model::random::{random_model, tiny_kernel_config, tiny_student};
use still_model::{Model, device};

/// A teacher and a student, each on the CPU and on the GPU.
fn pairs() -> Vec<[Model; 2]> {
    let teacher = random_model(tiny_kernel_config(), 3).unwrap();
    let student = tiny_student(teacher.config(), |_| {}).unwrap();
    let device = device("cuda").unwrap_or_else(|error| panic!("these tests need a GPU: {error}"));
    let pair = |model: Model| {
        let there = model.to_device(&device, DType::F32).unwrap();
        [model, there]
    };
    [teacher.clone(), teacher.with_student(student)].map(pair).into()
}

fn words(count: usize, seed: usize) -> String {
    (0..count).map(|i| format!(" {}", (i * i + 31 * seed + i * seed) % 97)).collect()
}

fn task(items: Vec<Item>, metric: Metric) -> Task {
    Task { name: "made".into(), items, metrics: vec![metric], length: None }
}

fn item(n: usize, group: Option<&str>, question: Question) -> Item {
    Item { id: n.to_string(), group: group.map(str::to_owned), question }
}

/// Choices after contexts that are long enough to be read once and after others that are not, alone and in a group.
fn choices() -> Vec<Item> {
    let beginning = words(400, 1);
    (0..12)
        .map(|n| {
            let (own, group) = match n % 3 {
                0 => (words(20 + 7 * n, n), None),
                1 => (words(700 + n, n), None),
                _ => (format!("{beginning}{}", words(9 + n, n)), Some("group")),
            };
            let choices: Vec<String> =
                (0..4).map(|choice| words(1 + (choice * n) % 5, choice)).collect();
            let request =
                |choice: &String| Request { context: own.clone(), continuation: choice.clone() };
            let requests = choices.iter().map(request).collect();
            item(n, group, Question::Choice(Choice { requests, choices, gold: 0 }))
        })
        .collect()
}

fn windows() -> Vec<Item> {
    (0..7)
        .map(|n| {
            let ids = (0..150 + 211 * n).map(|i| ((i * i + n) % 256) as u32).collect();
            Window { ids, scored_from: 100, bytes: None }.item(n.to_string())
        })
        .collect()
}

#[derive(Debug)]
struct Written(Vec<u32>);

impl Generative for Written {
    fn prompt_ids(&self) -> &[u32] {
        &self.0
    }

    fn max_new_tokens(&self) -> usize {
        20
    }

    fn targets(&self) -> &[String] {
        &[]
    }

    fn score(&self, answer: &str) -> f64 {
        answer.len() as f64
    }
}

fn written() -> Vec<Item> {
    (0..7)
        .map(|n| {
            let ids = (0..90 + 400 * n).map(|i| ((i * 7 + n) % 256) as u32).collect();
            item(n, None, Question::Generation(Box::new(Written(ids))))
        })
        .collect()
}

fn asked(model: &Model, task: &Task, compression: Option<Compression>) -> Vec<Sample> {
    let options = AskOptions { rows: RowDtype::F32, batch_size: 5, compression };
    ask(model, task, Vec::new(), &options, &silent).unwrap().samples
}

fn close(got: f64, expected: f64) -> bool {
    (got - expected).abs() <= 2e-3 * (1.0 + expected.abs())
}

#[test]
fn answers_are_those_of_the_cpu() {
    for [cpu, gpu] in pairs() {
        for task in [
            task(choices(), Metric::Acc),
            task(windows(), Metric::Perplexity),
            task(written(), Metric::Score),
        ] {
            let [got, expected] = [&gpu, &cpu].map(|model| asked(model, &task, None));
            assert_eq!(got.len(), task.items.len());
            same_answers("whole", &got, &expected);
        }
    }
}

#[test]
fn compressed_caches_answer_as_on_the_cpu() {
    let [[cpu, gpu], _] = pairs().try_into().unwrap();
    for method in Method::ALL {
        let compression = Some(Compression { method, fraction: 0.2 });
        for task in [
            task(choices(), Metric::Acc),
            task(windows(), Metric::Perplexity),
            task(written(), Metric::Score),
        ] {
            let [got, expected] = [&gpu, &cpu].map(|model| asked(model, &task, compression));
            for (got, expected) in got.iter().zip(&expected) {
                assert_eq!(got.cache_bytes, expected.cache_bytes, "{method:?}");
            }
            // Rows whose scores are as good as equal change places between devices, and written texts with them:
            // `a_gpu_writes_as_the_cpu` lists such rows and compares texts of one selection.
            let comparable = |sample: &&Sample| !matches!(sample.answer, Answer::Generation { .. });
            let [got, expected]: [Vec<Sample>; 2] =
                [&got, &expected].map(|all| all.iter().filter(comparable).cloned().collect());
            same_answers(method.name(), &got, &expected);
        }
    }
}

fn same_answers(cache: &str, got: &[Sample], expected: &[Sample]) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        let item = format!("{cache} caches, item {}", got.id);
        assert_eq!((&got.id, got.tokens), (&expected.id, expected.tokens));
        match (&got.answer, &expected.answer) {
            (
                Answer::Choice { loglikelihoods: got, .. },
                Answer::Choice { loglikelihoods: expected, .. },
            ) => {
                let near = got.iter().zip(expected).all(|(&a, &b)| close(a, b));
                assert!(near, "{item}: {got:?} {expected:?}");
            }
            (Answer::Window { nll: got, .. }, Answer::Window { nll: expected, .. }) => {
                assert_eq!(got.len(), expected.len());
                for (&a, &b) in got.iter().zip(expected) {
                    assert!(close(a.into(), b.into()), "{item}: {a} {b}");
                }
            }
            (got, expected) => assert_eq!(got, expected, "{item}"),
        }
    }
}
