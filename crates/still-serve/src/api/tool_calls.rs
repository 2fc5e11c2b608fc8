//! Calls of tools in an answer's text, as models of several families write them.

use std::collections::HashSet;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;
use still_model::{ChatTemplate, Tokenizer};

use super::sampling::any_seed;

/// How a family of models writes calls.
#[derive(Debug)]
pub struct Form {
    /// What a template of the family says.
    template: &'static str,
    /// What a call, or a list of calls, begins with.
    pub(super) opens: &'static str,
    /// What it ends with; the answer's end if there is nothing.
    pub(super) closes: Option<&'static str>,
    /// Whether an answer that is JSON from its first character is a call too.
    pub(super) bare: bool,
    /// The name of the arguments in a call's JSON, as the model was taught.
    pub(super) arguments: &'static str,
    /// What an identifier begins with, and how many letters follow: Mistral's templates refuse others.
    id: (&'static str, usize),
    /// Markers that may be special tokens, whose text is not shown otherwise.
    pub(super) markers: &'static [&'static str],
}

/// The first one counts whose words a template has. A call is JSON with `name` and `arguments` or `parameters`.
static FORMS: [Form; 3] = [
    // Hermes, Qwen 2.5 and 3, SmolLM3: <tool_call>{"name": …, "arguments": {…}}</tool_call>
    Form {
        template: "<tool_call>",
        opens: "<tool_call>",
        closes: Some("</tool_call>"),
        bare: false,
        arguments: "arguments",
        id: ("call_", 24),
        markers: &["<tool_call>", "</tool_call>"],
    },
    // Mistral: [TOOL_CALLS][{"name": …, "arguments": {…}}, …], later [TOOL_CALLS]name[ARGS]{…}
    Form {
        template: "[TOOL_CALLS]",
        opens: "[TOOL_CALLS]",
        closes: None,
        bare: false,
        arguments: "arguments",
        id: ("", 9),
        markers: &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    },
    // Llama 3.1 to 3.3: {"name": …, "parameters": {…}} and nothing else, perhaps after <|python_tag|>
    Form {
        template: "\"parameters\": dictionary of argument name and its value",
        opens: "<|python_tag|>",
        closes: None,
        bare: true,
        arguments: "parameters",
        id: ("call_", 24),
        markers: &["<|python_tag|>"],
    },
];

impl Form {
    /// That of models with this template, if it is known.
    pub fn of(template: &str) -> Option<&'static Self> {
        FORMS.iter().find(|form| template.contains(form.template))
    }
}

/// The name of a tool's function.
pub fn function_name(tool: &Value) -> Option<&str> {
    tool.pointer("/function/name").or_else(|| tool.get("name")).and_then(Value::as_str)
}

/// A call of a function.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct ToolCall {
    id: String,
    r#type: &'static str,
    function: CalledFunction,
}

/// A function, and what it is called with.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct CalledFunction {
    name: String,
    /// A JSON object, as text.
    arguments: String,
}

/// A piece of an answer.
#[derive(Clone, Debug)]
pub enum Part {
    /// Text that is no call.
    Text(String),
    /// A call.
    Call(ToolCall),
}

/// Finds the calls in an answer's text, which may come in pieces. What is no call of a known function stays text.
#[derive(Clone, Debug)]
pub struct CallReader {
    form: &'static Form,
    functions: Arc<HashSet<String>>,
    /// Not given out yet: what may be white space before a call, or a part of one.
    held: String,
    /// Whether all of the answer so far is held, in a form whose calls need no marker.
    at_start: bool,
    /// Whether there was a call.
    has_calls: bool,
}

impl CallReader {
    /// For answers of a model with this template, which was given these tools. None if the template has no form that is known.
    pub fn new(template: &ChatTemplate, tools: &[Value]) -> Option<Self> {
        Self::of(template.source(), tools)
    }

    fn of(template: &str, tools: &[Value]) -> Option<Self> {
        let form = Form::of(template)?;
        let names = tools.iter().filter_map(function_name).map(str::to_owned);
        let functions = Arc::new(names.collect());
        Some(Self { form, functions, held: String::new(), at_start: form.bare, has_calls: false })
    }

    /// Special tokens whose text is to be shown.
    pub fn marker_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let ids = self.form.markers.iter().filter_map(|marker| tokenizer.token_id(marker));
        ids.filter(|id| tokenizer.is_special(*id)).collect()
    }

    /// The parts of a whole answer.
    pub fn whole(mut self, text: &str) -> Vec<Part> {
        let mut parts = self.push(text);
        parts.extend(self.finish());
        parts
    }

    /// Adds text. What becomes certain by it.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        if self.at_start {
            match self.held.trim_start().chars().next() {
                None | Some('{' | '[') => return parts,
                Some(_) => self.at_start = false,
            }
        }
        loop {
            let Some(at) = self.held.find(self.form.opens) else {
                let certain = self.held.len() - self.may_open();
                give_out(&mut parts, self.held.drain(..certain).collect());
                return parts;
            };
            // White space before a call goes with it.
            let before = self.held[..at].trim_end().len();
            give_out(&mut parts, self.held.drain(..before).collect());
            let inside = at - before + self.form.opens.len();
            let Some(closes) = self.form.closes else { return parts };
            let Some(length) = self.held[inside..].find(closes) else { return parts };
            let whole: String = self.held.drain(..inside + length + closes.len()).collect();
            self.read(&whole[inside..inside + length], &whole, &mut parts);
        }
    }

    /// What is left when the answer has ended.
    pub fn finish(&mut self) -> Vec<Part> {
        let held = std::mem::take(&mut self.held);
        let mut parts = Vec::new();
        let blank = held.trim().is_empty();
        match held.trim_start().strip_prefix(self.form.opens) {
            Some(inside) => self.read(inside, &held, &mut parts),
            None if self.at_start && !blank => self.read(&held, &held, &mut parts),
            // White space after a call.
            None if blank && self.has_calls => {}
            None => give_out(&mut parts, held),
        }
        parts
    }

    /// Bytes at the end of what is held that may begin a call, with white space before it.
    fn may_open(&self) -> usize {
        let opens = self.form.opens;
        let begins = (1..opens.len()).rev().find(|&length| {
            opens.is_char_boundary(length) && self.held.ends_with(&opens[..length])
        });
        let marker = self.held.len() - begins.unwrap_or(0);
        self.held.len() - self.held[..marker].trim_end().len()
    }

    /// The calls in a text, or the text of which it is a part.
    fn read(&mut self, inside: &str, whole: &str, parts: &mut Vec<Part>) {
        match self.calls_in(inside) {
            Some(calls) => {
                self.has_calls = true;
                parts.extend(calls.into_iter().map(Part::Call));
            }
            None => give_out(parts, whole.to_owned()),
        }
    }

    fn calls_in(&self, text: &str) -> Option<Vec<ToolCall>> {
        let mut calls = Vec::new();
        for text in text.split(self.form.opens) {
            let text = text.trim();
            if let Some((head, arguments)) = text.split_once('{')
                && !head.is_empty()
                && !head.starts_with('[')
            {
                let name = head.trim_end_matches("[ARGS]").split("[CALL_ID]").next()?.trim();
                let arguments = serde_json::from_str(&format!("{{{arguments}")).ok()?;
                calls.push(self.call(name, Some(arguments))?);
                continue;
            }
            for value in values(text)? {
                // Some models repeat the shape of the tool's description.
                let value = value.get("function").filter(|f| f.is_object()).unwrap_or(&value);
                let arguments = value.get("arguments").or_else(|| value.get("parameters"));
                calls.push(self.call(value.get("name")?.as_str()?, arguments.cloned())?);
            }
        }
        Some(calls).filter(|calls| !calls.is_empty())
    }

    fn call(&self, name: &str, arguments: Option<Value>) -> Option<ToolCall> {
        if !self.functions.contains(name) {
            return None;
        }
        let arguments = match arguments {
            None | Some(Value::Null) => "{}".to_owned(),
            Some(Value::Object(object)) => Value::Object(object).to_string(),
            Some(Value::String(text)) => {
                serde_json::from_str::<Value>(&text).ok().filter(Value::is_object)?.to_string()
            }
            Some(_) => return None,
        };
        let (begins, letters) = self.form.id;
        let random = format!("{:016x}{:016x}", any_seed(), any_seed());
        let id = format!("{begins}{}", &random[..letters]);
        let function = CalledFunction { name: name.to_owned(), arguments };
        Some(ToolCall { id, r#type: "function", function })
    }
}

/// JSON values one after the other, or in a list. Llama separates them by semicolons.
fn values(text: &str) -> Option<Vec<Value>> {
    let mut values = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        match stream.next()?.ok()? {
            Value::Array(list) => values.extend(list),
            value => values.push(value),
        }
        rest = rest[stream.byte_offset()..]
            .trim_start_matches(|c: char| c.is_whitespace() || c == ';');
    }
    Some(values)
}

fn give_out(parts: &mut Vec<Part>, text: String) {
    match parts.last_mut() {
        _ if text.is_empty() => {}
        Some(Part::Text(before)) => before.push_str(&text),
        _ => parts.push(Part::Text(text)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const HERMES: &str = "within <tool_call></tool_call> XML tags";
    const MISTRAL: &str = "{{ '[TOOL_CALLS] [' }}";
    const LLAMA: &str = r#"Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}."#;

    fn reader(template: &str) -> CallReader {
        let tools = [
            json!({ "type": "function", "function": { "name": "weather", "parameters": {} } }),
            json!({ "name": "time" }),
        ];
        CallReader::of(template, &tools).unwrap()
    }

    /// Text, and calls as `name(arguments)`, joined to lines; the same whole and in pieces of every length.
    fn parts(template: &str, text: &str) -> String {
        let told = |parts: Vec<Part>| {
            let mut joined = Vec::new();
            for part in parts {
                match part {
                    Part::Text(text) => give_out(&mut joined, text),
                    call => joined.push(call),
                }
            }
            let line = |part: Part| match part {
                Part::Text(text) => text,
                Part::Call(call) => format!("{}({})", call.function.name, call.function.arguments),
            };
            joined.into_iter().map(line).collect::<Vec<_>>().join("|")
        };
        let whole = told(reader(template).whole(text));
        for length in 1..8 {
            let mut reader = reader(template);
            let mut all = Vec::new();
            let characters: Vec<char> = text.chars().collect();
            for piece in characters.chunks(length) {
                all.extend(reader.push(&piece.iter().collect::<String>()));
            }
            all.extend(reader.finish());
            assert_eq!(told(all), whole, "in pieces of {length}");
        }
        whole
    }

    #[test]
    fn calls_between_tags_are_found_among_text() {
        let call = r#"<tool_call>
{"name": "weather", "arguments": {"city": "Kyōto", "days": 2}}
</tool_call>"#;
        let found = r#"weather({"city":"Kyōto","days":2})"#;
        assert_eq!(parts(HERMES, call), found);
        assert_eq!(
            parts(HERMES, &format!("Let me see.\n\n{call}\n{call}\n")),
            format!("Let me see.|{found}|{found}")
        );
        assert_eq!(parts(HERMES, &format!("a <{call} b")), format!("a <|{found}| b"));
        // The answer ends where the tag should.
        assert_eq!(parts(HERMES, r#"<tool_call>{"name": "time"}"#), "time({})");
        assert_eq!(
            parts(
                HERMES,
                r#"<tool_call>[{"name": "time"}, {"name": "time", "arguments": "{}"}]</tool_call>"#
            ),
            "time({})|time({})"
        );
    }

    #[test]
    fn mistral_lists_calls_or_names_each() {
        let list = r#"[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "time", "arguments": {}}]"#;
        assert_eq!(parts(MISTRAL, list), r#"weather({"city":"Oslo"})|time({})"#);
        let named = r#"Wait.[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]time[CALL_ID]123456789[ARGS]{}"#;
        assert_eq!(parts(MISTRAL, named), r#"Wait.|weather({"city":"Oslo"})|time({})"#);
        let Some(Part::Call(call)) = reader(MISTRAL).whole(list).into_iter().next() else {
            panic!()
        };
        assert!(call.id.len() == 9 && call.id.chars().all(|c| c.is_ascii_alphanumeric()));
    }

    #[test]
    fn llama_answers_in_json_alone() {
        let one = r#"{"name": "weather", "parameters": {"city": "Rome"}}"#;
        let found = r#"weather({"city":"Rome"})"#;
        assert_eq!(parts(LLAMA, one), found);
        assert_eq!(parts(LLAMA, &format!("{one}; {one}")), format!("{found}|{found}"));
        assert_eq!(parts(LLAMA, &format!("<|python_tag|>{one}")), found);
        let told = r#"{"type": "function", "function": {"name": "time", "parameters": null}}"#;
        assert_eq!(parts(LLAMA, told), "time({})");
        let text = format!("Say {one}");
        assert_eq!(parts(LLAMA, &text), text);
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for (template, text) in [
            (HERMES, "no call, 1 < 2, <tool"),
            (HERMES, " \n"),
            (HERMES, "a\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"ci</tool_call> b"),
            (HERMES, "<tool_call><function=weather></function></tool_call>"),
            (HERMES, "<tool_call>{\"name\": \"other\", \"arguments\": {}}</tool_call>"),
            (HERMES, "<tool_call>{\"name\": \"time\", \"arguments\": [1]}</tool_call>"),
            (HERMES, "<tool_call></tool_call>"),
            (MISTRAL, "[TOOL_CALLS] [{\"name\": \"weather\", \"argu"),
            (MISTRAL, "[TOOL_CALLS]other[ARGS]{}"),
            (LLAMA, "{\"name\": \"Anna\", \"parameters\": {}}"),
            (LLAMA, "{\"name\": \"time\", \"parameters\": {}} is it."),
            (LLAMA, "  [1, 2]"),
            (LLAMA, "<|python_tag|>print(1)"),
        ] {
            assert_eq!(parts(template, text), text);
        }
        assert!(CallReader::of("a template that ignores tools", &[]).is_none());
    }
}
