//! The end of a server while it answers.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use still_serve::EngineOptions;

use crate::common::{Running, serve_with};

/// Starts a stream and reads its first piece.
fn begin(server: &Running, tokens: usize) -> BufReader<TcpStream> {
    let body =
        json!({ "prompt": "Once", "max_tokens": tokens, "ignore_eos": true, "stream": true })
            .to_string();
    let mut client = TcpStream::connect(server.address).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    write!(
        client,
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut reader = BufReader::new(client);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "no piece came");
    }
    reader
}

/// The rest of a stream: its events, and whether it was ended as HTTP has it.
fn rest(reader: BufReader<TcpStream>) -> (Vec<String>, bool) {
    let lines: Vec<String> = reader.lines().map_while(Result::ok).collect();
    let events = lines.iter().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned);
    let ended = lines.iter().rev().find(|line| !line.is_empty()).is_some_and(|line| line == "0");
    (events.collect(), ended)
}

#[test]
fn an_answer_that_ends_in_time_is_whole() {
    let mut server =
        serve_with(EngineOptions::default(), |options| options.grace = Duration::from_secs(60));
    let stream = begin(&server, 100);
    server.stop();
    let (events, ended) = rest(stream);
    assert!(ended && events.last().is_some_and(|event| event == "[DONE]"), "{events:?}");
    let finished = events.iter().any(|event| event.contains("\"finish_reason\":\"length\""));
    assert!(finished, "{events:?}");
    server.join();
}

#[test]
fn an_answer_that_does_not_is_ended_with_an_error() {
    let mut server =
        serve_with(EngineOptions::default(), |options| options.grace = Duration::from_millis(100));
    let stream = begin(&server, 4000);
    let begun = Instant::now();
    server.stop();
    let (events, ended) = rest(stream);
    assert!(ended && events.last().is_some_and(|event| event == "[DONE]"), "{events:?}");
    let error: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(error["error"]["code"], "shutting_down");
    server.join();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert!(TcpStream::connect(server.address).is_err(), "it still listens");
}
