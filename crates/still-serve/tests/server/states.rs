//! Named states: saved, gone on from, forked, deleted.

use serde_json::json;

use crate::common::serve;

#[test]
fn a_state_is_saved_forked_and_gone_on_from() {
    let server = serve();
    let document = "A long document. ".repeat(20);
    let kept =
        server.post("/v1/states/report", &json!({ "action": "save", "prompt": document })).ok();
    assert_eq!((&kept["name"], &kept["tokens"]), (&json!("report"), &json!(document.len())));
    assert!(kept["bytes"].as_u64().unwrap() > 0);
    assert_eq!(server.get("/v1/states/report").ok()["tokens"], kept["tokens"]);
    let fork = json!({ "action": "fork", "from": "report" });
    assert_eq!(server.post("/v1/states/copy", &fork).ok()["tokens"], kept["tokens"]);
    let list = server.get("/v1/states").ok();
    let names: Vec<&str> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|state| state["name"].as_str().unwrap())
        .collect();
    assert!(names.contains(&"report") && names.contains(&"copy"), "{names:?}");
    // What goes on from it is what goes on from the text.
    let ask = |more: serde_json::Value| {
        let mut request = json!({ "temperature": 0, "max_tokens": 10, "ignore_eos": true });
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &request).ok()
    };
    let onto = ask(json!({ "prompt": "Summary:", "state": "copy" }));
    let whole = ask(json!({ "prompt": document.clone() + "Summary:" }));
    assert_eq!(onto["choices"][0]["text"], whole["choices"][0]["text"]);
    assert!(onto["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 256);
    assert_eq!(server.delete("/v1/states/copy").status, 204);
    assert_eq!(server.get("/v1/states/copy").error(404)["code"], "state_not_found");
    assert_eq!(server.delete("/v1/states/copy").status, 404);
    server.get("/v1/states/report").ok();
}
