//! Prompts that begin as earlier ones did read the rest.

use std::time::Duration;

use still_serve::{Engine, EngineOptions};

use crate::common::{Served, engine, options, prompt, request, serve, served, student};

fn cold(tokens: &[u32], most: usize) -> Vec<u32> {
    serve(&engine(), tokens.to_vec(), most).ids
}

/// Which tokens come does not depend on whether a state was found. (Where a state was computed by decode steps it may, by rounding.)
fn assert_as_cold(got: &Served, tokens: &[u32]) {
    assert_eq!(got.ids, cold(tokens, got.ids.len()));
}

#[test]
fn a_second_turn_reads_what_is_new() {
    let engine = engine();
    let first = serve(&engine, prompt(1, 1000), 30);
    assert_eq!(first.cached, 0);
    let second = [prompt(1, 1000), first.ids.clone(), prompt(2, 50)].concat();
    let read = engine.counters().tokens_read;
    let got = serve(&engine, second.clone(), 10);
    // All but the last token of the answer, which no step was fed.
    assert_eq!(got.cached, 1000 + 29);
    assert_eq!(got.usage.cached_tokens, got.cached);
    assert_eq!(engine.counters().tokens_read - read, 51);
    assert_eq!(engine.counters().tokens_spared, 1029);
}

#[test]
fn an_answer_that_is_generated_again_reads_less_than_a_chunk() {
    let engine = engine();
    for tokens in [64, 65, 127, 1000] {
        let first = serve(&engine, prompt(tokens, tokens as usize), 20);
        let again = serve(&engine, prompt(tokens, tokens as usize), 20);
        assert_eq!(again.ids, first.ids);
        let unread = tokens as usize - again.cached;
        assert!((1..=64).contains(&unread), "{unread} of {tokens} tokens were read again");
    }
}

/// A template may leave an answer out, or write it in another way.
#[test]
fn a_prompt_that_was_edited_goes_on_from_before() {
    let engine = engine();
    serve(&engine, prompt(1, 3000), 20);
    let mut edited = prompt(1, 3000);
    edited[2500] += 1;
    edited.truncate(2700);
    let got = serve(&engine, edited.clone(), 10);
    assert_eq!(got.cached, 2048);
    assert_as_cold(&got, &edited);
    let dropped = [prompt(1, 3000), prompt(4, 100)].concat();
    let got = serve(&engine, dropped.clone(), 10);
    assert_eq!(got.cached, 2944);
    assert_as_cold(&got, &dropped);
}

/// Where conversations part is known once two of them have.
#[test]
fn a_system_prompt_is_read_twice_at_most() {
    let engine = engine();
    let system = prompt(1, 400);
    let ask = |n: u64| [system.clone(), prompt(100 + n, 90)].concat();
    let cached: Vec<usize> = (0..4).map(|n| serve(&engine, ask(n), 4).cached).collect();
    assert_eq!(cached, [0, 0, 384, 384]);
    assert_as_cold(&serve(&engine, ask(9), 12), &ask(9));
}

#[test]
fn clients_that_come_at_once_read_what_they_share_once() {
    let engine = engine();
    let shared = prompt(1, 1500);
    let ask = |n: u64| [shared.clone(), prompt(100 + n, 70)].concat();
    let events: Vec<_> = (0..20).map(|n| engine.submit(request(ask(n), 8)).unwrap()).collect();
    let all: Vec<Served> = events.into_iter().map(served).collect();
    assert_eq!(all[0].cached, 0);
    // Shared whole chunks.
    assert!(all[1..].iter().all(|one| one.cached == 1472));
    let counters = engine.counters();
    assert_eq!(counters.tokens_read, 1570 + 19 * (1570 - 1472));
    assert_eq!(counters.tokens_spared, 19 * 1472);
    for (n, one) in all.iter().enumerate().step_by(6) {
        assert_as_cold(one, &ask(n as u64));
    }
}

/// Who waited for it reads on.
#[test]
fn a_client_that_goes_while_others_wait_for_its_reading_stops_none() {
    let engine = engine();
    let shared = prompt(1, 3000);
    let ask = |n: u64| [shared.clone(), prompt(100 + n, 70)].concat();
    let first = engine.submit(request(ask(0), 8)).unwrap();
    let others: Vec<_> = (1..5).map(|n| engine.submit(request(ask(n), 8)).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(5));
    drop(first);
    for (n, events) in others.into_iter().enumerate() {
        assert_as_cold(&served(events), &ask(n as u64 + 1));
    }
}

#[test]
fn memory_stays_within_its_bound() {
    let bytes = {
        let engine = engine();
        serve(&engine, prompt(1, 300), 2);
        engine.counters().state_bytes / engine.counters().states
    };
    let limit = bytes as usize * 5;
    let engine =
        Engine::start(student(1), EngineOptions { state_memory: limit, ..options() }).unwrap();
    for n in 0..12 {
        serve(&engine, prompt(n, 300), 2);
        // Of a sequence the client is told before the numbers are.
        let counters = engine.counters();
        assert!(counters.state_bytes as usize <= limit, "{counters:?}");
    }
    assert!(engine.counters().states >= 2);
    // The last ones are there, the first are not.
    assert_eq!(serve(&engine, prompt(11, 300), 2).cached, 256);
    assert_eq!(serve(&engine, prompt(0, 300), 2).cached, 0);
    let nothing =
        Engine::start(student(1), EngineOptions { state_memory: 0, ..options() }).unwrap();
    serve(&nothing, prompt(1, 300), 2);
    assert_eq!(serve(&nothing, prompt(1, 300), 2).cached, 0);
    assert_eq!(nothing.counters().states, 0);
}

/// States that decode steps have computed differ from read ones by rounding.
#[test]
fn a_deterministic_engine_continues_from_what_was_read_alone() {
    let options = EngineOptions { deterministic: true, ..options() };
    let engine = Engine::start(student(1), options.clone()).unwrap();
    let mut tokens = prompt(1, 500);
    for turn in 0..4 {
        let got = serve(&engine, tokens.clone(), 40);
        let fresh = Engine::start(student(1), options.clone()).unwrap();
        assert_eq!(got.ids, serve(&fresh, tokens.clone(), 40).ids, "turn {turn}");
        assert!(turn == 0 || got.cached >= 448, "{}", got.cached);
        tokens = [tokens, got.ids, prompt(50 + turn, 30)].concat();
    }
}
