//! Calls of tools in answers, as OpenAI's clients expect them.

use serde_json::{Value, json};
use still_serve::EngineOptions;

use crate::common::{Running, serve_model, student, with_tools};

fn start() -> Running {
    serve_model(with_tools(student(4096)), EngineOptions::default(), |_| {})
}

fn request(grammar: &str) -> Value {
    let tool = json!({ "type": "function", "function": { "name": "weather", "parameters": { "type": "object" } } });
    json!({
        "messages": [{ "role": "user", "content": "How warm is it?" }], "tools": [tool], "grammar": grammar,
        "max_tokens": 300, "temperature": 1.5, "seed": 3,
    })
}

/// Two calls after some text, whatever the model would say.
const CALLS: &str = r#"start: "Let me see.\n" call "\n" call
call: "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"" /[a-z]{3}/ "\"}}\n</tool_call>""#;

fn city(call: &Value) -> String {
    assert_eq!(
        (&call["type"], &call["function"]["name"]),
        (&json!("function"), &json!("weather")),
        "{call}"
    );
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")), "{call}");
    let arguments = call["function"]["arguments"].as_str().unwrap();
    let arguments: Value = serde_json::from_str(arguments).unwrap();
    arguments["city"].as_str().unwrap().to_owned()
}

#[test]
fn calls_are_told_apart_from_text() {
    let server = start();
    let answer = server.post("/v1/chat/completions", &request(CALLS)).ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    assert_eq!(choice["message"]["content"], "Let me see.");
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    let cities: Vec<String> = calls.iter().map(city).collect();
    assert_eq!(cities.iter().map(String::len).collect::<Vec<_>>(), [3, 3]);
    assert_ne!(calls[0]["id"], calls[1]["id"]);

    // A stream says the same, and never a part of a call as text.
    let mut streamed = request(CALLS);
    streamed["stream"] = json!(true);
    let (mut text, mut told, mut reason) = (String::new(), Vec::new(), Value::Null);
    for event in server.post("/v1/chat/completions", &streamed).events() {
        let choice = &event["choices"][0];
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            assert_eq!(call["index"], json!(told.len()));
            told.push(city(call));
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    assert_eq!((text.as_str(), told), ("Let me see.", cities));
    assert_eq!(reason, "tool_calls");

    // The conversation goes on with them.
    let mut next = request("start: \"Warm.\"");
    let messages = next["messages"].as_array_mut().unwrap();
    messages.push(choice["message"].clone());
    messages.push(json!({ "role": "tool", "tool_call_id": calls[0]["id"], "content": "20" }));
    let answer = server.post("/v1/chat/completions", &next).ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({ "role": "assistant", "content": "Warm." }));
    assert_eq!(choice["finish_reason"], "stop");
}

#[test]
fn what_is_no_call_stays_text() {
    let server = start();
    for text in
        ["<tool_call>{\"name\": \"rain\", \"arguments\": {}}</tool_call>", "<tool_call>{\"na"]
    {
        let grammar = format!("start: {}", json!(text));
        let answer = server.post("/v1/chat/completions", &request(&grammar)).ok();
        assert_eq!(
            answer["choices"][0]["message"],
            json!({ "role": "assistant", "content": text })
        );
        // Without tools nobody looks for calls.
        let mut without = request(CALLS);
        without.as_object_mut().unwrap().remove("tools");
        let answer = server.post("/v1/chat/completions", &without).ok();
        let content = answer["choices"][0]["message"]["content"].as_str().unwrap();
        assert!(content.contains("<tool_call>\n{\"name\": \"weather\""), "{content}");
    }
}
