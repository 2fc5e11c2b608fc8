//! What budgets cost and what they keep: perplexity, repeated text and pass keys of several students of one model, one JSON
//! object a line.
//!
//! `cargo run --release -p still-train --example compare_budgets -- MODEL TEXT KEYS WINDOWS SUBJECT…`
//!
//! `TEXT`: .txt, .jsonl or .jsonl.zst. Of every subject: perplexity of `WINDOWS` windows (2 or more) of 4,096 tokens with its difference from
//! the first subject (paired bootstrap), the likelihood of the second copy of 1,024 tokens of text that are fed twice, and `KEYS` pass
//! keys in 2,048 and 4,096 tokens each with Wilson's 95 % interval. A subject is `teacher`, `uniform:B` (untrained, `B` of
//! every 64), `budgets:FILE` (untrained, as calibrated) or `student:DIR`.

use std::error::Error;
use std::path::PathBuf;

use serde_json::{Value, json};
use still_attention::{RowDtype, StillConfig};
use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::run::{AskOptions, ask, mean, silent};
use still_eval::task::Metric;
use still_eval::{Nll, PairedBootstrap, evaluate_windows, wilson};
use still_model::{Model, Student};
use still_train::{AttentionRecipe, Budgets, DataRecipe, TokenCache, Windows};

const WINDOW: usize = 4096;
const COPY: usize = 1024;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, keys, windows, subjects @ ..] = args.as_slice() else {
        return Err("usage: compare_budgets MODEL TEXT KEYS WINDOWS SUBJECT…".into());
    };
    let (keys, windows): (usize, usize) = (keys.parse()?, windows.parse()?);
    let teacher = Model::load(model)?;
    let data = DataRecipe { length: WINDOW, min_length: WINDOW, ..DataRecipe::default() };
    let cache = TokenCache::user()?;
    let text = Windows::read(&[PathBuf::from(text)], &teacher.tokenizer, &data, 0, &cache)?;
    let tokens = text.first_tokens(windows * WINDOW).concat();
    let copies: Vec<u32> = tokens
        .chunks_exact(WINDOW)
        .flat_map(|window| [&window[..COPY], &window[..COPY]].concat())
        .collect();
    let asked = Asked { tokens, copies, windows, keys };

    // Side by side: many threads on one sequence gain less.
    let threads = rayon::current_num_threads().div_ceil(subjects.len().max(1));
    let measured: Vec<Result<Measured, String>> = std::thread::scope(|scope| {
        let running: Vec<_> = subjects
            .iter()
            .map(|subject| {
                let (teacher, asked) = (&teacher, &asked);
                scope.spawn(move || {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let pool = pool.map_err(|error| error.to_string())?;
                    let told = |error| format!("{subject}: {error}");
                    pool.install(|| measure(subject, teacher, asked).map_err(told))
                })
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err("a thread panicked".into()))
        };
        running.into_iter().map(join).collect()
    });

    let mut reference: Option<(Nll, Nll)> = None;
    for measured in measured {
        let Measured { mut line, nll, second } = measured?;
        let (first, first_second) = reference.get_or_insert_with(|| (nll.clone(), second.clone()));
        let bootstrap = PairedBootstrap::default();
        for (name, a, b) in [("nll", &nll, first), ("repeated_nll", &second, first_second)] {
            let difference = bootstrap.difference(a, b)?;
            line[format!("{name}_above_first")] =
                json!([difference.mean, difference.low, difference.high]);
        }
        println!("{line}");
    }
    Ok(())
}

/// What every subject is asked.
struct Asked {
    tokens: Vec<u32>,
    copies: Vec<u32>,
    windows: usize,
    keys: usize,
}

/// What a subject answered.
struct Measured {
    line: Value,
    nll: Nll,
    /// Of the second copies.
    second: Nll,
}

fn measure(subject: &str, teacher: &Model, asked: &Asked) -> Result<Measured, Box<dyn Error>> {
    let Asked { tokens, copies, windows, keys } = asked;
    let model = subject_of(subject, teacher)?;
    let rows = model.cache_rows(RowDtype::Bf16);
    let nll = evaluate_windows(&model, tokens, WINDOW, *windows, rows, &|_| {})?;
    let both = evaluate_windows(&model, copies, 2 * COPY, *windows, rows, &|_| {})?;
    let second = Nll { per_token: both.per_token.iter().map(|w| w[COPY..].to_vec()).collect() };
    let mut line = json!({
        "subject": subject,
        "tokens": nll.tokens(),
        "ppl_1k": nll.prefix(1024).perplexity(),
        "ppl_4k": nll.perplexity(),
        "repeated_nll": second.mean(),
    });
    for length in [2048, 4096] {
        let options = LongOptions { length, items: *keys, seed: 1, chat: false };
        let (vocab_size, files) = (teacher.config().vocab_size, LongFiles::default());
        let task = LongTask::Passkey.build(&teacher.tokenizer, vocab_size, &files, options)?;
        let options = AskOptions { rows, ..AskOptions::default() };
        let found = ask(&model, &task, Vec::new(), &options, &silent)?;
        let right = mean(&found.samples, Metric::Score) * *keys as f64;
        let recall = wilson(right.round() as usize, *keys)?;
        line[format!("passkey_{length}")] = json!([recall.mean, recall.low, recall.high]);
    }
    let mut cache = model.new_cache(1, rows)?;
    model.prefill(&tokens[..2 * WINDOW], &mut cache)?;
    model.decode(&tokens[..1], &mut cache)?;
    line["cache_bytes_8k"] = json!(cache.size_bytes());
    Ok(Measured { line, nll, second })
}

fn subject_of(subject: &str, teacher: &Model) -> Result<Model, Box<dyn Error>> {
    let config = teacher.config();
    let (kind, value) = subject.split_once(':').unwrap_or((subject, ""));
    let still = match kind {
        "teacher" => return Ok(teacher.clone()),
        "student" => return Ok(Model::load(value)?),
        "uniform" => {
            StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, value.parse()?)
        }
        "budgets" => {
            Budgets::read(value.as_ref())?.apply(&AttentionRecipe::default())?.resolve(config)?
        }
        _ => return Err(format!("unknown subject {subject}").into()),
    };
    Ok(teacher.with_student(Student::init(still, config, Default::default(), 0)?))
}
