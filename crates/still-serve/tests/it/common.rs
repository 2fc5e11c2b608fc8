//! Small random models, and requests that are served to their end.

use std::time::Duration;

use still_attention::StillConfig;
use still_model::random::{random_model, tiny_config};
use still_model::seal::{Kind, seal_bytes};
use still_model::{FeatureInit, Finish, GenerateOptions, Model, Student};
use still_serve::{Engine, EngineOptions, Event, Events, Failure, Request, TokenLogprobs, Usage};

/// A student of a random base, with a chunk of 16 tokens.
pub fn student(seed: u64) -> Model {
    let teacher = random_model(tiny_config(), 7).unwrap();
    let config = teacher.config().clone();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 16, 2);
    let student = Student::init(still, &config, FeatureInit::Normal, seed).unwrap();
    teacher.with_student(student)
}

/// Room for long prompts.
pub fn options() -> EngineOptions {
    EngineOptions { context: Some(8192), ..Default::default() }
}

pub fn engine() -> Engine {
    Engine::start(student(1), options()).unwrap()
}

/// Some tokens, other ones for every seed.
pub fn prompt(seed: u64, tokens: usize) -> Vec<u32> {
    (0..tokens as u64)
        .map(|i| (((i + 1) * (seed * 97 + 2_654_435_761)) >> 9) as u32 % 256)
        .collect()
}

pub fn request(prompt: Vec<u32>, max_new_tokens: usize) -> Request {
    let options = GenerateOptions { max_new_tokens, ..Default::default() };
    Request { ignore_end_of_sequence: true, ..Request::new(prompt, &options) }
}

#[derive(Debug)]
pub struct Served {
    pub ids: Vec<u32>,
    pub text: String,
    pub cached: usize,
    pub of_prompt: Vec<Option<TokenLogprobs>>,
    pub logprobs: Vec<TokenLogprobs>,
    pub finish: Finish,
    pub usage: Usage,
}

/// All events of a request that is served.
pub fn served(events: Events) -> Served {
    match end(events) {
        Ok(served) => served,
        Err(failure) => panic!("{failure}"),
    }
}

/// All events of a request, in the order in which they may come.
pub fn end(mut events: Events) -> Result<Served, Failure> {
    let (mut ids, mut text, mut logprobs) = (Vec::new(), String::new(), Vec::new());
    let (mut cached, mut of_prompt) = (None, Vec::new());
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Started { cached_tokens } => {
                assert!(cached.is_none() && ids.is_empty());
                cached = Some(cached_tokens);
            }
            Event::Prompt(of) => {
                assert!(of_prompt.is_empty() && ids.is_empty() && cached.is_some());
                of_prompt = of;
            }
            Event::Token { id, text: new, logprobs: of } => {
                assert!(cached.is_some());
                ids.push(id);
                text.push_str(&new);
                logprobs.extend(of);
            }
            Event::Done { finish, text: rest, usage } => {
                text.push_str(&rest);
                assert!(events.blocking_recv().is_none(), "an event after the last");
                let cached = cached.unwrap_or_default();
                return Ok(Served { ids, text, cached, of_prompt, logprobs, finish, usage });
            }
            Event::Failed(failure) => {
                assert!(events.blocking_recv().is_none(), "an event after the last");
                return Err(failure);
            }
        }
    }
    panic!("the events ended without a last one");
}

pub fn serve(engine: &Engine, prompt: Vec<u32>, max_new_tokens: usize) -> Served {
    served(engine.submit(request(prompt, max_new_tokens)).unwrap())
}

/// What the model says alone, without an engine.
pub fn alone(model: &Model, prompt: &[u32], max_new_tokens: usize) -> Vec<u32> {
    let rows = model.cache_rows(still_attention::RowDtype::Bf16);
    let mut cache = model.new_cache(1, rows).unwrap();
    let hidden = model.prefill(prompt, &mut cache).unwrap();
    let mut logits = model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let mut ids = Vec::new();
    while ids.len() < max_new_tokens {
        let id = still_model::likeliest(&logits);
        ids.push(id);
        logits = model.decode(&[id], &mut cache).unwrap().to_vec();
    }
    ids
}

/// A state's file with every value of a tensor in place of its own, and a checksum that fits.
pub fn forged(bytes: &[u8], tensor: &str, value: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let range = header(&bytes)[tensor]["data_offsets"].clone();
    let [from, to] = [0, 1].map(|i| range[i].as_u64().unwrap() as usize);
    let data = bytes.len() - data_bytes(&bytes);
    let values = bytes[data + from..data + to].chunks_exact_mut(value.len());
    values.for_each(|to| to.copy_from_slice(value));
    seal_bytes(&mut bytes, Kind::Safetensors).unwrap();
    bytes
}

/// What a state's file says of its tensors.
pub fn header(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(&bytes[8..bytes.len() - data_bytes(bytes)]).unwrap()
}

fn data_bytes(bytes: &[u8]) -> usize {
    bytes.len() - 8 - u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

/// The largest number of bf16: finite, and no numbers a layer later.
pub const LARGEST_BF16: [u8; 2] = (0x7f7f_u16).to_le_bytes();

/// Waits until it is so.
pub fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
