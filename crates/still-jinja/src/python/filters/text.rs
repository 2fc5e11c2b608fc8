//! Filters of text.

use super::{
    CallArgs, Meter, Result, Value, integer_or, is_true, iterate, length, numbers, pairs, required,
    to_str, type_error,
};
use crate::ast::MathOp;
use crate::python::args::text;
use crate::python::is_space;
use crate::python::methods;
use crate::python::operators::math;
use crate::python::strings::{escape, pad, replace, split_lines, upper_first};

pub(super) fn filter(name: &str, value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let string = || to_str(value, meter);
    Ok(match name {
        "string" => Value::str(string()?),
        "safe" => Value::Markup(string()?.into()),
        "e" | "escape" if matches!(value, Value::Markup(_)) => value.clone(),
        "e" | "escape" | "forceescape" => Value::Markup(escape(&string()?, meter)?.into()),
        "upper" => Value::str(string()?.to_uppercase()),
        "lower" => Value::str(string()?.to_lowercase()),
        "capitalize" => Value::str(upper_first(&string()?)),
        "title" => Value::str(title(&string()?)),
        "trim" => {
            let [chars] = args.bind(name, ["chars"])?;
            let chars = chars.filter(|chars| !matches!(chars, Value::None));
            let args = CallArgs { positional: chars.into_iter().collect(), keywords: Vec::new() };
            methods::call(&Value::str(string()?), "strip", args, meter)?
        }
        "center" => {
            let [width] = args.bind(name, ["width"])?;
            let width = integer_or(width.as_ref(), 80)?;
            Value::str(pad(&string()?, width, ' ', "center", meter)?)
        }
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let old = to_str(&required(old, name, "old")?, meter)?;
            let new = to_str(&required(new, name, "new")?, meter)?;
            let count = integer_or(count.as_ref(), -1)?;
            Value::str(replace(&string()?, &old, &new, count, meter)?)
        }
        "format" => format(value, args, meter)?,
        "indent" => indent(value.used()?, args, meter)?,
        "truncate" => truncate(value, args, meter)?,
        "wordcount" => {
            let text = string()?;
            let word = |c: char| c == '_' || c.is_alphanumeric();
            Value::Int(text.split(|c| !word(c)).filter(|part| !part.is_empty()).count() as i128)
        }
        "striptags" => Value::str(strip_tags(&string()?)),
        "urlencode" => Value::str(urlencode(value, meter)?),
        _ => return numbers::filter(name, value, args, meter),
    })
}

/// `value % arguments`.
fn format(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let values = match (args.positional.is_empty(), args.keywords.is_empty()) {
        (false, false) => {
            let what = "can't handle positional and keyword arguments at the same time";
            return Err(type_error(what));
        }
        (true, false) => {
            let pair = |(key, value)| (Value::str(String::as_str(&key)), value);
            Value::dict(args.keywords.into_iter().map(pair).collect(), meter)?
        }
        _ => Value::tuple(args.positional, meter)?,
    };
    let format = match value {
        Value::Markup(_) => value.clone(),
        value => Value::str(to_str(value, meter)?),
    };
    math(MathOp::Mod, &format, &values, meter)
}

/// The `title` filter, which is not `str.title`: words begin after these characters only.
pub(super) fn title(text: &str) -> String {
    let splits = |c: char| is_space(c) || "-({[<".contains(c);
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if splits(c) {
            out.push(c);
            inside = false;
        } else if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
            inside = true;
        }
    }
    out
}

pub(super) fn strip_tags(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('<') {
        kept.push_str(&rest[..at]);
        let end = if rest[at..].starts_with("<!--") { "-->" } else { ">" };
        match rest[at..].find(end) {
            Some(close) => rest = &rest[at + close + end.len()..],
            None => {
                kept.push_str(&rest[at..]);
                rest = "";
            }
        }
    }
    kept.push_str(rest);
    kept.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

pub(super) fn urlencode(value: &Value, meter: &Meter) -> Result<String> {
    let quote = |text: &str, out: &mut String, slash: bool| {
        for byte in text.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                    out.push(byte.into());
                }
                b'/' if slash => out.push('/'),
                byte => out.push_str(&format!("%{byte:02X}")),
            }
        }
    };
    let mut out = String::new();
    let listed = match value {
        Value::Dict(_) => pairs(value, meter)?,
        Value::List(list) | Value::Tuple(list) => list.items.clone(),
        other => {
            let text = to_str(other, meter)?;
            meter.bytes(3 * text.len())?;
            quote(&text, &mut out, true);
            return Ok(out);
        }
    };
    for (n, pair) in listed.iter().enumerate() {
        let pair = iterate(pair, meter)?;
        let [key, value] = &pair.items[..] else {
            return Err(type_error("urlencode needs pairs"));
        };
        if n > 0 {
            out.push('&');
        }
        for (end, part) in [("=", key), ("", value)] {
            let text = to_str(part, meter)?;
            meter.bytes(3 * text.len())?;
            let start = out.len();
            quote(&text, &mut out, false);
            let encoded = out[start..].replace("%20", "+");
            out.truncate(start);
            out.push_str(&encoded);
            out.push_str(end);
        }
    }
    Ok(out)
}

pub(super) fn indent(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [width, first, blank] = args.bind("indent", ["width", "first", "blank"])?;
    let (Value::Str(text) | Value::Markup(text)) = value else {
        let name = value.type_name();
        return Err(type_error(format!("can only indent a str, not '{name}'")));
    };
    let indention = match &width {
        Some(Value::Str(text) | Value::Markup(text)) => text.to_string(),
        width => {
            let width = usize::try_from(integer_or(width.as_ref(), 4)?).unwrap_or(0);
            meter.bytes(width)?;
            " ".repeat(width)
        }
    };
    let text = format!("{text}\n");
    let lines = split_lines(&text, false);
    meter.bytes(text.len().saturating_add(lines.len().saturating_mul(indention.len())))?;
    let mut out = String::new();
    for (n, line) in lines.iter().enumerate() {
        if n > 0 {
            out.push('\n');
        }
        let indents = match n {
            0 => is_true(&first),
            _ => is_true(&blank) || !line.is_empty(),
        };
        if indents {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(Value::str(out))
}

pub(super) fn truncate(value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let names = ["length", "killwords", "end", "leeway"];
    let [most, kill, end, leeway] = args.bind("truncate", names)?;
    let end = end.unwrap_or_else(|| Value::str("..."));
    let end = text(&end, "truncate")?;
    let most = usize::try_from(integer_or(most.as_ref(), 255)?).unwrap_or(0);
    let leeway = usize::try_from(integer_or(leeway.as_ref(), 5)?).unwrap_or(0);
    let end_length = end.chars().count();
    if most < end_length {
        return Err(type_error(format!("expected length >= {end_length}, got {most}")));
    }
    // Anything short passes, text or not.
    if length(value, meter)? <= most.saturating_add(leeway) {
        return Ok(value.clone());
    }
    let text = text(value, "truncate")?;
    let kept: String = text.chars().take(most - end_length).collect();
    let kept = match is_true(&kill) {
        true => &*kept,
        false => kept.rsplit_once(' ').map_or(&*kept, |(before, _)| before),
    };
    Ok(Value::str(format!("{kept}{end}")))
}
