//! Changed request bodies, sent to a server: each is answered with a status, in OpenAI's shape if it is an error, never with a
//! panic, and the server goes on. The last body lies in
//! `fuzz_bodies.last` of cargo's temporary directory.
//!
//! ```text
//! cargo test --release -p still-serve --test fuzz_bodies                           # what CI runs: some seconds
//! cargo test --release -p still-serve --test fuzz_bodies -- --minutes 10 --seed 1  # long
//! ```

#[path = "../server/common/mod.rs"]
#[allow(dead_code, reason = "each test executable uses a part")]
mod common;
#[path = "../../../still-cli/tests/fuzz/json.rs"]
mod json;
mod options;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use still_serve::EngineOptions;

use common::{Answer, Running, answer, serve_model, student, with_tools};

/// How long a plain `cargo test` takes.
const USUAL_TIME: Duration = Duration::from_secs(8);

fn bodies() -> Vec<(&'static str, serde_json::Value)> {
    let common = json!({
        "model": "tiny", "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "presence_penalty": 0.1,
        "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": { "35": 3 }, "seed": 1, "stop": ["x", "yy"], "n": 2,
        "max_tokens": 6, "stream": false, "stream_options": { "include_usage": true }, "ignore_eos": true,
    });
    let with = |more: serde_json::Value| {
        let mut body = common.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let schema = json!({
        "type": "object", "required": ["a"], "additionalProperties": false,
        "properties": {
            "a": { "type": "array", "items": { "anyOf": [{ "type": "integer", "minimum": 1 }, { "type": "null" }] }, "maxItems": 3 },
            "b": { "type": "string", "pattern": "^[a-z]{2,5}$" },
            "c": { "$ref": "#/$defs/c" },
        },
        "$defs": { "c": { "enum": ["x", 1, null] } },
    });
    let tool = json!({ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } });
    let described =
        json!({ "type": "function", "function": { "name": "g", "parameters": schema } });
    vec![
        ("/v1/completions", with(json!({ "prompt": "Once", "echo": true, "logprobs": 2 }))),
        (
            "/v1/completions",
            with(json!({ "prompt": [[1, 2, 3], [4]], "echo": false, "save_state": null })),
        ),
        (
            "/v1/completions",
            with(
                json!({ "prompt": ["a", "b"], "grammar": "start: /[ab]+/ | x\nx: \"y\"{1,3} \"z\"?" }),
            ),
        ),
        (
            "/v1/chat/completions",
            with(json!({
                "messages": [
                    { "role": "system", "content": "Be short." },
                    { "role": "user", "content": [{ "type": "text", "text": "Hi" }] },
                    { "role": "assistant", "content": null, "tool_calls": [
                        { "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } },
                    ] },
                    { "role": "tool", "tool_call_id": "1", "content": "2" },
                ],
                "logprobs": true, "top_logprobs": 2, "tool_choice": "auto", "chat_template_kwargs": { "a": 1 },
            })),
        ),
        (
            "/v1/chat/completions",
            with(json!({
                "messages": [{ "role": "user", "content": "Hi" }], "tools": [tool], "tool_choice": "none", "n": 1,
                "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } },
            })),
        ),
        (
            "/v1/chat/completions",
            with(json!({
                "messages": [{ "role": "user", "content": "Hi" }], "tools": [tool], "n": 1, "max_tokens": 60, "stream": true,
                "grammar": "start: /x?/ \"<tool_call>{\\\"name\\\": \\\"f\\\", \\\"arguments\\\": {\" /[a-z\":1]{0,6}/ \"}}</tool_call>\"",
            })),
        ),
        (
            "/v1/chat/completions",
            with(json!({
                "messages": [{ "role": "user", "content": "Hi" }], "tools": [described, tool], "n": 1, "max_tokens": 60,
                "tool_choice": { "type": "function", "function": { "name": "g" } }, "parallel_tool_calls": false,
            })),
        ),
        (
            "/v1/chat/completions",
            with(json!({
                "messages": [{ "role": "user", "content": "Hi" }], "tools": [described], "n": 1, "max_tokens": 60,
                "tool_choice": "required",
            })),
        ),
        ("/tokenize", json!({ "content": "a b", "add_special": true, "with_pieces": true })),
        ("/tokenize", json!({ "messages": [{ "role": "user", "content": "Hi" }] })),
        ("/v1/kept", json!({ "messages": [{ "role": "user", "content": "Hi" }] })),
        ("/v1/kept", json!({ "tokens": [1, 2, 257] })),
        ("/detokenize", json!({ "tokens": [1, 2, 257] })),
        ("/v1/states/name", json!({ "action": "save", "prompt": "a b c" })),
        ("/v1/states/other", json!({ "action": "fork", "from": "name" })),
        ("/v1/states/name", json!({ "action": "restore" })),
    ]
}

fn start() -> Running {
    let options = EngineOptions {
        context: Some(512),
        request_timeout: Some(Duration::from_secs(60)),
        ..EngineOptions::default()
    };
    serve_model(with_tools(student(4096)), options, |_| {})
}

fn send(server: &Running, path: &str, body: &[u8]) -> Answer {
    let request = ureq::post(&server.url(path)).set("content-type", "application/json");
    answer(request.timeout(Duration::from_secs(120)).send_bytes(body))
}

fn main() {
    if std::env::args().any(|word| word == "--list") {
        return;
    }
    let (time, seed) = options::options(USUAL_TIME);
    let bodies = bodies();
    let server = start();
    let last = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz_bodies.last");
    let begun = Instant::now();
    let mut statuses = BTreeMap::new();
    let mut cases = 0;
    while begun.elapsed() < time {
        let mut rng = ChaCha8Rng::seed_from_u64(seed + cases);
        let (path, body) = &bodies[rng.random_range(0..bodies.len())];
        let mut body = body.clone();
        for _ in 0..1 + usize::from(rng.random_ratio(1, 4)) {
            json::mutate(&mut body, &mut rng);
        }
        let mut bytes = body.to_string().into_bytes();
        // Some are no JSON any more.
        if rng.random_ratio(1, 4) {
            for _ in 0..rng.random_range(1..8) {
                let at = rng.random_range(0..bytes.len());
                match rng.random_range(0..3) {
                    0 => bytes[at] = rng.random(),
                    1 => bytes.truncate(at.max(1)),
                    _ => bytes.insert(at, rng.random()),
                }
            }
        }
        // A stack that overflows ends this process too.
        std::fs::write(&last, [path.as_bytes(), b"\n", &bytes].concat()).unwrap();
        let told = send(&server, path, &bytes);
        let shown: String = String::from_utf8_lossy(&bytes).chars().take(2000).collect();
        assert!(told.status < 500, "case {cases} of seed {seed}: {path} {shown}\n{}", told.text);
        match told.status {
            200 | 204 => {}
            status => drop(told.error(status)),
        }
        *statuses.entry(told.status).or_insert(0_u64) += 1;
        cases += 1;
    }
    let well = send(
        &server,
        "/v1/completions",
        json!({ "prompt": "a", "max_tokens": 2 }).to_string().as_bytes(),
    );
    assert_eq!(well.status, 200, "{}", well.text);
    println!(
        "fuzz_bodies: {cases} bodies in {:.0} s, by status {statuses:?}",
        begun.elapsed().as_secs_f64()
    );
    assert!(statuses.get(&200).is_some_and(|well| *well > 0), "no body was taken");
}
