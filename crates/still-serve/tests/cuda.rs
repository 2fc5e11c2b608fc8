//! The engine on a CUDA GPU.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it.

use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device};
use object_store::memory::InMemory;
use still_attention::{RowDtype, StillConfig};
use still_model::random::{random_model, tiny_kernel_config, tiny_student};
use still_model::{GenerateOptions, Model, device};
use still_serve::{Engine, EngineOptions, Event, Events, Request, StateStore};

const CLIENTS: u64 = 33;

/// On the CPU, with a chunk that a GPU takes.
fn models() -> Vec<Model> {
    let teacher = random_model(tiny_kernel_config(), 3).unwrap();
    let student = |cap: Option<usize>| {
        let change = |still: &mut StillConfig| {
            still.budgets = vec![vec![4; 2]; 2];
            still.cap = cap;
        };
        let student = tiny_student(teacher.config(), change).unwrap();
        teacher.with_student(student)
    };
    vec![student(None), student(Some(16)), teacher.clone()]
}

fn gpu() -> Device {
    device("cuda").unwrap_or_else(|error| panic!("these tests need a CUDA GPU: {error}"))
}

fn deterministic() -> EngineOptions {
    EngineOptions { deterministic: true, max_concurrent: CLIENTS as usize, ..Default::default() }
}

fn prompt(seed: u64, tokens: usize) -> Vec<u32> {
    (0..tokens as u64)
        .map(|i| (((i + 1) * (seed * 97 + 2_654_435_761)) >> 9) as u32 % 256)
        .collect()
}

fn request(prompt: Vec<u32>, max_new_tokens: usize) -> Request {
    let options = GenerateOptions { max_new_tokens, ..Default::default() };
    Request { ignore_end_of_sequence: true, ..Request::new(prompt, &options) }
}

/// The tokens of an answer, and how many of the prompt's a state had read.
fn served(mut events: Events) -> (Vec<u32>, usize) {
    let mut ids = Vec::new();
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Token { id, .. } => ids.push(id),
            Event::Done { usage, .. } => return (ids, usage.cached_tokens),
            Event::Failed(failure) => panic!("{failure}"),
            Event::Started { .. } | Event::Prompt(_) => {}
        }
    }
    panic!("the events ended without a last one");
}

fn serve(engine: &Engine, prompt: Vec<u32>, max_new_tokens: usize) -> (Vec<u32>, usize) {
    served(engine.submit(request(prompt, max_new_tokens)).unwrap())
}

/// Of all lengths: within a chunk, at its end, over several pieces.
fn prompts() -> Vec<Vec<u32>> {
    let lengths = [1, 7, 63, 64, 65, 128, 200, 513, 1100];
    (0..CLIENTS).map(|n| prompt(n, lengths[n as usize % lengths.len()] + n as usize)).collect()
}

#[test]
fn a_deterministic_stream_is_the_same_alone_and_among_others_cold_and_from_a_state() {
    let device = gpu();
    for model in models() {
        for dtype in [DType::F32, DType::BF16] {
            let model = model.to_device(&device, dtype).unwrap();
            let one = Engine::start(model.clone(), deterministic()).unwrap();
            let alone: Vec<_> = prompts().into_iter().map(|p| serve(&one, p, 80).0).collect();
            let single_steps = one.counters().decode_steps;
            one.shutdown(Duration::from_secs(60));
            let many = Engine::start(model, deterministic()).unwrap();
            for round in 0..2 {
                let events: Vec<_> =
                    prompts().into_iter().map(|p| many.submit(request(p, 80)).unwrap()).collect();
                let got: Vec<_> = events.into_iter().map(served).collect();
                for (n, ((ids, cached), alone)) in got.iter().zip(&alone).enumerate() {
                    assert!(ids == alone, "{dtype:?}, round {round}: request {n}");
                    assert!(
                        round == 0 || *cached > 0 || prompts()[n].len() <= 512,
                        "{n}: {cached}"
                    );
                }
            }
            assert!(many.counters().decode_steps < single_steps / 2);
            many.shutdown(Duration::from_secs(60));
        }
    }
}

/// The mode that is usual: how often it differs is told.
#[test]
fn streams_of_a_usual_engine_mostly_agree() {
    let model = models().remove(0).to_device(&gpu(), DType::BF16).unwrap();
    let options = EngineOptions { state_memory: 0, ..Default::default() };
    let (mut same, mut equal) = (0, 0);
    let one = Engine::start(model.clone(), options.clone()).unwrap();
    let alone: Vec<_> = prompts().into_iter().map(|p| serve(&one, p, 80).0).collect();
    one.shutdown(Duration::from_secs(60));
    let many = Engine::start(model, options).unwrap();
    let events: Vec<_> =
        prompts().into_iter().map(|p| many.submit(request(p, 80)).unwrap()).collect();
    for (events, alone) in events.into_iter().zip(&alone) {
        let (ids, _) = served(events);
        equal += usize::from(&ids == alone);
        same += ids.iter().zip(alone).take_while(|(a, b)| a == b).count();
    }
    println!(
        "{equal} of {CLIENTS} streams equal; {same} of {} tokens before they part",
        CLIENTS * 80
    );
    assert!(same as u64 > CLIENTS * 80 / 4);
}

#[test]
fn states_go_from_replica_to_replica_and_from_device_to_device() {
    let device = gpu();
    for model in models() {
        let there = model.to_device(&device, DType::F32).unwrap();
        let store = StateStore::new(Arc::new(InMemory::new()), "replicas");
        let start = |model: &Model, store: Option<&StateStore>| {
            let rows = Some(RowDtype::F32);
            let options = EngineOptions { rows, state_store: store.cloned(), ..Default::default() };
            Engine::start(model.clone(), options).unwrap()
        };
        let replicas = [&there, &model, &there].map(|model| start(model, Some(&store)));
        let single = start(&there, None);
        let (mut tokens, mut read) = (prompt(1, 700), 700);
        for turn in 0..6 {
            let (ids, cached) = serve(&replicas[turn % 3], tokens.clone(), 25);
            assert_eq!(ids, serve(&single, tokens.clone(), 25).0, "turn {turn}");
            assert_eq!(cached, tokens.len() - read, "turn {turn}");
            tokens = [tokens, ids, prompt(70 + turn as u64, 40)].concat();
            // What is new, and the token that no step was fed.
            read = 41;
        }
        // A state with a name, saved on the GPU, continued on the CPU, and on the GPU again.
        let mut save = request(prompt(5, 300), 0);
        save.save_as = Some("report".into());
        assert_eq!(served(replicas[0].submit(save).unwrap()).0, Vec::<u32>::new());
        let expected = serve(&single, [prompt(5, 300), prompt(6, 20)].concat(), 10).0;
        for replica in &replicas {
            let mut continued = request(prompt(6, 20), 10);
            continued.continues = Some("report".into());
            assert_eq!(served(replica.submit(continued).unwrap()), (expected.clone(), 300));
        }
    }
}

/// Many that begin with the same long text read it once; a client that goes away takes nobody with it.
#[test]
fn a_shared_beginning_is_read_once() {
    let model = models().remove(0).to_device(&gpu(), DType::BF16).unwrap();
    let engine = Engine::start(model, EngineOptions::default()).unwrap();
    let shared = prompt(1, 6000);
    let mut events: Vec<_> = (0..20)
        .map(|n| {
            let prompt = [shared.clone(), prompt(100 + n, 30)].concat();
            engine.submit(request(prompt, 40)).unwrap()
        })
        .collect();
    drop(events.swap_remove(7));
    for events in events {
        assert_eq!(served(events).0.len(), 40);
    }
    let read = engine.counters().tokens_read;
    assert!(read < 6000 + 20 * 94 + 64, "{read}");
}
