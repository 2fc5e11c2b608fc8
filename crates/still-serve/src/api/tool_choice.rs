//! Answers that have to call a tool: a grammar of the calls that the model's template knows.

use std::fmt::Write;

use serde_json::{Value, json};

use super::error::{ApiError, Result};
use super::grammar::WHITESPACE;
use super::tool_calls::{Form, function_name};

/// What an answer has to do with the tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// It may call any.
    Auto,
    /// It is not told of them.
    None,
    /// It calls at least one.
    Required,
    /// It calls this one, once.
    Function(String),
}

impl ToolChoice {
    /// The field of a request.
    ///
    /// # Errors
    /// 400 for anything else.
    pub fn read(field: Option<&Value>) -> Result<Self> {
        let Some(field) = field else { return Ok(Self::Auto) };
        match field {
            Value::Null => return Ok(Self::Auto),
            Value::String(word) => match word.as_str() {
                "auto" => return Ok(Self::Auto),
                "none" => return Ok(Self::None),
                "required" => return Ok(Self::Required),
                _ => {}
            },
            Value::Object(object) if field["type"] == "function" => {
                let name = field.pointer("/function/name").or_else(|| object.get("name"));
                if let Some(name) = name.and_then(Value::as_str) {
                    return Ok(Self::Function(name.to_owned()));
                }
            }
            _ => {}
        }
        let what = "tool_choice is \"auto\", \"none\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}";
        Err(ApiError::invalid("tool_choice", what))
    }

    /// Whether an answer has to call a tool.
    pub fn forces(&self) -> bool {
        matches!(self, Self::Required | Self::Function(_))
    }

    /// Those of the tools that an answer has to call, one or another.
    ///
    /// # Errors
    /// 400 for no tools, or none of the name.
    pub fn among<'a>(&self, tools: &'a [Value]) -> Result<Vec<Called<'a>>> {
        let wanted = |called: &Called<'_>| match self {
            Self::Function(name) => called.name == name,
            _ => true,
        };
        let all = tools.iter().filter_map(Called::of).filter(wanted);
        let called: Vec<_> = all.collect();
        if called.is_empty() {
            let what = match self {
                Self::Function(name) => format!("tool_choice: no function of `tools` is {name:?}"),
                _ => "tool_choice: `tools` has no functions to be called".to_owned(),
            };
            return Err(ApiError::invalid("tool_choice", what));
        }
        Ok(called)
    }
}

/// A function that is to be called.
#[derive(Clone, Copy, Debug)]
pub struct Called<'a> {
    name: &'a str,
    parameters: Option<&'a Value>,
}

impl<'a> Called<'a> {
    fn of(tool: &'a Value) -> Option<Self> {
        let function = tool.get("function").unwrap_or(tool);
        Some(Self { name: function_name(tool)?, parameters: function.get("parameters") })
    }

    /// The schema of its arguments, which are an object.
    fn schema(self) -> Value {
        let mut schema = match self.parameters {
            Some(Value::Object(schema)) => schema.clone(),
            // As OpenAI reads it: a function without parameters has none.
            None | Some(Value::Null) => {
                let none = json!({ "properties": {}, "additionalProperties": false });
                none.as_object().cloned().unwrap_or_default()
            }
            // The library says what is wrong with it.
            Some(other) => return other.clone(),
        };
        let says = ["type", "$ref", "anyOf", "oneOf", "allOf"];
        if !says.iter().any(|key| schema.contains_key(*key)) {
            schema.insert("type".into(), "object".into());
        }
        schema.entry("x-guidance").or_insert(json!({ "whitespace_pattern": WHITESPACE }));
        Value::Object(schema)
    }
}

/// A grammar in llguidance's Lark of one call, or at least one if there may be `several`. `special` is the id of a marker that is a
/// special token: no text stands for it.
pub fn grammar(
    form: &Form,
    template: &str,
    functions: &[Called<'_>],
    several: bool,
    special: impl Fn(&str) -> Option<u32>,
) -> String {
    let text = |text: &str| json!(text).to_string();
    let marker = |marker: &str| match special(marker) {
        Some(id) => format!("<[{id}]>"),
        None => text(marker),
    };
    // Mistral's later templates name each call; the earlier ones write a list.
    let named =
        (form.markers.contains(&"[ARGS]") && template.contains("[ARGS]")).then(|| marker("[ARGS]"));
    let (open, more) =
        (marker(form.opens), |rest: String| if several { rest } else { String::new() });
    let start = match (form.closes, form.bare) {
        (Some(closes), _) => {
            let call = format!("{open} \"\\n\" call \"\\n\" {}", marker(closes));
            format!("{call}{}", more(format!(" (\"\\n\" {call})*")))
        }
        (None, true) => format!("call{}", more(" (\"; \" call)*".into())),
        (None, false) if named.is_some() => {
            format!("{open} call{}", more(format!(" ({open} call)*")))
        }
        (None, false) => {
            format!("{open} \" \"? \"[\" call{} \"]\"", more(" (\", \" call)*".into()))
        }
    };
    let calls: Vec<_> = (0..functions.len()).map(|n| format!("call{n}")).collect();
    let mut grammar = format!("start: {start}\ncall: {}\n", calls.join(" | "));
    for (n, function) in functions.iter().enumerate() {
        let (before, after) = match &named {
            Some(args) => (format!("{} {args}", text(function.name)), ""),
            None => {
                let begins =
                    format!("{{\"name\": {}, \"{}\": ", text(function.name), form.arguments);
                (text(&begins), " \"}\"")
            }
        };
        // Writing to a string does not fail.
        let _ = writeln!(grammar, "call{n}: {before} arguments{n}{after}");
        let _ = writeln!(grammar, "arguments{n}: %json {}", function.schema());
    }
    grammar
}
