//! `json.dumps`, which `tojson` is in transformers.

use std::fmt::Write;

use super::args::{CallArgs, required, text};
use super::number::float_repr;
use super::operators::order;
use super::value::Value;
use crate::error::{Error, Result, type_error};
use crate::meter::Meter;

struct Style {
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sorted: bool,
}

/// `tojson(value, ensure_ascii, indent, separators, sort_keys)`.
pub(crate) fn tojson(value: &Value, args: CallArgs, meter: &Meter) -> Result<String> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ascii, indent, separators, sorted] = args.bind("tojson", names)?;
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text) | Value::Markup(text)) => Some(text.to_string()),
        Some(other) => {
            let width = super::args::integer(&other)?.clamp(0, 1000);
            Some(" ".repeat(width as usize))
        }
    };
    let (item, key) = match separators {
        None | Some(Value::None) => {
            (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned())
        }
        Some(pair) => {
            let pair = super::sequence::iterate(&pair, meter)?;
            let part = |n: usize| -> Result<String> {
                let part = required(pair.items.get(n).cloned(), "tojson", "separators")?;
                text(&part, "tojson").map(str::to_owned)
            };
            (part(0)?, part(1)?)
        }
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let style = Style { ascii: is_true(ascii), indent, item, key, sorted: is_true(sorted) };
    let mut out = String::new();
    write(value, &style, 0, &mut out, meter)?;
    Ok(out)
}

fn write(
    value: &Value,
    style: &Style,
    level: usize,
    out: &mut String,
    meter: &Meter,
) -> Result<()> {
    meter.steps(1)?;
    match value {
        Value::None => out.push_str("null"),
        Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Value::Int(value) => {
            let _ = write!(out, "{value}");
        }
        Value::Float(value) => out.push_str(&float(*value)),
        Value::Str(text) | Value::Markup(text) => {
            meter.bytes(text.len())?;
            quote(text, style.ascii, out);
        }
        Value::List(list) | Value::Tuple(list) => {
            if list.items.is_empty() {
                out.push_str("[]");
                return Ok(());
            }
            out.push('[');
            for (n, item) in list.items.iter().enumerate() {
                separate(n, style, level + 1, out, meter)?;
                write(item, style, level + 1, out, meter)?;
            }
            end(style, level, out, meter)?;
            out.push(']');
        }
        Value::Dict(dict) => {
            if dict.entries.is_empty() {
                out.push_str("{}");
                return Ok(());
            }
            let mut entries: Vec<_> = dict.entries.iter().collect();
            if style.sorted {
                sort_entries(&mut entries, meter)?;
            }
            out.push('{');
            for (n, (key, value)) in entries.into_iter().enumerate() {
                separate(n, style, level + 1, out, meter)?;
                let key = match key {
                    Value::Str(key) | Value::Markup(key) => key.to_string(),
                    Value::Int(key) => key.to_string(),
                    Value::Float(key) => float(*key),
                    Value::Bool(key) => key.to_string(),
                    Value::None => "null".into(),
                    other => {
                        let name = other.type_name();
                        return Err(type_error(format!(
                            "keys must be str, int, float, bool or None, not {name}"
                        )));
                    }
                };
                quote(&key, style.ascii, out);
                out.push_str(&style.key);
                write(value, style, level + 1, out, meter)?;
            }
            end(style, level, out, meter)?;
            out.push('}');
        }
        other => {
            let name = other.type_name();
            let detail = match other {
                Value::Undefined(missing) => format!(" ({})", missing.message),
                _ => String::new(),
            };
            return Err(type_error(format!(
                "Object of type {name} is not JSON serializable{detail}"
            )));
        }
    }
    Ok(())
}

fn sort_entries(entries: &mut [&(Value, Value)], meter: &Meter) -> Result<()> {
    let mut failed: Option<Error> = None;
    entries.sort_by(|a, b| match order(&a.0, &b.0, "<", meter) {
        Ok(ordering) => ordering.unwrap_or(std::cmp::Ordering::Equal),
        Err(error) => {
            failed.get_or_insert(error);
            std::cmp::Ordering::Equal
        }
    });
    failed.map_or(Ok(()), Err)
}

fn line(style: &Style, level: usize, out: &mut String, meter: &Meter) -> Result<()> {
    if let Some(indent) = &style.indent {
        meter.bytes(level * indent.len() + 1)?;
        out.push('\n');
        for _ in 0..level {
            out.push_str(indent);
        }
    }
    Ok(())
}

fn separate(n: usize, style: &Style, level: usize, out: &mut String, meter: &Meter) -> Result<()> {
    if n > 0 {
        meter.bytes(style.item.len() + style.key.len())?;
        out.push_str(&style.item);
    }
    line(style, level, out, meter)
}

fn end(style: &Style, level: usize, out: &mut String, meter: &Meter) -> Result<()> {
    line(style, level, out, meter)
}

fn float(value: f64) -> String {
    if value.is_nan() {
        "NaN".into()
    } else if value.is_infinite() {
        if value > 0.0 { "Infinity".into() } else { "-Infinity".into() }
    } else {
        float_repr(value)
    }
}

fn quote(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        let _ = match c {
            '"' => write!(out, "\\\""),
            '\\' => write!(out, "\\\\"),
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            '\x08' => write!(out, "\\b"),
            '\x0c' => write!(out, "\\f"),
            c if (c as u32) < 0x20 => write!(out, "\\u{:04x}", c as u32),
            c if ascii && !c.is_ascii() => {
                let mut units = [0; 2];
                c.encode_utf16(&mut units).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"))
            }
            c => {
                out.push(c);
                Ok(())
            }
        };
    }
    out.push('"');
}
