//! `str` and `repr`.

use std::fmt::Write;
use std::rc::Rc;

use super::number::float_repr;
use super::value::{Function, List, Object, Value};
use crate::error::Result;
use crate::meter::Meter;

/// `str(value)`, appended.
pub(crate) fn write_str(value: &Value, out: &mut String, meter: &Meter) -> Result<()> {
    match value {
        Value::Undefined(_) => Ok(()),
        Value::Str(text) | Value::Markup(text) => {
            meter.bytes(text.len())?;
            out.push_str(text);
            Ok(())
        }
        other => write_repr(other, out, meter),
    }
}

/// `str(value)`.
pub(crate) fn to_str(value: &Value, meter: &Meter) -> Result<String> {
    let mut out = String::new();
    write_str(value, &mut out, meter)?;
    Ok(out)
}

/// `repr(value)`, appended.
pub(crate) fn write_repr(value: &Value, out: &mut String, meter: &Meter) -> Result<()> {
    meter.steps(1)?;
    match value {
        Value::Undefined(_) => out.push_str("Undefined"),
        Value::None => out.push_str("None"),
        Value::Bool(value) => out.push_str(if *value { "True" } else { "False" }),
        Value::Int(value) => {
            let _ = write!(out, "{value}");
        }
        Value::Float(value) => out.push_str(&float_repr(*value)),
        Value::Str(text) => {
            meter.bytes(text.len())?;
            quote(text, out);
        }
        Value::Markup(text) => {
            meter.bytes(text.len())?;
            out.push_str("Markup(");
            quote(text, out);
            out.push(')');
        }
        Value::List(list) => items(list, ["[", "]"], out, meter)?,
        Value::Tuple(list) if list.items.len() == 1 => items(list, ["(", ",)"], out, meter)?,
        Value::Tuple(list) => items(list, ["(", ")"], out, meter)?,
        Value::View(name, list) => {
            out.push_str(name);
            items(list, ["([", "])"], out, meter)?;
        }
        Value::Dict(dict) => {
            out.push('{');
            for (n, (key, value)) in dict.entries.iter().enumerate() {
                if n > 0 {
                    out.push_str(", ");
                }
                write_repr(key, out, meter)?;
                out.push_str(": ");
                write_repr(value, out, meter)?;
            }
            out.push('}');
        }
        Value::Range(range) => {
            let _ = match range.step {
                1 => write!(out, "range({}, {})", range.start, range.stop),
                step => write!(out, "range({}, {}, {step})", range.start, range.stop),
            };
        }
        Value::Iterator(_) => out.push_str("<generator object>"),
        Value::Function(function) => {
            let _ = write!(out, "<function {}>", function.name());
        }
        Value::Method(method) => {
            let of = method.0.type_name();
            let _ = write!(out, "<built-in method {} of {of} object>", method.1);
        }
        Value::Object(object) => out.push_str(match object {
            Object::Namespace(_) => "<Namespace>",
            Object::Macro(_) => "<Macro>",
            Object::Loop(_) => "<LoopContext>",
            Object::Cycler(_) => "<Cycler>",
            Object::Joiner(_) => "<Joiner>",
        }),
    }
    Ok(())
}

fn items(list: &Rc<List>, around: [&str; 2], out: &mut String, meter: &Meter) -> Result<()> {
    out.push_str(around[0]);
    for (n, item) in list.items.iter().enumerate() {
        if n > 0 {
            out.push_str(", ");
        }
        write_repr(item, out, meter)?;
    }
    out.push_str(around[1]);
    Ok(())
}

impl Function {
    pub fn name(self) -> &'static str {
        match self {
            Self::Range => "range",
            Self::Dict => "dict",
            Self::Namespace => "namespace",
            Self::Cycler => "cycler",
            Self::Joiner => "joiner",
            Self::RaiseException => "raise_exception",
            Self::StrftimeNow => "strftime_now",
        }
    }
}

/// A string as Python would spell it.
fn quote(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        let _ = match c {
            '\\' => write!(out, "\\\\"),
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            c if c == quote => write!(out, "\\{c}"),
            c if is_printable(c) => write!(out, "{c}"),
            c if (c as u32) < 0x100 => write!(out, "\\x{:02x}", c as u32),
            c if (c as u32) < 0x10000 => write!(out, "\\u{:04x}", c as u32),
            c => write!(out, "\\U{:08x}", c as u32),
        };
    }
    out.push(quote);
}

/// Near Python's `str.isprintable`: what Rust does not escape in a debug string, but for marks that it escapes because
/// they would join the character before.
pub(crate) fn is_printable(c: char) -> bool {
    match c {
        ' ' => true,
        '\'' | '"' | '\\' => true,
        c if c.is_control() => false,
        // Separators other than the space.
        c if c.is_whitespace() => false,
        // Format characters, surrogates' neighbors and private use.
        '\u{AD}' | '\u{600}'..='\u{605}' | '\u{61C}' | '\u{6DD}' | '\u{70F}' | '\u{180E}' => false,
        '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2060}'..='\u{206F}' => false,
        '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}' | '\u{E000}'..='\u{F8FF}' => false,
        '\u{E0001}' | '\u{E0020}'..='\u{E007F}' | '\u{F0000}'..='\u{10FFFF}' => false,
        // A mark alone is escaped as one that joins; after a letter it is not.
        c => {
            let mut escaped = c.escape_debug();
            escaped.len() == 1 || {
                let joined = format!("a{c}");
                escaped.next() == Some('\\') && format!("{joined:?}").len() == joined.len() + 2
            }
        }
    }
}
