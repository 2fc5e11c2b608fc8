//! `str.format`.

use super::args::CallArgs;
use super::format_spec::format_value;
use super::sequence::{attribute, item};
use super::text::{to_str, write_repr};
use super::value::Value;
use crate::error::{Result, type_error};
use crate::meter::Meter;

/// A field, and fields in its format.
const LEVELS: usize = 3;

/// `template.format(…)`.
pub(crate) fn format(template: &str, args: CallArgs, meter: &Meter) -> Result<String> {
    let mut automatic = 0;
    fill(template, &args, &mut automatic, LEVELS, meter)
}

fn fill(
    template: &str,
    args: &CallArgs,
    automatic: &mut usize,
    levels: usize,
    meter: &Meter,
) -> Result<String> {
    if levels == 0 {
        return Err(type_error("Max string recursion exceeded"));
    }
    let mut out = String::new();
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = after;
            continue;
        }
        if brace == "}" {
            return Err(type_error("Single '}' encountered in format string"));
        }
        let mut open = 1;
        let end = rest.find(|c| {
            match c {
                '{' => open += 1,
                '}' => open -= 1,
                _ => {}
            }
            open == 0
        });
        let Some(end) = end else {
            return Err(type_error("expected '}' before end of string"));
        };
        let field = &rest[..end];
        rest = &rest[end + 1..];
        let (name, spec) = field.split_once(':').unwrap_or((field, ""));
        let (name, conversion) = name.split_once('!').unwrap_or((name, ""));
        let value = lookup(name, args, automatic, meter)?;
        let spec = fill(spec, args, automatic, levels - 1, meter)?;
        let text = match conversion {
            "" => format_value(&value, &spec, meter)?,
            "s" => format_value(&Value::str(to_str(&value, meter)?), &spec, meter)?,
            "r" | "a" => {
                let mut text = String::new();
                write_repr(&value, &mut text, meter)?;
                format_value(&Value::str(text), &spec, meter)?
            }
            other => return Err(type_error(format!("Unknown conversion specifier '{other}'"))),
        };
        meter.bytes(text.len())?;
        out.push_str(&text);
    }
    out.push_str(rest);
    Ok(out)
}

/// `0`, `name`, `0.attribute`, `name[key]`.
fn lookup(field: &str, args: &CallArgs, automatic: &mut usize, meter: &Meter) -> Result<Value> {
    let end = field.find(['.', '[']).unwrap_or(field.len());
    let (first, mut path) = field.split_at(end);
    let found = if first.is_empty() {
        *automatic += 1;
        args.positional.get(*automatic - 1)
    } else if let Ok(place) = first.parse::<usize>() {
        args.positional.get(place)
    } else {
        let named = args.keywords.iter().find(|(name, _)| name == first);
        let Some((_, value)) = named else {
            return Err(type_error(format!("str.format got no argument named '{first}'")));
        };
        Some(value)
    };
    let missing = "Replacement index out of range for positional args tuple";
    let mut value = found.cloned().ok_or_else(|| type_error(missing))?;
    while !path.is_empty() {
        if let Some(rest) = path.strip_prefix('.') {
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            value = attribute(&value, &rest[..end], meter)?;
            path = &rest[end..];
        } else {
            let rest = path.strip_prefix('[').unwrap_or(path);
            let Some((key, rest)) = rest.split_once(']') else {
                return Err(type_error("Missing ']' in format string"));
            };
            let key = match key.parse::<i128>() {
                Ok(place) => Value::Int(place),
                Err(_) => Value::str(key),
            };
            value = item(&value, &key, meter)?;
            path = rest;
        }
    }
    Ok(value)
}
