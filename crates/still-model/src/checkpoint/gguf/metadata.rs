//! Values of GGUF's metadata, each of the type that it should have.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};

use crate::error::{ModelError, Result};

/// Typed access to a file's metadata. A key that is there with another type or out of range is an error that names it.
#[derive(Clone, Copy)]
pub(crate) struct Metadata<'a> {
    path: &'a Path,
    entries: &'a HashMap<String, Value>,
}

impl<'a> Metadata<'a> {
    pub fn new(path: &'a Path, content: &'a Content) -> Self {
        Self { path, entries: &content.metadata }
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.entries.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, other, "a text")),
        }
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.entries.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    /// A finite number with a fraction.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        let number = match value {
            Value::F32(number) => f64::from(*number),
            Value::F64(number) => *number,
            other => return Err(self.wrong(key, other, "a floating-point number")),
        };
        match number.is_finite() {
            true => Ok(Some(number)),
            false => Err(self.wrong(key, value, "a finite number")),
        }
    }

    /// A whole number in `range`, of whatever integer type.
    pub fn integer(&self, key: &str, range: RangeInclusive<u32>) -> Result<Option<u32>> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        match whole(value).and_then(|n| u32::try_from(n).ok()).filter(|n| range.contains(n)) {
            Some(number) => Ok(Some(number)),
            None => {
                let (least, most) = range.into_inner();
                let expected = match most {
                    u32::MAX => format!("a whole number from {least}"),
                    _ => format!("a whole number from {least} to {most}"),
                };
                Err(self.wrong(key, value, &expected))
            }
        }
    }

    /// A size: a whole number above 0.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.integer(key, 1..=u32::MAX)?.map(|number| number as usize))
    }

    /// A size that may be given for each of `layers` layers, if it is the same for all.
    pub fn size_of_layers(&self, key: &str, layers: usize) -> Result<Option<usize>> {
        let Some(Value::Array(values)) = self.entries.get(key) else { return self.size(key) };
        let wrong = |what| ModelError::corrupt(self.path, format!("{key} is {what}"));
        if values.len() != layers {
            let count = values.len();
            return Err(wrong(format!("an array of {count} for a model of {layers} layers")));
        }
        let mut sizes = values.iter().map(|value| {
            let size = whole(value).and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0);
            size.ok_or_else(|| wrong(format!("an array with {}", shown(value))))
        });
        let Some(first) = sizes.next().transpose()? else { return Ok(None) };
        for size in sizes {
            if size? != first {
                return Err(super::unsupported(
                    self.path,
                    format!("a model whose layers differ in {key}"),
                    "all layers must have the same heads and widths: use another model",
                ));
            }
        }
        Ok(Some(first as usize))
    }

    /// True or false for each of `layers` layers; `None` unless it is an array.
    pub fn flags(&self, key: &str, layers: usize) -> Result<Option<Vec<bool>>> {
        let Some(Value::Array(values)) = self.entries.get(key) else { return Ok(None) };
        let flag = |value: &Value| match value {
            Value::Bool(flag) => Some(*flag),
            other => whole(other).filter(|n| (0..=1).contains(n)).map(|n| n == 1),
        };
        match values.iter().map(flag).collect::<Option<Vec<bool>>>() {
            Some(flags) if flags.len() == layers => Ok(Some(flags)),
            _ => {
                Err(self
                    .refuse(key, &format!("expected true or false for each of {layers} layers")))
            }
        }
    }

    /// How many elements an array of texts has.
    pub fn texts(&self, key: &str) -> Result<Option<usize>> {
        match self.entries.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => {
                match values.iter().find(|value| !matches!(value, Value::String(_))) {
                    None => Ok(Some(values.len())),
                    Some(other) => Err(self.wrong(key, other, "an array of texts")),
                }
            }
            Some(other) => Err(self.wrong(key, other, "an array of texts")),
        }
    }

    /// `value`, or an error that the key is missing.
    pub fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| ModelError::corrupt(self.path, format!("{key} is missing")))
    }

    /// An error about a key's value.
    pub fn refuse(&self, key: &str, reason: &str) -> ModelError {
        let value = self.entries.get(key).map(shown).unwrap_or_default();
        ModelError::corrupt(self.path, format!("{key} is {value}: {reason}"))
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> ModelError {
        ModelError::corrupt(self.path, format!("{key} is {}, expected {expected}", shown(value)))
    }
}

fn whole(value: &Value) -> Option<i128> {
    Some(match value {
        Value::U8(n) => i128::from(*n),
        Value::I8(n) => i128::from(*n),
        Value::U16(n) => i128::from(*n),
        Value::I16(n) => i128::from(*n),
        Value::U32(n) => i128::from(*n),
        Value::I32(n) => i128::from(*n),
        Value::U64(n) => i128::from(*n),
        Value::I64(n) => i128::from(*n),
        Value::F32(_) | Value::F64(_) | Value::Bool(_) | Value::String(_) | Value::Array(_) => {
            return None;
        }
    })
}

/// A value in a message, cut where it is long.
fn shown(value: &Value) -> String {
    match value {
        Value::Bool(flag) => flag.to_string(),
        Value::F32(number) => format!("{number:?}"),
        Value::F64(number) => format!("{number:?}"),
        Value::String(text) => format!("the text {:?}", text.chars().take(40).collect::<String>()),
        Value::Array(values) => format!("an array of {}", values.len()),
        other => whole(other).map(|number| number.to_string()).unwrap_or_default(),
    }
}
