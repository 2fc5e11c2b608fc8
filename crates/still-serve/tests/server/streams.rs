//! A stream's pieces make the answer that is given whole.

use serde_json::{Value, json};

use crate::common::serve;

fn with(request: &Value, more: Value) -> Value {
    let mut request = request.clone();
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

/// The texts of all answers, put together from the pieces.
fn texts(events: &[Value], piece: &str, answers: usize) -> Vec<String> {
    let mut texts = vec![String::new(); answers];
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index] += choice.pointer(piece).and_then(Value::as_str).unwrap_or_default();
    }
    texts
}

fn ends(events: &[Value]) -> Vec<&str> {
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    choices.filter_map(|choice| choice["finish_reason"].as_str()).collect()
}

#[test]
fn completions() {
    let server = serve();
    // Random bytes, most of which are no characters by themselves.
    for (seed, echo) in [(1, false), (2, true), (3, false)] {
        let request = json!({
            "prompt": ["Once", "é"], "n": 2, "max_tokens": 60, "seed": seed, "echo": echo, "logprobs": 1,
            "stop": ["e"],
        });
        let whole = server.post("/v1/completions", &request).ok();
        let request =
            with(&request, json!({ "stream": true, "stream_options": { "include_usage": true } }));
        let events = server.post("/v1/completions", &request).events();
        let expected: Vec<&str> =
            (0..4).map(|at| whole["choices"][at]["text"].as_str().unwrap()).collect();
        assert_eq!(texts(&events, "/text", 4), expected);
        assert_eq!(ends(&events).len(), 4);
        let (usage, events) = events.split_last().unwrap();
        assert_eq!(usage["choices"], json!([]));
        for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(usage["usage"][key], whole["usage"][key]);
        }
        // Token by token.
        for at in 0..4 {
            let mut logprobs: Vec<Value> = Vec::new();
            for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
                if choice["index"] == at && choice["logprobs"].is_object() {
                    logprobs
                        .extend(choice["logprobs"]["token_logprobs"].as_array().unwrap().clone());
                }
            }
            let expected = whole["choices"][at]["logprobs"]["token_logprobs"].as_array().unwrap();
            assert_eq!(&logprobs, expected);
            assert!(
                events.iter().all(|event| event["usage"].is_null() && event.get("usage").is_some())
            );
        }
    }
}

#[test]
fn chats() {
    let server = serve();
    for seed in [4, 5] {
        let request = json!({
            "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 60, "seed": seed, "n": 3,
        });
        let whole = server.post("/v1/chat/completions", &request).ok();
        let request = with(&request, json!({ "stream": true }));
        let answer = server.post("/v1/chat/completions", &request);
        assert!(answer.header("content-type").unwrap().starts_with("text/event-stream"));
        let events = answer.events();
        let expected: Vec<&str> =
            (0..3).map(|at| whole["choices"][at]["message"]["content"].as_str().unwrap()).collect();
        assert_eq!(texts(&events, "/delta/content", 3), expected);
        let roles =
            events.iter().filter(|event| event["choices"][0]["delta"]["role"] == "assistant");
        assert_eq!(roles.count(), 3);
        assert_eq!(ends(&events).len(), 3);
        assert!(events.iter().all(|event| event.get("usage").is_none()));
        let id = events[0]["id"].as_str().unwrap();
        assert!(id.starts_with("chatcmpl-") && events.iter().all(|event| event["id"] == id));
    }
}

/// Many streams at once are what each is alone.
#[test]
fn streams_do_not_mix() {
    let server = serve();
    let request = |at: usize| {
        json!({
            "prompt": format!("Story {at}: ").repeat(1 + at % 5), "max_tokens": 40, "temperature": 0, "stream": true,
            "ignore_eos": true,
        })
    };
    let alone: Vec<String> = (0..12)
        .map(|at| {
            texts(&server.post("/v1/completions", &request(at)).events(), "/text", 1).remove(0)
        })
        .collect();
    let fresh = serve();
    std::thread::scope(|scope| {
        for (at, alone) in alone.iter().enumerate() {
            let (fresh, request) = (&fresh, request(at));
            scope.spawn(move || {
                let events = fresh.post("/v1/completions", &request).events();
                assert_eq!(&texts(&events, "/text", 1)[0], alone, "stream {at}");
            });
        }
    });
}
