//! Templates of the families' kinds over conversations of many kinds give the texts of transformers' `apply_chat_template`
//! (`data/chat/make.py` wrote them), and what it refuses is refused.

use std::path::Path;

use serde_json::{Map, Value, json};
use still_model::random::{random_model, tiny_config};
use still_model::{ChatTemplate, Context, Message, ModelError, Tokenizer};

fn tokenizer(config: Value) -> Tokenizer {
    let made = random_model(tiny_config(), 0).unwrap().tokenizer;
    let (json, _) = made.to_json().unwrap();
    Tokenizer::from_json(json.as_bytes(), config, Path::new("dir/tokenizer.json")).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    let config = json!({
        "chat_template": source,
        "bos_token": "<s>",
        "eos_token": { "content": "</s>", "lstrip": false },
        "pad_token": "<pad>",
        "unk_token": null,
    });
    tokenizer(config).chat_template().unwrap().clone()
}

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat").join(name);
    std::fs::read_to_string(path).unwrap()
}

fn list(value: &Value) -> Option<Vec<Value>> {
    value.as_array().cloned()
}

#[test]
fn conversations_are_written_as_transformers_does() {
    let conversations: Map<String, Value> =
        serde_json::from_str(&read("conversations.json")).unwrap();
    let expected: Map<String, Value> = serde_json::from_str(&read("expected.json")).unwrap();
    assert!(expected.len() > 200);
    let (mut templates, mut wrong) = (Map::new(), Vec::new());
    for (key, expected) in &expected {
        let [file, name, what] = key.split(' ').collect::<Vec<_>>()[..] else { panic!("{key}") };
        let source =
            templates.entry(file).or_insert_with(|| read(&format!("templates/{file}")).into());
        let conversation = &conversations[name];
        let messages: Vec<Message> =
            serde_json::from_value(conversation["messages"].clone()).unwrap();
        let mut variables = Map::new();
        variables.insert("date_string".into(), "26 Jul 2024".into());
        variables
            .extend(conversation["chat_template_kwargs"].as_object().cloned().unwrap_or_default());
        let (tools, documents) = (list(&conversation["tools"]), list(&conversation["documents"]));
        let context = Context { tools, documents, variables };
        let rendered =
            template(source.as_str().unwrap()).render_in(&messages, &context, what == "prompt");
        match (&rendered, expected.as_str()) {
            (Ok(rendered), Some(expected)) if rendered.text == expected => {}
            (Err(ModelError::ChatTemplate(_)), None) => {}
            _ => wrong.push(format!("{key}\n  expected {expected}\n  got {rendered:?}")),
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_template_is_parsed_when_it_is_used_and_its_file_named() {
    for source in ["{% if %}", "{% enddo %}", &format!("{{{{ {}1 }}}}", "-".repeat(100_000))] {
        let tokenizer = tokenizer(json!({ "chat_template": source }));
        assert!(!tokenizer.encode("abc", false).unwrap().is_empty());
        let template = tokenizer.chat_template().unwrap();
        for _ in 0..2 {
            let error =
                template.render(&[Message::new("user", "hi")], true).unwrap_err().to_string();
            assert!(error.starts_with("chat template: line 1: "), "{error}");
            assert!(error.contains("(in dir/tokenizer"), "{error}");
        }
    }
    let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    let error = template(endless).render(&[], false).unwrap_err().to_string();
    assert!(error.contains("steps that a template may"), "{error}");
}

fn user() -> Vec<Message> {
    vec![Message::new("user", "hi")]
}

fn with_tools() -> Context {
    Context { tools: Some(vec![json!({ "name": "f" })]), ..Context::default() }
}

#[test]
fn of_several_templates_the_one_for_tools_is_taken_where_there_are_tools() {
    let named = json!([
        { "name": "default", "template": "plain" },
        { "name": "tool_use", "template": "{{ tools[0].name }}" },
    ]);
    for config in [named.clone(), json!({ "default": "plain", "tool_use": "{{ tools[0].name }}" })]
    {
        let tokenizer = tokenizer(json!({ "chat_template": config }));
        let template = tokenizer.chat_template().unwrap();
        assert_eq!(template.source(), "plain");
        assert_eq!(template.render(&user(), true).unwrap(), "plain");
        assert_eq!(template.render_in(&user(), &with_tools(), true).unwrap().text, "f");
    }
    let only = json!([{ "name": "rag", "template": "x" }]);
    let tokenizer = tokenizer(json!({ "chat_template": only }));
    let error = tokenizer.chat_template().unwrap().render(&user(), true).unwrap_err().to_string();
    assert!(error.contains("(rag)") && error.contains("default"), "{error}");
}

#[test]
fn templates_are_read_from_files_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let made = random_model(tiny_config(), 0).unwrap().tokenizer;
    write("tokenizer.json", &made.to_json().unwrap().0);
    write("tokenizer_config.json", r#"{"chat_template": "old", "bos_token": "<a>"}"#);
    write(
        "special_tokens_map.json",
        r#"{"eos_token": {"content": "<b>"}, "additional_special_tokens": ["c"]}"#,
    );
    write("chat_template.jinja", "{{ bos_token }}{{ eos_token }}{{ nothing.at_all }}");
    let tokenizer = Tokenizer::from_hf_dir(dir.path()).unwrap();
    let error = tokenizer.chat_template().unwrap().render(&user(), true).unwrap_err().to_string();
    assert!(
        error.contains("'nothing' is undefined") && error.contains("chat_template.jinja"),
        "{error}"
    );

    write("chat_template.jinja", "{{ bos_token }}{{ eos_token }}");
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    write("additional_chat_templates/tool_use.jinja", "{{ tools[0].name }}");
    let tokenizer = Tokenizer::from_hf_dir(dir.path()).unwrap();
    // They are saved with a student, and read back.
    let saved = tempfile::tempdir().unwrap();
    tokenizer.save(saved.path()).unwrap();
    for tokenizer in [tokenizer, Tokenizer::from_hf_dir(saved.path()).unwrap()] {
        let template = tokenizer.chat_template().unwrap();
        assert_eq!(template.render(&user(), true).unwrap(), "<a><b>");
        assert_eq!(template.render_in(&user(), &with_tools(), true).unwrap().text, "f");
    }
    // Not to be read is not to be missing.
    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    std::fs::create_dir(dir.path().join("chat_template.jinja")).unwrap();
    let error = Tokenizer::from_hf_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja"), "{error}");
}

#[test]
fn gguf_names_its_templates() {
    use candle_core::quantized::gguf_file::{Content, Value as Gguf, VersionedMagic};
    let text = |text: &str| Gguf::String(text.to_owned());
    let list = |texts: &[&str]| Gguf::Array(texts.iter().map(|t| text(t)).collect());
    let alphabet: Vec<String> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet()
        .into_iter()
        .map(String::from)
        .chain(["<s>".to_owned(), "</s>".to_owned()])
        .collect();
    let tokens: Vec<&str> = alphabet.iter().map(String::as_str).collect();
    let (bos, eos) = (tokens.len() as u32 - 2, tokens.len() as u32 - 1);
    let kinds = (0..=eos).map(|id| Gguf::I32(if id < bos { 1 } else { 3 })).collect();
    let metadata = [
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
        ("tokenizer.ggml.tokens", list(&tokens)),
        ("tokenizer.ggml.merges", list(&[])),
        ("tokenizer.ggml.token_type", Gguf::Array(kinds)),
        ("tokenizer.ggml.bos_token_id", Gguf::U32(bos)),
        ("tokenizer.ggml.eos_token_id", Gguf::U32(eos)),
        ("tokenizer.chat_template", text("{{ bos_token }}plain{{ eos_token }}")),
        ("tokenizer.chat_templates", list(&["tool_use"])),
        ("tokenizer.chat_template.tool_use", text("{{ tools[0].name }}{{ no.thing }}")),
    ];
    let content = Content {
        magic: VersionedMagic::GgufV3,
        metadata: metadata.map(|(key, value)| (key.to_owned(), value)).into(),
        tensor_infos: Default::default(),
        tensor_data_offset: 0,
    };
    let tokenizer = Tokenizer::from_gguf(Path::new("a.gguf"), &content).unwrap();
    let template = tokenizer.chat_template().unwrap();
    assert_eq!(template.render(&user(), true).unwrap(), "<s>plain</s>");
    let error = template.render_in(&user(), &with_tools(), true).unwrap_err().to_string();
    assert!(error.contains("'no' is undefined (\"tool_use\" in a.gguf)"), "{error}");
}

#[test]
fn messages_keep_their_keys_or_say_what_they_lack() {
    let message = |json: Value| serde_json::from_value::<Message>(json);
    let whole =
        json!({ "role": "assistant", "content": null, "tool_calls": [1], "x": { "y": [2.0] } });
    assert_eq!(serde_json::to_value(message(whole.clone()).unwrap()).unwrap(), whole);
    for (bad, words) in [
        (json!({ "content": "a" }), "missing field `role`"),
        (json!({ "role": 1, "content": "a" }), "\"role\" is not a string"),
        (json!({ "role": "user" }), "missing field `content`"),
        (json!({ "role": "user", "content": null }), "missing field `content`"),
        (json!({ "role": "user", "content": 3 }), "neither text nor a list"),
        (json!({ "role": "user", "content": [3] }), "a part of \"content\""),
        (json!({ "role": "user", "content": [{ "type": "image", "url": "x" }] }), "\"image\""),
        (json!("hi"), "invalid type"),
    ] {
        let error = message(bad.clone()).unwrap_err().to_string();
        assert!(error.contains(words), "{bad}: {error}");
    }
}

/// What a template leaves out of a conversation.
fn unwritten(source: &str, messages: Value, context: &Context) -> Option<String> {
    let messages: Vec<Message> = serde_json::from_value(messages).unwrap();
    template(source).render_whole(&messages, context).unwrap().1
}

#[test]
fn what_a_template_leaves_out_is_told() {
    let none = Context::default();
    let plain = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}";
    let call = json!([
        { "role": "user", "content": "q" },
        { "role": "assistant", "content": "", "tool_calls": [{ "function": { "name": "f" } }] },
        { "role": "tool", "content": "r", "tool_call_id": "1" },
    ]);
    assert!(unwritten(plain, call.clone(), &none).unwrap().contains("\"tool_calls\""));
    let calls = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}";
    assert_eq!(unwritten(calls, call.clone(), &none), None);
    assert!(unwritten(calls, call, &with_tools()).unwrap().contains("\"tools\""));
    let thought = |key: &str| json!([{ "role": "assistant", "content": "a", key: "b" }]);
    for key in ["reasoning_content", "thinking", "reasoning"] {
        assert!(unwritten(plain, thought(key), &none).unwrap().contains("reasoning_content"));
        let reads = "{{ messages[0].content }}{{ messages[0].reasoning_content }}";
        assert_eq!(unwritten(reads, thought(key), &none), None, "{key}");
    }
    let named = json!([{ "role": "user", "content": "a", "name": "bob" }]);
    assert!(
        unwritten(plain, named, &none)
            .unwrap()
            .contains("\"name\" of messages of the role \"user\"")
    );
    // What says nothing is nothing to leave out, and what links a result to its call is no one's words.
    let empty =
        json!([{ "role": "assistant", "content": "a", "tool_calls": [], "name": null, "id": "7" }]);
    assert_eq!(unwritten(plain, empty, &none), None);
    // Roles that a template does not know.
    let deaf = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}";
    let system = json!([{ "role": "system", "content": "s" }, { "role": "user", "content": "u" }]);
    assert!(unwritten(deaf, system.clone(), &none).unwrap().contains("role \"system\""));
    assert_eq!(unwritten(plain, system, &none), None);
    // Thoughts of the last turn alone are the template's way, not an oversight.
    let last = "{% for m in messages %}{{ m.content }}{% if loop.last %}{{ m.thinking }}{% endif %}{% endfor %}";
    let turns = json!([
        { "role": "assistant", "content": "a", "thinking": "x" },
        { "role": "assistant", "content": "b", "thinking": "y" },
    ]);
    assert_eq!(unwritten(last, turns, &none), None);
    let mut variables = Map::new();
    variables.insert("enable_thinking".into(), json!(false));
    let context = Context { variables, ..Context::default() };
    let user = json!([{ "role": "user", "content": "u" }]);
    assert!(unwritten(plain, user.clone(), &context).unwrap().contains("enable_thinking"));
    let reads = "{{ messages[0].content }}{% if enable_thinking is defined %}{% endif %}";
    assert_eq!(unwritten(reads, user, &context), None);
}
