//! A line of JSON, of which only what is asked for is held: whatever else a line has, it takes no memory.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::chat::BESIDE;

/// What an instruction is made of.
const INSTRUCTION: [&str; 3] = ["instruction", "input", "output"];

/// Whether a document is made of what stands under this name; `field` holds its text.
#[cfg(feature = "parquet")]
pub(super) fn is_asked_for(name: &str, field: &str) -> bool {
    name == field || name == "messages" || BESIDE.contains(&name) || INSTRUCTION.contains(&name)
}

/// What a line says under the names that are asked for.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Fields {
    pub text: Option<Text>,
    pub messages: Option<Messages>,
    /// What [`BESIDE`] names.
    pub beside: [Option<Value>; 3],
    /// The values that make up an instruction, by name; none of a line that is too long for them to be looked at.
    pub instruction: BTreeMap<String, Option<Value>>,
}

/// The value of the field that should hold text.
#[derive(Debug, PartialEq)]
pub(super) enum Text {
    Is(String),
    /// Of another type.
    IsNot,
}

/// The value of `messages`.
#[derive(Debug, PartialEq)]
pub(super) enum Messages {
    Are(Value),
    /// The line is too long for it to be looked at.
    TooLong,
}

/// Reads an object's `field`, `messages`, what stands next to those, and instruction; all but the first if the line has at most `most`
/// bytes.
///
/// # Errors
/// In words: no object, or no JSON.
pub(super) fn fields(line: &str, field: &str, most: usize) -> Result<Fields, String> {
    let mut json = serde_json::Deserializer::from_str(line);
    let seed = Object { field, reads_messages: line.len() <= most };
    let fields = seed.deserialize(&mut json).map_err(|error| error.to_string())?;
    json.end().map_err(|error| error.to_string())?;
    fields.ok_or_else(|| "not a JSON object".into())
}

struct Object<'a> {
    field: &'a str,
    reads_messages: bool,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    /// `None` if it is none.
    type Value = Option<Fields>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Option<Fields>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Fields::default();
        while let Some(key) = map.next_key::<String>()? {
            if key == self.field {
                fields.text = Some(map.next_value_seed(TextOrOther)?);
            } else if key == "messages" && self.reads_messages {
                fields.messages = Some(Messages::Are(map.next_value()?));
            } else if let Some(at) = BESIDE.iter().position(|name| key == *name)
                && self.reads_messages
            {
                fields.beside[at] = Some(map.next_value()?);
            } else if INSTRUCTION.contains(&key.as_str()) && self.reads_messages {
                fields.instruction.insert(key, Some(map.next_value()?));
            } else {
                map.next_value::<IgnoredAny>()?;
                if key == "messages" {
                    fields.messages = Some(Messages::TooLong);
                } else if INSTRUCTION.contains(&key.as_str()) {
                    fields.instruction.insert(key, None);
                }
            }
        }
        Ok(Some(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

struct TextOrOther;

impl<'de> DeserializeSeed<'de> for TextOrOther {
    type Value = Text;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Text, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for TextOrOther {
    type Value = Text;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Text, E> {
        Ok(Text::Is(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Text, E> {
        Ok(Text::Is(text))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Text, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Text::IsNot)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Text, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Text::IsNot)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Text, E> {
        Ok(Text::IsNot)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Text, E> {
        Ok(Text::IsNot)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Text, E> {
        Ok(Text::IsNot)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Text, E> {
        Ok(Text::IsNot)
    }

    fn visit_unit<E: Error>(self) -> Result<Text, E> {
        Ok(Text::IsNot)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(line: &str) -> Result<Fields, String> {
        fields(line, "text", 200)
    }

    #[test]
    fn only_what_is_asked_for_is_kept() {
        let line = r#"{"id": 1, "text": "a\nb", "more": [{"text": 2}], "messages": [1], "tools": null, "documents": 2}"#;
        let expected = Fields {
            text: Some(Text::Is("a\nb".into())),
            messages: Some(Messages::Are(json!([1]))),
            beside: [Some(Value::Null), Some(json!(2)), None],
            ..Fields::default()
        };
        assert_eq!(read(line), Ok(expected));
        for other in ["1", "-1", "1.5", "null", "true", "[\"a\"]", "{\"a\": []}"] {
            let fields = read(&format!("{{\"text\": {other}}}")).unwrap();
            assert_eq!(fields, Fields { text: Some(Text::IsNot), ..Fields::default() }, "{other}");
            if !other.starts_with('{') {
                assert_eq!(read(other).unwrap_err(), "not a JSON object");
            }
        }
        assert_eq!(read("\"text\"").unwrap_err(), "not a JSON object");
        assert_eq!(read("{}"), Ok(Fields::default()));
    }

    #[test]
    fn a_long_conversation_is_not_looked_at() {
        let line = format!("{{\"messages\": [\"{}\"]}}", "x".repeat(200));
        assert_eq!(read(&line).unwrap().messages, Some(Messages::TooLong));
        let line = format!("{{\"instruction\": \"a\", \"output\": \"{}\"}}", "x".repeat(200));
        let unread = ["instruction", "output"].map(|key| (key.to_owned(), None));
        assert_eq!(read(&line).unwrap().instruction, unread.into());
    }

    #[test]
    fn what_is_no_json_is_told() {
        for line in ["{", "{\"text\": \"a\"} 1", "{\"text\": \"a\", }", "{1: 2}", "\u{0}"] {
            assert!(read(line).is_err(), "{line}");
        }
        let deep = "[".repeat(100_000);
        for line in [format!("{{\"a\": {deep}"), format!("{{\"messages\": {deep}"), deep] {
            assert!(read(&line).is_err());
        }
    }
}
