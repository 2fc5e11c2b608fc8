//! Requests that are refused, given up or interrupted.

use std::time::{Duration, Instant};

use still_model::Finish;
use still_serve::{Engine, EngineOptions, Event, Failure, Refused};

use crate::common::{end, engine, options, prompt, request, serve, served, student, wait_until};

#[test]
fn what_contradicts_the_model_is_refused() {
    let engine =
        Engine::start(student(1), EngineOptions { context: Some(100), ..options() }).unwrap();
    let refused = |prompt: Vec<u32>, most| match engine.submit(request(prompt, most)).unwrap_err() {
        Refused::Invalid(what) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(vec![], 1), "the prompt has no tokens");
    assert_eq!(refused(vec![1, 258], 1), "token id 258 is outside the vocabulary of 258");
    let what = "a prompt of 60 tokens and 41 new ones exceed the context of 100 tokens";
    assert_eq!(refused(prompt(1, 60), 41), what);
    assert!(refused(prompt(1, 60), usize::MAX).contains("exceed the context"));
    let mut named = request(prompt(1, 5), 1);
    named.save_as = Some("../x".into());
    assert!(matches!(engine.submit(named), Err(Refused::Invalid(_))));
    assert_eq!(served(engine.submit(request(prompt(1, 60), 40)).unwrap()).ids.len(), 40);
    assert!(engine.metrics().contains("still_requests_total{outcome=\"refused\"} 5"));
}

#[test]
fn too_many_are_told_to_come_back() {
    let options = EngineOptions { max_concurrent: 2, queue: 3, ..options() };
    let engine = Engine::start(student(1), options).unwrap();
    let events: Vec<_> =
        (0..5).map(|n| engine.submit(request(prompt(n, 10), 200)).unwrap()).collect();
    match engine.submit(request(prompt(9, 10), 200)).unwrap_err() {
        Refused::Busy { retry_after } => assert!(retry_after >= Duration::from_secs(1)),
        other => panic!("{other:?}"),
    }
    for events in events {
        assert_eq!(served(events).ids.len(), 200);
    }
    assert_eq!(serve(&engine, prompt(9, 10), 2).ids.len(), 2);
}

#[test]
fn a_client_that_goes_frees_its_place() {
    let options = EngineOptions { max_concurrent: 1, ..options() };
    let engine = Engine::start(student(1), options).unwrap();
    // While it is continued, while it is read, while it waits.
    let mut first = engine.submit(request(prompt(1, 10), 8000)).unwrap();
    while !matches!(first.blocking_recv(), Some(Event::Token { .. })) {}
    let second = engine.submit(request(prompt(2, 8000), 1)).unwrap();
    let third = engine.submit(request(prompt(3, 10), 5)).unwrap();
    let fourth = engine.submit(request(prompt(4, 10), 5)).unwrap();
    drop(third);
    drop(first);
    wait_until("the second is read", || engine.counters().tokens_read > 200);
    drop(second);
    assert_eq!(served(fourth).ids.len(), 5);
    wait_until("nobody is left", || engine.counters().running == 0);
    assert!(engine.counters().tokens_read < 8000);
    assert!(engine.metrics().contains("still_requests_total{outcome=\"given_up\"} 3"));
}

#[test]
fn a_request_that_takes_too_long_ends() {
    let limit = Duration::from_millis(50);
    let slow = EngineOptions { request_timeout: Some(limit), ..options() };
    let engine = Engine::start(student(1), slow).unwrap();
    let failure = end(engine.submit(request(prompt(1, 10), 8000)).unwrap()).unwrap_err();
    assert!(matches!(failure, Failure::TimedOut(of) if of == limit), "{failure}");
    let impatient = EngineOptions { queue_timeout: Some(limit), max_concurrent: 1, ..options() };
    let engine = Engine::start(student(1), impatient).unwrap();
    let mut running = engine.submit(request(prompt(1, 10), 8000)).unwrap();
    while !matches!(running.blocking_recv(), Some(Event::Token { .. })) {}
    let failure = end(engine.submit(request(prompt(2, 10), 2)).unwrap()).unwrap_err();
    assert!(matches!(failure, Failure::TimedOut(_)), "{failure}");
    assert!(matches!(running.blocking_recv(), Some(Event::Token { .. })));
}

#[test]
fn an_engine_that_ends_serves_those_that_are_there() {
    let engine = engine();
    let events: Vec<_> =
        (0..3).map(|n| engine.submit(request(prompt(n, 100), 30)).unwrap()).collect();
    engine.shutdown(Duration::from_secs(60));
    for events in events {
        assert_eq!(served(events).ids.len(), 30);
    }
    assert_eq!(engine.submit(request(prompt(1, 10), 1)).unwrap_err(), Refused::ShuttingDown);
}

#[test]
fn an_engine_without_time_ends_streams_where_they_are() {
    let options = EngineOptions { max_concurrent: 2, ..options() };
    let engine = Engine::start(student(1), options).unwrap();
    let mut events: Vec<_> =
        (0..4).map(|n| engine.submit(request(prompt(n, 20), 8000)).unwrap()).collect();
    while !matches!(events[0].blocking_recv(), Some(Event::Token { .. })) {}
    let begun = Instant::now();
    engine.shutdown(Duration::from_millis(20));
    assert!(begun.elapsed() < Duration::from_secs(20));
    for mut events in events {
        let mut last = None;
        while let Some(event) = events.blocking_recv() {
            last = Some(event);
        }
        let interrupted = matches!(last, Some(Event::Done { finish: Finish::Interrupted, .. }));
        assert!(interrupted, "{last:?}");
    }
}

#[test]
fn an_engine_that_nobody_holds_serves_those_that_are_there() {
    let engine = engine();
    let events = engine.submit(request(prompt(1, 100), 30)).unwrap();
    drop(engine);
    assert_eq!(served(events).ids.len(), 30);
}

/// A client's damage ends its own request.
#[test]
fn logits_that_are_no_numbers_are_an_error() {
    let mut model = student(1);
    let mut decoder = (*model.decoder).clone();
    let nan = candle_core::Tensor::full(f32::NAN, 32, &candle_core::Device::Cpu).unwrap();
    decoder.norm.scale = nan;
    model.decoder = decoder.into();
    let engine = Engine::start(model, options()).unwrap();
    for _ in 0..2 {
        let failure = end(engine.submit(request(prompt(1, 10), 3)).unwrap()).unwrap_err();
        assert!(failure.to_string().contains("not numbers"), "{failure}");
    }
}
