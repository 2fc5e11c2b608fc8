//! Models measured alike: a document that is read once, tasks, speed.

use std::sync::atomic::{AtomicUsize, Ordering};

use still_attention::{RowDtype, StillConfig};
use still_eval::long::{Judge, LongFiles, LongItem, LongOptions, LongTask};
use still_eval::run::{AskOptions, Sample, ask, ask_after, silent};
use still_eval::task::{Item, Metric, Question, Task, id_windows};
use still_eval::{Document, Measured, ModelBench, Yardstick, perplexity_ratio, random_tokens};
use still_model::random::{random_model, tiny_config};
use still_model::{FeatureInit, Model, ModelConfig, OnRead, Student};

fn teacher() -> Model {
    random_model(ModelConfig { eos_token_ids: vec![], ..tiny_config() }, 5).unwrap()
}

fn student(teacher: &Model) -> Model {
    let config = teacher.config();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
    let student = Student::init(still, config, FeatureInit::Identity, 5).unwrap();
    teacher.with_student(student)
}

/// A document and questions of a few tokens about it.
fn document(model: &Model, tokens: usize) -> Document {
    let vocab = model.config().vocab_size;
    let ids = random_tokens(vocab, tokens, 1);
    let items = (0..3).map(|n| {
        let prompt_ids = [ids.clone(), random_tokens(vocab, 5, 100 + n)].concat();
        let (targets, judge) = (vec!["x".into()], Judge::All);
        let item = LongItem { prompt_ids, context_tokens: 0, max_new_tokens: 4, targets, judge };
        let question = Question::Generation(Box::new(item));
        Item { id: n.to_string(), group: None, question }
    });
    let (items, metrics) = (items.collect(), vec![Metric::Score]);
    let task = Task { name: "questions".into(), items, metrics, length: None };
    Document { ids, tasks: vec![task] }
}

const OPTIONS: AskOptions = AskOptions { rows: RowDtype::F32, batch_size: 1, compression: None };

fn answers(samples: &[Sample]) -> Vec<String> {
    samples.iter().map(|sample| format!("{:?}", sample.answer)).collect()
}

/// Answers that go on from what was read are those to whole prompts, and what was read is not read again.
#[test]
fn questions_go_on_from_a_document() {
    let teacher = teacher();
    for model in [&student(&teacher), &teacher] {
        let document = document(model, 200);
        let bench = ModelBench::new(model, 1, RowDtype::F32).unwrap();
        let (point, cache) = bench.time_text(&document.ids, 3, &OnRead::default()).unwrap();
        assert_eq!(cache.position(0), 200, "what is timed after the text is not in its cache");
        assert_eq!((point.context, point.prefilled_cache_bytes), (200, cache.size_bytes()));
        let task = &document.tasks[0];
        let whole = ask(model, task, Vec::new(), &OPTIONS, &silent).unwrap();
        let read = Some((document.ids.clone(), cache));
        let after = ask_after(model, task, read, Vec::new(), &OPTIONS, &silent).unwrap();
        assert_eq!(answers(&whole.samples), answers(&after.samples));
        assert_eq!((whole.tokens, after.tokens), (200 + 3 * 5, 3 * 5));
        // A cache of another text helps nobody, and hurts nobody.
        let other = random_tokens(model.config().vocab_size, 40, 9);
        let (_, cache) = bench.time_text(&other, 1, &OnRead::default()).unwrap();
        let read = Some((other, cache));
        let apart = ask_after(model, task, read, Vec::new(), &OPTIONS, &silent).unwrap();
        assert_eq!(answers(&whole.samples), answers(&apart.samples));
        assert_eq!(apart.tokens, whole.tokens);
    }
}

#[test]
fn a_yardstick_measures_all_that_it_has_and_nothing_else() {
    let teacher = teacher();
    let student = student(&teacher);
    let heldout = id_windows("heldout", (0..2).map(|n| random_tokens(256, 300, n)));
    let options = LongOptions { length: 600, items: 2, seed: 1, chat: false };
    let files = LongFiles::default();
    let vocab = teacher.config().vocab_size;
    let passkey = LongTask::Passkey.build(&teacher.tokenizer, vocab, &files, options).unwrap();
    let yardstick = Yardstick {
        document: Some(document(&teacher, 200)),
        tasks: vec![heldout, passkey],
        contexts: vec![100],
        decode_steps: 2,
    };
    assert_eq!(yardstick.items(), 3 + 2 + 2);
    let (read, answered) = (std::sync::Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
    let counter = read.clone();
    let on_read = OnRead::new(move |more, _| {
        counter.fetch_add(more, Ordering::Relaxed);
    });
    let on_answer = || {
        answered.fetch_add(1, Ordering::Relaxed);
    };
    let measure = |model| yardstick.measure(model, RowDtype::F32, &on_read, &on_answer).unwrap();
    let (of_teacher, of_student) = (measure(&teacher), measure(&student));
    assert_eq!(read.load(Ordering::Relaxed), 2 * 200);
    assert_eq!(answered.load(Ordering::Relaxed), 2 * 7);
    for measured in [&of_teacher, &of_student] {
        assert_eq!(measured.nll("heldout").unwrap().tokens(), 2 * 299);
        assert_eq!(measured.right("passkey").unwrap().1, 2);
        assert_eq!(measured.right("questions").unwrap().1, 3);
        assert_eq!(measured.points.len(), 1);
        assert_eq!(measured.document.unwrap().context, 200);
        assert_eq!((measured.nll("other"), measured.right("other")), (None, None));
    }
    let ratio = perplexity_ratio("heldout", &of_student, &of_teacher, 1).unwrap().unwrap();
    let mean = |of: &Measured| of.mean("heldout", Metric::Perplexity).unwrap();
    assert!((ratio.mean.ln() - (mean(&of_student) - mean(&of_teacher))).abs() < 1e-9);
    assert!(ratio.low <= ratio.mean && ratio.mean <= ratio.high);
    assert_eq!(perplexity_ratio("other", &of_student, &of_teacher, 1).unwrap(), None);

    let nothing = Yardstick::default().measure(&teacher, RowDtype::F32, &OnRead::default(), &|| ());
    let nothing = nothing.unwrap();
    assert!(nothing.points.is_empty() && nothing.document.is_none());
}
