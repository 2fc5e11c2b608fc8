//! Which tokens of a conversation heads keep.

use std::collections::HashSet;

use serde_json::{Value, json};
use still_serve::EngineOptions;

use crate::common::{serve, serve_model, student};

#[test]
fn positions_that_heads_keep_are_told_with_their_tokens() {
    let server = serve();
    let text = "The captain kept a map of the old harbour. ".repeat(10);
    let kept = server.post("/v1/kept", &json!({ "prompt": text })).ok();
    // A token a byte.
    let tokens: Vec<&str> =
        kept["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(tokens.concat(), text);
    // 430 tokens are six whole chunks and a part of one: the window is the last whole one and that part.
    assert_eq!(kept["window_from"], json!(320));
    let model = student(4096);
    let layers = kept["layers"].as_array().unwrap();
    assert_eq!(layers.len(), model.config().num_hidden_layers);
    for (n, layer) in layers.iter().enumerate() {
        assert_eq!(layer["layer"], json!(n));
        let heads = layer["heads"].as_array().unwrap();
        assert_eq!(heads.len(), model.config().num_key_value_heads);
        for head in heads {
            let positions: Vec<u64> = head
                .as_array()
                .unwrap()
                .iter()
                .map(|position| position.as_u64().unwrap())
                .collect();
            // 4 of each of the five chunks before the window.
            assert!(positions.is_sorted() && positions.len() == 5 * 4, "{positions:?}");
            let chunks: HashSet<u64> = positions.iter().map(|position| position / 64).collect();
            assert_eq!(chunks, (0..5).collect());
        }
    }
    // A conversation is looked at as its template writes it.
    let messages = json!([{ "role": "user", "content": "Hi" }]);
    let kept = server.post("/v1/kept", &json!({ "messages": messages })).ok();
    let tokens = kept["tokens"].as_array().unwrap();
    let text: String = tokens.iter().map(|token| token.as_str().unwrap()).collect();
    assert!(text.starts_with("<|im_start|>user\nHi<|im_end|>"), "{text}");
    assert!(kept["layers"][0]["heads"][0].as_array().unwrap().is_empty(), "{kept}");
}

#[test]
fn what_cannot_be_looked_at_is_an_error() {
    let server = serve();
    let refused = |body: Value| server.post("/v1/kept", &body).error(400);
    refused(json!({}));
    refused(json!({ "prompt": "a", "tokens": [1] }));
    refused(json!({ "prompt": "" }));
    assert_eq!(refused(json!({ "tokens": [1_000_000] }))["param"], "tokens");
    let long = refused(json!({ "prompt": "a".repeat(4097) }));
    assert_eq!(long["code"], "context_length_exceeded");
    // A model that is no student keeps all there is.
    let mut teacher = student(4096);
    teacher.student = None;
    let dense = serve_model(teacher, EngineOptions::default(), |_| {});
    assert!(
        dense.post("/v1/kept", &json!({ "prompt": "a" })).error(400)["message"]
            .as_str()
            .unwrap()
            .contains("no student")
    );
}
