//! What batching and kept states save.
//!
//! ```text
//! cargo run --release -p still-serve --example measure -- demo [ROUNDS] [OUT.json] [DEVICE]
//! ```
//!
//! `shape:llama-3.1-8b` in place of a model is a student of random weights of that shape, which keeps 4 of 64 tokens.
//!
//! Generated tokens a second of 32 requests together (on a GPU 64), compared with one at a time; and the time to the first token of a second turn,
//! compared with the first one's. The file has every round, medians, command, commit and CPU.

use std::time::{Duration, Instant};

use candle_core::Tensor;
use serde_json::{Value, json};
use still_attention::{RowDtype, StillConfig};
use still_model::random::{random_model_on, shape};
use still_model::{
    Cache, Cancel, FeatureInit, GenerateOptions, Model, Student, WeightFormat, device, usual_dtype,
};
use still_serve::{Engine, EngineOptions, Event, Events, Request, Usage};

const CLIENTS: usize = 32;
const CLIENTS_OF_GPU: usize = 64;
/// Tokens of a prompt of the first measurement.
const SHORT: usize = 32;
const NEW: usize = 256;
/// Clients that are served one at a time.
const ALONE: usize = 2;
/// Tokens of a conversation of the second.
const LONG: usize = 8192;
const SECOND_TURN: usize = 50;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let name = std::env::args().nth(1).unwrap_or_else(|| "demo".into());
    let rounds = std::env::args().nth(2).map_or(Ok(3), |rounds| rounds.parse())?;
    let out = std::env::args().nth(3);
    let model = load(&name, &std::env::args().nth(4).unwrap_or_else(|| "cpu".into()))?;
    let clients = if model.device().is_cpu() { CLIENTS } else { CLIENTS_OF_GPU };
    println!(
        "{name}: {} layers, {}, {} threads",
        model.config().num_hidden_layers,
        model.decoder.lm_head.format_name(),
        std::thread::available_parallelism()?,
    );
    let (mut together, mut speedup, mut turns) = (Vec::new(), Vec::new(), Vec::new());
    let mut record = Vec::new();
    for round in 0..rounds {
        // In turn, so that both have the machine as it is at the time.
        let one = tokens_per_second(&model, 1, ALONE, round)?;
        let all = tokens_per_second(&model, clients, clients, round)?;
        println!(
            "{clients} together {all:.1} tokens/s, one at a time {one:.1}: {:.2} ×",
            all / one
        );
        together.push(all);
        speedup.push(all / one);
        let (cold, warm) = first_tokens(&model, round)?;
        let share = 100.0 * warm / cold;
        println!(
            "first token after {LONG} tokens {cold:.2} s, of the turn that follows {warm:.3} s: {share:.1} %"
        );
        turns.push(share);
        record.push(json!({
            "together_tokens_per_s": all, "one_at_a_time_tokens_per_s": one, "ratio": all / one,
            "first_token_seconds": cold, "second_turn_first_token_seconds": warm, "second_turn_share": warm / cold,
        }));
    }
    let [together, speedup, turns] =
        [&mut together, &mut speedup, &mut turns].map(|values| median(values));
    println!(
        "medians: {together:.1} tokens/s, {speedup:.2} × one at a time; second turn {turns:.1} % of the first"
    );
    let parts = parts_of_a_turn(&model)?;
    println!(
        "of a second turn: copy of the state {:.1} ms, reading {:.1} ms until the last kernel is queued, {:.1} ms until it is done",
        parts[0], parts[1], parts[2]
    );
    if let Some(out) = out {
        let mut about = about(&name, &model, clients);
        about["second_turn_ms"] = json!({ "copy": parts[0], "queued": parts[1], "done": parts[2] });
        about["rounds"] = json!(record);
        about["medians"] = json!({
            "together_tokens_per_s": together, "ratio": speedup, "second_turn_share": turns / 100.0,
        });
        std::fs::write(out, format!("{about:#}\n"))?;
    }
    Ok(())
}

/// A model by its name, or of random weights.
fn load(name: &str, place: &str) -> Result<Model, Box<dyn std::error::Error>> {
    let device = device(place)?;
    let dtype = usual_dtype(&device)?;
    let Some(known) = name.strip_prefix("shape:") else {
        return Ok(Model::load_on(name, &device, dtype)?);
    };
    let base = random_model_on(shape(known)?, &device, dtype, WeightFormat::File)?;
    let config = base.config();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
    let student = Student::init(still, config, FeatureInit::Identity, 0)?;
    Ok(base.with_student(student.to_device(&device)?))
}

/// What was measured, and where.
fn about(name: &str, model: &Model, clients: usize) -> Value {
    let commit = std::process::Command::new("git").args(["rev-parse", "HEAD"]).output();
    let commit = commit.ok().filter(|output| output.status.success());
    let commit = commit.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |name: &str| {
        let line = cpu.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let flags = line("flags").unwrap_or_default();
    let has = |name: &&str| flags.split(' ').any(|flag| flag == *name);
    let widest = ["amx_bf16", "avx512_bf16", "avx512f", "avx2"].into_iter().find(has);
    json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "commit": commit,
        "cpu": line("model name"),
        "vectors": widest,
        "threads": std::thread::available_parallelism().map_or(1, usize::from),
        "model": name,
        "weights": model.decoder.lm_head.format_name(),
        "clients": clients,
        "device": format!("{:?}", model.device().location()),
        "prompt_tokens": SHORT,
        "new_tokens": NEW,
        "conversation_tokens": LONG,
        "second_turn_tokens": SECOND_TURN,
    })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Text that differs from client to client.
fn prompt(model: &Model, client: u64, tokens: usize) -> Vec<u32> {
    let vocab = model.config().vocab_size as u64;
    (0..tokens as u64).map(|i| ((i * 31 + client * 7919 + i * i * client) % vocab) as u32).collect()
}

fn request(prompt: Vec<u32>, new: usize) -> Request {
    let options = GenerateOptions { max_new_tokens: new, ..Default::default() };
    Request { ignore_end_of_sequence: true, ..Request::new(prompt, &options) }
}

fn done(mut events: Events) -> Result<(Vec<u32>, Usage), Box<dyn std::error::Error>> {
    let mut ids = Vec::new();
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Token { id, .. } => ids.push(id),
            Event::Done { usage, .. } => return Ok((ids, usage)),
            Event::Failed(failure) => return Err(failure.into()),
            Event::Started { .. } | Event::Prompt(_) => {}
        }
    }
    Err("a request had no end".into())
}

/// Of `clients` requests, `concurrent` at a time.
fn tokens_per_second(
    model: &Model,
    concurrent: usize,
    clients: usize,
    round: usize,
) -> Result<f64, Box<dyn std::error::Error>> {
    let options = EngineOptions { max_concurrent: concurrent, ..Default::default() };
    let engine = Engine::start(model.clone(), options)?;
    // Threads and weights are there.
    done(engine.submit(request(prompt(model, 0, SHORT), 2))?)?;
    let begun = Instant::now();
    let events: Result<Vec<Events>, _> = (0..clients)
        .map(|n| {
            engine.submit(request(prompt(model, (round * clients + n + 1) as u64, SHORT), NEW))
        })
        .collect();
    let mut tokens = 0;
    for events in events? {
        tokens += done(events)?.0.len();
    }
    let rate = tokens as f64 / begun.elapsed().as_secs_f64();
    engine.shutdown(Duration::from_secs(10));
    Ok(rate)
}

/// Milliseconds that a second turn spends, without the server: on a copy of the state, and after that on reading, until all is queued and
/// until the logits are there. Medians of five; on a CPU what is queued is done.
fn parts_of_a_turn(model: &Model) -> Result<[f64; 3], Box<dyn std::error::Error>> {
    let rows = model.cache_rows(RowDtype::Bf16);
    let mut state = model.new_cache(1, rows)?;
    let logits = |hidden: &Tensor| -> Result<f32, Box<dyn std::error::Error>> {
        Ok(model.logits(hidden)?.flatten_all()?.to_vec1::<f32>()?[0])
    };
    let read = |ids: &[u32], cache: &mut Cache| {
        model.prefill_until(ids, cache, &Cancel::default(), &Default::default())
    };
    let last = read(&prompt(model, 77, LONG), &mut state)?;
    logits(&last)?;
    let mut parts = [const { Vec::new() }; 3];
    for turn in 0..5 {
        let begun = Instant::now();
        let mut cache = state.clone();
        let copied = begun.elapsed();
        let last = read(&prompt(model, 600 + turn, SECOND_TURN + 32), &mut cache)?;
        let queued = begun.elapsed() - copied;
        logits(&last)?;
        let done = begun.elapsed() - copied;
        for (part, took) in parts.iter_mut().zip([copied, queued, done]) {
            part.push(1e3 * took.as_secs_f64());
        }
    }
    Ok(parts.each_mut().map(|part| median(part)))
}

/// Seconds to the first token of a conversation of [`LONG`] tokens, and of the turn after it.
fn first_tokens(model: &Model, round: usize) -> Result<(f64, f64), Box<dyn std::error::Error>> {
    let options = EngineOptions { context: Some(2 * LONG), ..Default::default() };
    let engine = Engine::start(model.clone(), options)?;
    done(engine.submit(request(prompt(model, 0, SHORT), 2))?)?;
    let mut tokens = prompt(model, 1 + round as u64, LONG);
    let (answer, cold) = done(engine.submit(request(tokens.clone(), 32))?)?;
    tokens.extend(answer);
    tokens.extend(prompt(model, 500 + round as u64, SECOND_TURN));
    let (_, warm) = done(engine.submit(request(tokens, 2))?)?;
    engine.shutdown(Duration::from_secs(10));
    Ok((cold.first_token_seconds, warm.first_token_seconds))
}
