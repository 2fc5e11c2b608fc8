//! Answers that follow a schema or a grammar.

use serde_json::{Value, json};

use crate::common::{Running, serve};

fn chat(server: &Running, more: Value) -> crate::common::Answer {
    let mut request = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 400, "temperature": 1.5,
    });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    server.post("/v1/chat/completions", &request)
}

fn content(answer: &Value) -> String {
    answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

#[test]
fn a_schema_is_followed_whatever_the_model_would_say() {
    let server = serve();
    let schema = json!({
        "type": "object",
        "properties": {
            "color": { "enum": ["red", "green"] },
            "count": { "type": "integer", "minimum": 0, "maximum": 99 },
            "names": { "type": "array", "items": { "type": "string", "maxLength": 5 }, "maxItems": 3 },
        },
        "required": ["color", "count", "names"],
        "additionalProperties": false,
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "strict": true, "schema": schema } });
    for seed in 0..8 {
        let answer = chat(&server, json!({ "response_format": format, "seed": seed })).ok();
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        let object: Value = serde_json::from_str(&content(&answer)).unwrap();
        assert!(["red", "green"].contains(&object["color"].as_str().unwrap()));
        assert!((0..=99).contains(&object["count"].as_i64().unwrap()));
        let names = object["names"].as_array().unwrap();
        assert!(names.len() <= 3);
        assert!(names.iter().all(|name| name.as_str().unwrap().chars().count() <= 5), "{names:?}");
    }
    // Several at once follow it each by itself.
    let answer = chat(&server, json!({ "response_format": format, "seed": 1, "n": 3 })).ok();
    for choice in answer["choices"].as_array().unwrap() {
        serde_json::from_str::<Value>(choice["message"]["content"].as_str().unwrap()).unwrap();
    }
}

#[test]
fn a_grammar_is_followed() {
    let server = serve();
    let grammar = "start: \"yes\" | \"no\" | NUMBER\nNUMBER: /[0-9]{1,4}/";
    for seed in 0..6 {
        let text = content(&chat(&server, json!({ "grammar": grammar, "seed": seed })).ok());
        let number =
            !text.is_empty() && text.len() <= 4 && text.bytes().all(|b| b.is_ascii_digit());
        assert!(text == "yes" || text == "no" || number, "{text:?}");
    }
    let request =
        json!({ "prompt": "Answer:", "grammar": grammar, "max_tokens": 9, "temperature": 0 });
    let text = server.post("/v1/completions", &request).ok()["choices"][0]["text"].clone();
    assert!(!text.as_str().unwrap().is_empty());
}

#[test]
fn what_cannot_be_followed_is_refused() {
    let server = serve();
    let schema = |schema: Value| json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } } });
    let deep = format!("start: {}\"a\"{}", "(".repeat(50_000), ")".repeat(50_000));
    // Each rule leads to the next.
    let chain = |name: &str| {
        let rules = (0..4000).map(|at| format!("{name}{at}: {name}{}\n", at + 1));
        format!("start: {name}0\n{}{name}4000: \"a\"", rules.collect::<String>())
    };
    let references = |most: usize| {
        let mut definitions = serde_json::Map::new();
        for at in 0..most {
            let next = format!("#/$defs/a{}", at + 1);
            definitions.insert(format!("a{at}"), json!({ "$ref": next }));
        }
        definitions.insert(format!("a{most}"), json!({ "type": "null" }));
        json!({ "$ref": "#/$defs/a0", "$defs": definitions })
    };
    for (more, param) in [
        (json!({ "response_format": { "type": "xml" } }), "response_format"),
        (json!({ "response_format": "json" }), "response_format"),
        (json!({ "response_format": { "type": "json_schema" } }), "response_format"),
        (schema(json!("no schema")), "response_format"),
        (schema(json!({ "type": "no-such-type" })), "response_format"),
        (
            schema(json!({ "type": "object", "properties": { "a": false }, "required": ["a"] })),
            "response_format",
        ),
        (schema(json!({ "$ref": "http://evil.example/x.json" })), "response_format"),
        (schema(json!({ "type": "string", "pattern": "(" })), "response_format"),
        (json!({ "grammar": "" }), "grammar"),
        (json!({ "grammar": "start: (" }), "grammar"),
        (json!({ "grammar": "start: missing" }), "grammar"),
        (json!({ "grammar": deep }), "grammar"),
        (json!({ "grammar": "x".repeat(300_000) }), "grammar"),
        (json!({ "grammar": chain("r") }), "grammar"),
        (json!({ "grammar": chain("R") }), "grammar"),
        (schema(references(5000)), "response_format"),
        (
            json!({ "grammar": "start: \"a\"", "response_format": { "type": "json_object" } }),
            "grammar",
        ),
    ] {
        assert_eq!(chat(&server, more.clone()).error(400)["param"], param, "{more}");
    }
    // As many as there may be are followed.
    let null = chat(&server, schema(references(900))).ok();
    assert_eq!(content(&null), "null");
    // The server goes on.
    chat(&server, json!({})).ok();
}

/// The library that follows schemas would call itself until the stack ends, and the process with it.
#[test]
fn numbers_below_64_bits_are_refused() {
    let server = serve();
    let of = |schema: &Value| json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
    for schema in [
        json!({ "enum": [i64::MIN] }),
        json!({ "type": "object", "properties": { "a": { "const": [{ "b": -1e300 }] } } }),
        json!({ "type": "integer", "minimum": -1e19, "maximum": -1e19 }),
        json!({ "allOf": [{ "type": "integer", "maximum": -1e30 }, { "minimum": -1e30 }] }),
    ] {
        let error = chat(&server, json!({ "response_format": of(&schema) })).error(400);
        assert!(error["message"].as_str().unwrap().contains("has the number"), "{error}");
        let grammar = format!("start: \"x\" %json {schema}");
        chat(&server, json!({ "grammar": grammar })).error(400);
    }
    let least = json!({ "const": -9_223_372_036_854_774_784_i64 });
    let answer = chat(&server, json!({ "response_format": of(&least) })).ok();
    assert_eq!(content(&answer), "-9223372036854774784");
}
