//! Calls of tools in answers, as OpenAI's clients expect them.

use serde_json::{Value, json};
use still_serve::EngineOptions;

use crate::common::{Running, serve_model, student, with_template, with_tools};

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

/// Two functions whose arguments a model without sense does not make up.
fn forced(choice: &Value) -> Value {
    let weather = json!({
        "type": "object", "required": ["city", "days"], "additionalProperties": false,
        "properties": {
            "city": { "$ref": "#/$defs/city" }, "days": { "type": "integer", "minimum": 1, "maximum": 7 },
        },
        "$defs": { "city": { "enum": ["Oslo", "Rome"] } },
    });
    json!({
        "messages": [{ "role": "user", "content": "How warm is it?" }],
        "tools": [
            { "type": "function", "function": { "name": "weather", "parameters": weather } },
            { "type": "function", "function": { "name": "time" } },
        ],
        "tool_choice": choice, "max_tokens": 2000, "temperature": 1.5,
    })
}

/// The names of an answer's calls, whose arguments are as the schemas say.
fn names(answer: &Value) -> Vec<String> {
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &Value::Null),
        "{answer}"
    );
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    calls.iter().map(|call| name(&call["function"])).collect()
}

fn name(function: &Value) -> String {
    let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
    let name = function["name"].as_str().unwrap().to_owned();
    match name.as_str() {
        "weather" => {
            assert!(["Oslo", "Rome"].contains(&arguments["city"].as_str().unwrap()));
            assert!((1..=7).contains(&arguments["days"].as_i64().unwrap()));
            assert_eq!(arguments.as_object().unwrap().len(), 2);
        }
        "time" => assert_eq!(arguments, json!({})),
        other => panic!("{other}"),
    }
    name
}

/// What the templates of the three families have, as far as it matters.
const TEMPLATES: [&str; 4] = [
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}<tool_call>",
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}{# [TOOL_CALLS] [ #}",
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}{# [TOOL_CALLS] [ARGS] #}",
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}\
     \"parameters\": dictionary of argument name and its value",
];

#[test]
fn an_answer_that_has_to_call_a_tool_does_in_every_form() {
    let time = json!({ "type": "function", "function": { "name": "time" } });
    for template in TEMPLATES {
        let model = with_template(student(4096), template);
        let server = serve_model(model, EngineOptions::default(), |_| {});
        let mut called = Vec::new();
        for seed in 0..3 {
            let mut request = forced(&json!("required"));
            request["seed"] = json!(seed);
            request["parallel_tool_calls"] = json!(seed % 2 == 0);
            let answer = server.post("/v1/chat/completions", &request).ok();
            let names = names(&answer);
            assert!(names.len() == 1 || seed % 2 == 0, "{answer}");
            called.extend(names.clone());

            if seed > 0 {
                continue;
            }
            request["stream"] = json!(true);
            let mut streamed = Vec::new();
            for event in server.post("/v1/chat/completions", &request).events() {
                let delta = &event["choices"][0]["delta"];
                assert_eq!(delta["content"].as_str().unwrap_or_default(), "");
                for call in delta["tool_calls"].as_array().into_iter().flatten() {
                    streamed.push(name(&call["function"]));
                }
            }
            assert_eq!(streamed, names, "{template}");

            request = forced(&time);
            request["seed"] = json!(seed);
            let answer = server.post("/v1/chat/completions", &request).ok();
            assert_eq!(self::names(&answer), ["time"], "{template}");
        }
        assert!(called.iter().any(|name| name == "weather"), "{template}: {called:?}");
    }
}

#[test]
fn a_choice_of_tools_that_cannot_be_kept_is_refused() {
    let server = start();
    let function = |name: &str| json!({ "type": "function", "function": { "name": name } });
    let refused = |request: &Value, parameter: &str| {
        let error = server.post("/v1/chat/completions", request).error(400);
        assert_eq!(error["param"], parameter, "{error}");
    };
    refused(&forced(&function("rain")), "tool_choice");
    for choice in [json!("any"), json!(1), json!({ "type": "function" }), json!({})] {
        refused(&forced(&choice), "tool_choice");
    }
    for (field, value) in
        [("grammar", json!("start: \"a\"")), ("response_format", json!({ "type": "json_object" }))]
    {
        let mut request = forced(&json!("required"));
        request[field] = value;
        refused(&request, "tool_choice");
    }
    let mut request = forced(&json!("required"));
    request["tools"] = json!([]);
    refused(&request, "tool_choice");
    let mut request = forced(&json!("required"));
    request["tools"][0]["function"]["parameters"] = json!({ "type": "nonsense" });
    refused(&request, "tools");

    let template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}";
    let model = with_template(student(4096), template);
    let server = serve_model(model, EngineOptions::default(), |_| {});
    let error = server.post("/v1/chat/completions", &forced(&json!("required"))).error(400);
    assert_eq!(error["param"], "tool_choice", "{error}");
}
