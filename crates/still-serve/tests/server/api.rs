//! Every endpoint, as clients use it.

use serde_json::{Value, json};

use crate::common::{NAME, serve};

#[test]
fn models_are_listed_and_others_are_not_there() {
    let server = serve();
    let list = server.get("/v1/models").ok();
    assert_eq!(list["data"][0]["id"], NAME);
    assert_eq!(list["data"][0]["max_model_len"], 4096);
    assert_eq!(server.get("/v1/models/tiny").ok()["object"], "model");
    assert_eq!(server.get("/v1/models/other").error(404)["code"], "model_not_found");
    let other = json!({ "model": "other", "prompt": "a" });
    assert_eq!(server.post("/v1/completions", &other).error(404)["code"], "model_not_found");
}

#[test]
fn a_completion_of_a_text_is_that_of_its_tokens() {
    let server = serve();
    let ask = |prompt: Value| {
        let request =
            json!({ "prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": true });
        server.post("/v1/completions", &request).ok()
    };
    let tokens = server.post("/tokenize", &json!({ "content": "Once upon" })).ok();
    assert_eq!(tokens["count"], 9);
    let text = ask(json!("Once upon"));
    assert_eq!(text["choices"][0]["text"], ask(tokens["tokens"].clone())["choices"][0]["text"]);
    assert_eq!(text["choices"][0]["finish_reason"], "length");
    assert_eq!(text["usage"]["prompt_tokens"], 9);
    assert_eq!(text["usage"]["completion_tokens"], 12);
    assert_eq!(text["usage"]["total_tokens"], 21);
    assert!(text["timings"]["state_bytes"].as_u64().unwrap() > 0);
    let info = server.get("/tokenizer_info").ok();
    assert_eq!((&info["eos_token"], &info["bos_token"]), (&json!("<|im_end|>"), &json!(null)));
    let back = server.post("/detokenize", &json!({ "tokens": tokens["tokens"] })).ok();
    assert_eq!(back["content"], "Once upon");
    // Several prompts, and several answers to each, are in order.
    let request = json!({
        "prompt": ["Once upon", "The sea"], "temperature": 0, "max_tokens": 12, "n": 2, "ignore_eos": true,
    });
    let several = server.post("/v1/completions", &request).ok();
    let texts: Vec<&Value> =
        several["choices"].as_array().unwrap().iter().map(|c| &c["text"]).collect();
    assert_eq!((texts.len(), texts[0], texts[2]), (4, texts[1], texts[3]));
    assert_eq!(texts[0], &text["choices"][0]["text"]);
    assert_ne!(texts[0], texts[2]);
    // A prompt counts once.
    assert_eq!(several["usage"]["prompt_tokens"], 9 + 7);
    assert_eq!(several["usage"]["completion_tokens"], 48);
}

#[test]
fn seeds_decide_what_is_sampled() {
    let server = serve();
    let ask = |seed: Option<u64>, n: usize| {
        let request =
            json!({ "prompt": "Once", "max_tokens": 20, "seed": seed, "n": n, "ignore_eos": true });
        server.post("/v1/completions", &request).ok()["choices"].clone()
    };
    assert_eq!(ask(Some(1), 1)[0]["text"], ask(Some(1), 1)[0]["text"]);
    assert_ne!(ask(Some(1), 1)[0]["text"], ask(Some(2), 1)[0]["text"]);
    assert_ne!(ask(None, 1)[0]["text"], ask(None, 1)[0]["text"]);
    let several = ask(Some(1), 2);
    assert_ne!(several[0]["text"], several[1]["text"]);
    assert_eq!(several[0]["text"], ask(Some(1), 1)[0]["text"]);
}

#[test]
fn an_echo_scores_a_text_as_the_evaluation_does() {
    let server = serve();
    let ids: Vec<u32> = (40..60).collect();
    let request = json!({
        "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": true,
    });
    let answer = server.post("/v1/completions", &request).ok();
    let choice = &answer["choices"][0];
    let logprobs = &choice["logprobs"];
    let list = |name: &str| logprobs[name].as_array().unwrap().clone();
    let told = list("token_logprobs");
    assert_eq!((told.len(), list("tokens").len(), list("top_logprobs").len()), (21, 21, 21));
    assert!(told[0].is_null() && list("top_logprobs")[0].is_null());
    let prompt = server.post("/detokenize", &json!({ "tokens": ids })).ok();
    let text = choice["text"].as_str().unwrap();
    assert!(text.starts_with(prompt["content"].as_str().unwrap()), "{text}");
    // By the model itself.
    let model = server.engine.model();
    let rows = model.cache_rows(still_attention::RowDtype::Bf16);
    let mut cache = model.new_cache(1, rows).unwrap();
    for (at, &id) in ids.iter().enumerate() {
        let logits = model.decode(&[id], &mut cache).unwrap();
        let Some(&next) = ids.get(at + 1) else { continue };
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let expected = f64::from(logits[next as usize]) - sum.ln();
        let got = told[at + 1].as_f64().unwrap();
        assert!((got - expected).abs() < 2e-2, "token {at}: {got} {expected}");
        let top = list("top_logprobs")[at + 1].as_object().unwrap().clone();
        assert!((2..=3).contains(&top.len()), "{top:?}");
        let most = top.values().map(|value| value.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert!(most >= got);
    }
    // Offsets are in characters, one token a byte here.
    let offsets: Vec<u64> = list("text_offset").iter().map(|at| at.as_u64().unwrap()).collect();
    assert_eq!(offsets[..20], (0..20).collect::<Vec<u64>>());
    // With no new token the prompt alone is scored.
    let request = json!({ "prompt": ids, "max_tokens": 0, "logprobs": 0, "echo": true });
    let only = server.post("/v1/completions", &request).ok();
    assert_eq!(only["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), 20);
    assert_eq!(only["usage"]["completion_tokens"], 0);
}

#[test]
fn a_chat_goes_through_the_models_template() {
    let server = serve();
    let messages =
        json!([{ "role": "system", "content": "Be short." }, { "role": "user", "content": "Hi" }]);
    let rendered = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    let tokens = server.post("/tokenize", &json!({ "messages": messages })).ok();
    let text = server.post("/detokenize", &json!({ "tokens": tokens["tokens"] })).ok();
    assert_eq!(text["content"], rendered);
    let request = json!({
        "model": NAME, "messages": messages, "temperature": 0, "max_completion_tokens": 10, "ignore_eos": true,
        "logprobs": true, "top_logprobs": 3,
    });
    let chat = server.post("/v1/chat/completions", &request).ok();
    let request = json!({
        "prompt": tokens["tokens"], "temperature": 0, "max_tokens": 10, "ignore_eos": true,
    });
    let plain = server.post("/v1/completions", &request).ok();
    let choice = &chat["choices"][0];
    assert_eq!(choice["message"]["content"], plain["choices"][0]["text"]);
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(chat["usage"]["prompt_tokens"], tokens["count"]);
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 10);
    for token in content {
        // The likeliest token is chosen.
        assert_eq!(token["token"], token["top_logprobs"][0]["token"]);
        assert_eq!(token["logprob"], token["top_logprobs"][0]["logprob"]);
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(token["bytes"].as_array().unwrap().len(), 1);
    }
    // Parts of text, and a developer where the template knows only the system.
    let parts = json!([
        { "role": "developer", "content": [{ "type": "text", "text": "Be short." }] },
        { "role": "user", "content": "Hi" },
    ]);
    assert_eq!(
        server.post("/tokenize", &json!({ "messages": parts })).ok()["tokens"],
        tokens["tokens"]
    );
}

#[test]
fn stops_and_biases_change_the_answer() {
    let server = serve();
    let ask = |more: Value| {
        let mut request =
            json!({ "prompt": "Once", "temperature": 0, "max_tokens": 24, "ignore_eos": true });
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &request).ok()["choices"][0].clone()
    };
    let whole = ask(json!({}));
    // The token of a letter that is not in it becomes the only one.
    let only = ask(json!({ "logit_bias": { "35": 100 } }));
    let letter = server.post("/detokenize", &json!({ "tokens": [35] })).ok();
    assert_eq!(only["text"], letter["content"].as_str().unwrap().repeat(24));
    let repeated = ask(json!({ "logit_bias": { "35": 100 }, "stop": [letter["content"]] }));
    assert_eq!((&repeated["text"], &repeated["finish_reason"]), (&json!(""), &json!("stop")));
    let other = ask(json!({ "repetition_penalty": 5.0, "frequency_penalty": 2.0 }));
    assert_ne!(other["text"], whole["text"]);
}

#[test]
fn health_metrics_and_the_description_are_there() {
    let server = serve();
    assert_eq!(server.get("/health").ok()["status"], "ok");
    server.post("/v1/completions", &json!({ "prompt": "Once", "max_tokens": 3 })).ok();
    let metrics = server.get("/metrics");
    assert_eq!(metrics.status, 200);
    assert!(metrics.text.lines().any(|line| line.starts_with("# TYPE")), "{}", metrics.text);
    let description = server.get("/openapi.json").ok();
    assert!(description["paths"]["/v1/chat/completions"]["post"].is_object());
    let fields = &description["components"]["schemas"];
    assert!(fields["ChatRequest"].to_string().contains("Common"), "{}", fields["ChatRequest"]);
    let page = server.get("/");
    assert!(page.header("content-type").unwrap().starts_with("text/html"));
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.contains("default-src 'none'"), "{policy}");
    for outside in ["http://", "https://", "src=", "@import"] {
        assert!(!page.text.contains(outside), "the page has {outside}");
    }
}
