//! Every case of `data/python.json` (made by `data/make.py` with transformers' environment) gives Python's text, or is
//! refused where Python refuses it.

use std::time::SystemTime;

use serde_json::Value;
use still_jinja::Template;

#[test]
fn templates_render_as_they_do_in_python() {
    let file: Value = serde_json::from_str(include_str!("data/python.json")).unwrap();
    let variables = file["variables"].as_object().unwrap();
    let cases = file["cases"].as_array().unwrap();
    assert!(cases.len() > 700);
    let mut wrong = Vec::new();
    for case in cases {
        let source = case["template"].as_str().unwrap();
        let rendered = Template::parse(source)
            .and_then(|template| template.render(variables, SystemTime::UNIX_EPOCH));
        let same = match (&rendered, case["expected"].as_str()) {
            (Ok(rendered), Some(expected)) => rendered.text == expected,
            (Err(_), None) => true,
            _ => false,
        };
        if !same {
            wrong.push(format!("{source}\n  expected {case}\n  got {rendered:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}
