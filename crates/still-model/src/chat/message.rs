//! Messages of a conversation, and the other variables of a template.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One message of a conversation, with all its keys: a template may use any.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct Message {
    object: Map<String, Value>,
}

/// Names under which reasoning is given, the one that templates read first.
pub(super) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Parts of a content that are no text.
const NO_TEXT: [&str; 12] = [
    "image",
    "image_url",
    "input_image",
    "audio",
    "audio_url",
    "input_audio",
    "video",
    "video_url",
    "input_video",
    "file",
    "input_file",
    "document",
];

impl Message {
    /// A message of text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut object = Map::new();
        object.insert("role".into(), Value::String(role.into()));
        object.insert("content".into(), Value::String(content.into()));
        Self { object }
    }

    /// `system`, `user`, `assistant`, `tool` or whatever the template knows.
    pub fn role(&self) -> &str {
        self.object.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// All keys.
    pub fn object(&self) -> &Map<String, Value> {
        &self.object
    }

    /// This message without some keys.
    pub(super) fn without(&self, keys: &[&str]) -> Self {
        let mut object = self.object.clone();
        object.retain(|key, _| !keys.contains(&key.as_str()));
        Self { object }
    }

    /// This message with something more said, where it says something.
    pub(super) fn saying_more(&self, more: &str) -> Option<Self> {
        let mut object = self.object.clone();
        match object.get_mut("content")? {
            Value::String(text) if !text.trim().is_empty() => text.push_str(more),
            Value::Array(parts) => {
                let texts = parts.iter_mut().filter_map(|part| match part {
                    Value::String(text) => Some(text),
                    Value::Object(part) => match part.get_mut("text") {
                        Some(Value::String(text)) => Some(text),
                        _ => None,
                    },
                    _ => None,
                });
                let mut said = false;
                for text in texts.filter(|text| !text.trim().is_empty()) {
                    text.push_str(more);
                    said = true;
                }
                if !said {
                    return None;
                }
            }
            _ => return None,
        }
        Some(Self { object })
    }

    /// As transformers hands it to a template: keys without a value are left out, and reasoning goes by the name that
    /// templates read and by the one that gpt-oss reads, whatever it was given under.
    pub(super) fn for_template(&self) -> Value {
        let reasoning =
            REASONING.iter().find_map(|key| self.object.get(*key).filter(|value| !value.is_null()));
        let given = self.object.iter().filter(|(_, value)| !value.is_null());
        let given = given.map(|(key, value)| (key.clone(), value.clone()));
        let mut object = Map::new();
        if let Some(reasoning) = reasoning {
            object.insert("thinking".into(), reasoning.clone());
        }
        object.extend(given);
        if let Some(reasoning) = reasoning {
            object.insert("reasoning_content".into(), reasoning.clone());
        }
        Value::Object(object)
    }
}

impl TryFrom<Map<String, Value>> for Message {
    type Error = String;

    fn try_from(object: Map<String, Value>) -> Result<Self, String> {
        match object.get("role") {
            Some(Value::String(_)) => {}
            Some(_) => return Err("\"role\" is not a string".into()),
            None => return Err("missing field `role`".into()),
        }
        match object.get("content") {
            Some(Value::String(_)) => {}
            Some(Value::Array(parts)) => parts.iter().try_for_each(check_part)?,
            // A call of a tool needs no words.
            Some(Value::Null) | None => {
                let says = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
                if !says("tool_calls") && !REASONING.iter().any(|key| says(key)) {
                    return Err("missing field `content`".into());
                }
            }
            Some(_) => return Err("\"content\" is neither text nor a list of parts".into()),
        }
        Ok(Self { object })
    }
}

impl From<Message> for Map<String, Value> {
    fn from(message: Message) -> Self {
        message.object
    }
}

fn check_part(part: &Value) -> Result<(), String> {
    let kind = match part {
        Value::String(_) => return Ok(()),
        Value::Object(part) => part.get("type").and_then(Value::as_str).unwrap_or_default(),
        _ => return Err("a part of \"content\" is neither text nor an object".into()),
    };
    match NO_TEXT.contains(&kind) {
        true => {
            Err(format!("\"content\" has a part of type \"{kind}\", and models here read text"))
        }
        false => Ok(()),
    }
}

/// Variables of a template other than the messages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Context {
    /// JSON schemas of functions that the model may call.
    pub tools: Option<Vec<Value>>,
    /// Documents to answer from.
    pub documents: Option<Vec<Value>>,
    /// The template's own variables, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}
