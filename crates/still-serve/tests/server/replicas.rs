//! Two servers that share a store: a conversation goes back and forth, and nothing is read twice.

use serde_json::{Value, json};
use still_serve::{EngineOptions, StateStore};

use crate::common::{Running, serve, serve_with};

const CHUNK: u64 = 64;

fn replica(dir: &std::path::Path) -> Running {
    let store = StateStore::open(dir.to_str().unwrap()).unwrap();
    serve_with(EngineOptions { state_store: Some(store), ..EngineOptions::default() }, |_| {})
}

fn turn(server: &Running, messages: &[Value]) -> (String, u64, u64) {
    let request =
        json!({ "messages": messages, "temperature": 0, "max_tokens": 40, "ignore_eos": true });
    let answer = server.post("/v1/chat/completions", &request).ok();
    let number = |pointer: &str| answer.pointer(pointer).unwrap().as_u64().unwrap();
    let cached = number("/usage/prompt_tokens_details/cached_tokens");
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    (text, number("/usage/prompt_tokens"), cached)
}

#[test]
fn a_conversation_alternates_between_replicas_and_reads_nothing_again() {
    let dir = tempfile::tempdir().unwrap();
    let replicas = [replica(dir.path()), replica(dir.path())];
    let alone = serve();
    let mut messages =
        vec![json!({ "role": "system", "content": "Tell stories of the sea. ".repeat(12) })];
    let mut before = 0;
    for number in 0..6 {
        messages.push(json!({ "role": "user", "content": format!("Part {number}, please. It may be a long one.") }));
        let (text, prompt, cached) = turn(&replicas[number % 2], &messages);
        assert_eq!(text, turn(&alone, &messages).0, "turn {number}");
        if number > 0 {
            // The prompt of the turn before was read elsewhere, up to its last whole chunk.
            assert!(
                cached + CHUNK > before,
                "turn {number}: {cached} of {before} tokens were spared"
            );
        }
        before = prompt;
        messages.push(json!({ "role": "assistant", "content": text.replace(char::REPLACEMENT_CHARACTER, "?") }));
    }
}
