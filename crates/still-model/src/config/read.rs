//! JSON values by type and range. A value of another type or range is an error that names its key, what was found and what
//! is expected: never the default. A `null` counts as absent, as it does in Hugging Face's files.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// What is shown of a value in an error, in characters.
const SHOWN: usize = 60;

/// A JSON object whose values are taken by type.
#[derive(Clone, Debug)]
pub(crate) struct Table<'a> {
    json: &'a Map<String, Value>,
    /// Its own key and a dot; empty for the outermost object.
    prefix: String,
}

impl<'a> Table<'a> {
    /// The outermost object of a file.
    ///
    /// # Errors
    /// Anything but an object.
    pub fn root(json: &'a Value) -> Result<Self> {
        match json {
            Value::Object(json) => Ok(Self { json, prefix: String::new() }),
            other => Err(ModelError::Invalid(format!(
                "the configuration is {}, expected a JSON object",
                shown(other)
            ))),
        }
    }

    /// The value of a key that is there and not null.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// Whether a key is there, be it null.
    pub fn mentions(&self, key: &str) -> bool {
        self.json.contains_key(key)
    }

    /// Every key that is there and not null.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.json.iter().filter(|(_, value)| !value.is_null()).map(|(key, _)| key.as_str())
    }

    /// A key's full name.
    pub fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The table's own name; empty for the outermost.
    pub fn name(&self) -> &str {
        self.prefix.trim_end_matches('.')
    }

    /// A whole number.
    pub fn size(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let size = |value: &Value| usize::try_from(value.as_u64()?).ok();
        self.get(
            key,
            |value| size(value).filter(|n| range.contains(n)),
            || expected("a whole number", &range),
        )
    }

    /// A number, whole or not.
    pub fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        self.get(
            key,
            |value| value.as_f64().filter(|x| range.contains(x)),
            || expected("a number", &range),
        )
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, Value::as_bool, || "true or false".into())
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key, Value::as_str, || "a string".into())
    }

    /// A table inside this one.
    pub fn table(&self, key: &str) -> Result<Option<Self>> {
        let json = self.get(key, Value::as_object, || "an object".into())?;
        Ok(json.map(|json| Self { json, prefix: format!("{}{key}.", self.prefix) }))
    }

    /// A list of strings.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.get(
            key,
            |value| value.as_array()?.iter().map(Value::as_str).collect(),
            || "a list of strings".into(),
        )
    }

    /// A list of whole numbers.
    pub fn sizes(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<Vec<usize>>> {
        let size =
            |value: &Value| usize::try_from(value.as_u64()?).ok().filter(|n| range.contains(n));
        self.get(
            key,
            |value| value.as_array()?.iter().map(size).collect(),
            || format!("a list, each {}", expected("a whole number", &range)),
        )
    }

    /// A list of numbers, whole or not.
    pub fn numbers(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<Vec<f64>>> {
        let number = |value: &Value| value.as_f64().filter(|x| range.contains(x));
        self.get(
            key,
            |value| value.as_array()?.iter().map(number).collect(),
            || format!("a list, each {}", expected("a number", &range)),
        )
    }

    /// A token id.
    pub fn id(&self, key: &str) -> Result<Option<u32>> {
        self.get(key, id, || format!("a token id from 0 to {}", u32::MAX))
    }

    /// Token ids: one, a list of them or none.
    pub fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let ids = |value: &Value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => Some(vec![id(one)?]),
        };
        let ids =
            self.get(key, ids, || format!("a token id from 0 to {}, or a list of them", u32::MAX))?;
        Ok(ids.unwrap_or_default())
    }

    /// The error of a value that is not what was expected.
    pub fn wrong(&self, key: &str, expected: impl Display) -> ModelError {
        let found = self.json.get(key).map_or_else(|| "missing".into(), shown);
        ModelError::Invalid(format!("\"{}\" is {found}, expected {expected}", self.path(key)))
    }

    /// The error of a key that has to be there.
    pub fn missing(&self, key: &str) -> ModelError {
        ModelError::Invalid(format!("the configuration has no \"{}\"", self.path(key)))
    }

    /// The error of a sound value that asks for what is not computed here.
    pub fn unsupported(&self, key: &str, hint: impl Into<String>) -> ModelError {
        let found = self.json.get(key).map_or_else(|| "missing".into(), shown);
        ModelError::Unsupported {
            what: format!("\"{}\": {found}", self.path(key)),
            found_in: None,
            hint: hint.into(),
        }
    }

    fn get<T>(
        &self,
        key: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
        expected: impl FnOnce() -> String,
    ) -> Result<Option<T>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.wrong(key, expected())),
            },
        }
    }
}

fn id(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

fn expected<T: Display + PartialOrd>(kind: &str, range: &RangeInclusive<T>) -> String {
    format!("{kind} from {} to {}", range.start(), range.end())
}

/// A value as JSON, cut if it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_of_another_type_or_range_is_named() {
        let json = json!({
            "size": -1, "float": 128.0, "text": "5", "huge": 18_446_744_073_709_551_615_u64, "null": null,
            "ids": [1, 4_294_967_296_u64], "inner": { "flag": "yes" }, "long": "x".repeat(100), "fine": 7,
        });
        let table = Table::root(&json).unwrap();
        let message = |error: ModelError| error.to_string();
        let size = |key: &str| table.size(key, 1..=9);
        assert_eq!(size("absent").unwrap(), None);
        assert_eq!(size("null").unwrap(), None);
        assert!(table.mentions("null") && !table.mentions("absent"));
        assert_eq!(size("fine").unwrap(), Some(7));
        for (key, found) in
            [("size", "-1"), ("float", "128.0"), ("text", "\"5\""), ("huge", "1844")]
        {
            let error = message(size(key).unwrap_err());
            assert!(error.starts_with(&format!("\"{key}\" is {found}")), "{error}");
            assert!(error.ends_with("expected a whole number from 1 to 9"), "{error}");
        }
        assert_eq!(table.number("float", 0.0..=200.0).unwrap(), Some(128.0));
        assert!(message(table.number("float", 0.0..=100.0).unwrap_err()).contains("from 0 to 100"));
        assert!(
            message(table.number("text", 0.0..=9.0).unwrap_err()).contains("\"text\" is \"5\"")
        );
        assert!(message(table.ids("ids").unwrap_err()).contains("4294967296"));
        assert!(message(table.ids("text").unwrap_err()).contains("token id"));
        assert_eq!(table.ids("fine").unwrap(), [7]);
        assert!(table.ids("null").unwrap().is_empty());
        let inner = table.table("inner").unwrap().unwrap();
        assert!(message(inner.flag("flag").unwrap_err()).starts_with("\"inner.flag\" is \"yes\""));
        assert!(message(table.table("text").unwrap_err()).contains("an object"));
        assert!(message(table.flag("long").unwrap_err()).len() < 140);
        for json in [json!([]), json!("x"), json!(null)] {
            assert!(message(Table::root(&json).unwrap_err()).contains("a JSON object"));
        }
    }
}
