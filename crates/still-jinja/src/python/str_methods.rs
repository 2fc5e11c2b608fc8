//! Methods of `str`.

use std::sync::Arc;

use super::args::{CallArgs, bounds, integer, integer_or, is_true, no_method, required, text};
use super::format::format;
use super::is_space;
use super::sequence::iterate;
use super::strings::{
    has_case, is_cased, is_decimal, is_letter_number, is_super_digit, pad, replace, rsplit_spaces,
    split_lines, split_spaces, title, upper_first,
};
use super::value::Value;
use crate::error::{Result, type_error};
use crate::meter::Meter;

pub(crate) const STR_METHODS: &[&str] = &[
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];

/// `receiver.name(…)`.
pub(super) fn str_method(
    receiver: &Arc<str>,
    name: &str,
    args: CallArgs,
    meter: &Meter,
) -> Result<Value> {
    match name {
        "format" => Ok(Value::str(format(receiver, args, meter)?)),
        "format_map" => format_map(receiver, args, meter),
        "split" | "rsplit" => split(receiver, name, args, meter),
        "splitlines" => {
            let [keep] = args.bind(name, ["keepends"])?;
            list(split_lines(receiver, is_true(&keep)), meter)
        }
        "partition" | "rpartition" => partition(receiver, name, args, meter),
        "strip" | "lstrip" | "rstrip" => strip(receiver, name, args),
        "startswith" | "endswith" => has_affix(receiver, name, args),
        "removeprefix" | "removesuffix" => {
            let [affix] = args.places(name)?;
            let affix = required(affix, name, "prefix")?;
            let affix = text(&affix, name)?;
            let rest = match name {
                "removeprefix" => receiver.strip_prefix(affix),
                _ => receiver.strip_suffix(affix),
            };
            Ok(Value::str(rest.unwrap_or(receiver)))
        }
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let (old, new) = (required(old, name, "old")?, required(new, name, "new")?);
            let count = integer_or(count.as_ref(), -1)?;
            let (old, new) = (text(&old, name)?, text(&new, name)?);
            Ok(Value::str(replace(receiver, old, new, count, meter)?))
        }
        "count" | "find" | "rfind" | "index" | "rindex" => find(receiver, name, args),
        "join" => join(receiver, args, meter),
        "center" | "ljust" | "rjust" => justify(receiver, name, args, meter),
        "zfill" => zfill(receiver, args, meter),
        "expandtabs" => expand_tabs(receiver, args, meter),
        "encode" | "translate" => Err(no_method(&Value::Str(receiver.clone()), name)),
        _ => {
            let [] = args.places(name)?;
            plain(receiver, name)
        }
    }
}

/// Methods without arguments.
fn plain(receiver: &Arc<str>, name: &str) -> Result<Value> {
    let all = |test: fn(char) -> bool| !receiver.is_empty() && receiver.chars().all(test);
    Ok(match name {
        "upper" => Value::str(receiver.to_uppercase()),
        "lower" => Value::str(receiver.to_lowercase()),
        "casefold" => {
            // Lower case of upper case is what full folding is, but for a few scripts without cases.
            let fold = |c: char| c.to_uppercase().flat_map(char::to_lowercase);
            Value::str(receiver.chars().flat_map(fold).collect::<String>())
        }
        "capitalize" => Value::str(upper_first(receiver)),
        "title" => Value::str(title(receiver)),
        "swapcase" => {
            let swap = |c: char| -> String {
                match c.is_uppercase() {
                    true => c.to_lowercase().collect(),
                    false => c.to_uppercase().collect(),
                }
            };
            Value::str(receiver.chars().map(swap).collect::<String>())
        }
        "isalpha" => Value::Bool(all(|c| c.is_alphabetic() && !is_letter_number(c))),
        "isalnum" => Value::Bool(all(char::is_alphanumeric)),
        "isascii" => Value::Bool(receiver.is_ascii()),
        "isdecimal" => Value::Bool(all(is_decimal)),
        "isdigit" => Value::Bool(all(|c| is_decimal(c) || is_super_digit(c))),
        "isnumeric" => Value::Bool(all(char::is_numeric)),
        "isspace" => Value::Bool(all(is_space)),
        "isprintable" => Value::Bool(receiver.chars().all(super::text::is_printable)),
        "isidentifier" => Value::Bool(
            receiver
                .chars()
                .enumerate()
                .all(|(n, c)| c == '_' || c.is_alphabetic() || (n > 0 && c.is_alphanumeric()))
                && !receiver.is_empty(),
        ),
        "islower" | "isupper" => Value::Bool(has_case(receiver, name == "isupper")),
        "istitle" => {
            let cased = receiver.chars().any(is_cased);
            Value::Bool(cased && title(receiver) == **receiver)
        }
        _ => return Err(no_method(&Value::Str(receiver.clone()), name)),
    })
}

/// `format` with the entries of a mapping.
fn format_map(receiver: &str, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [mapping] = args.places("format_map")?;
    let Some(Value::Dict(dict)) = &mapping else {
        return Err(type_error("format_map needs a mapping"));
    };
    let named = dict
        .entries
        .iter()
        .filter_map(|(key, value)| Some((key.as_str()?.to_owned(), value.clone())));
    let args = CallArgs { positional: Vec::new(), keywords: named.collect() };
    Ok(Value::str(format(receiver, args, meter)?))
}

/// Between separators, or runs of spaces.
fn split(receiver: &str, name: &str, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [sep, most] = args.bind(name, ["sep", "maxsplit"])?;
    let most = usize::try_from(integer_or(most.as_ref(), -1)?).ok();
    let right = name == "rsplit";
    let sep = match &sep {
        None | Some(Value::None) => {
            let split = if right { rsplit_spaces } else { split_spaces };
            return list(split(receiver, most), meter);
        }
        Some(sep) => text(sep, name)?,
    };
    if sep.is_empty() {
        return Err(type_error("empty separator"));
    }
    let mut parts: Vec<&str> = match (most, right) {
        (None, _) => receiver.split(sep).collect(),
        (Some(most), false) => receiver.splitn(most.saturating_add(1), sep).collect(),
        (Some(most), true) => receiver.rsplitn(most.saturating_add(1), sep).collect(),
    };
    if right && most.is_some() {
        parts.reverse();
    }
    list(parts, meter)
}

/// A list of texts.
fn list(parts: Vec<&str>, meter: &Meter) -> Result<Value> {
    meter.elements(parts.len())?;
    Value::list(parts.into_iter().map(Value::str).collect(), meter)
}

/// What is before the separator, it, and what is after.
fn partition(receiver: &str, name: &str, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [sep] = args.places(name)?;
    let sep = required(sep, name, "sep")?;
    let sep = text(&sep, name)?;
    if sep.is_empty() {
        return Err(type_error("empty separator"));
    }
    let (found, rest) = match name {
        "partition" => (receiver.split_once(sep), [receiver, "", ""]),
        _ => (receiver.rsplit_once(sep), ["", "", receiver]),
    };
    let parts = match found {
        Some((before, after)) => [before, sep, after],
        None => rest,
    };
    Value::tuple(parts.map(Value::str).to_vec(), meter)
}

/// Without spaces, or the characters given, at its ends.
fn strip(receiver: &str, name: &str, args: CallArgs) -> Result<Value> {
    let [chars] = args.places(name)?;
    let chars = match &chars {
        None | Some(Value::None) => None,
        Some(chars) => Some(text(chars, name)?),
    };
    let drops = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    Ok(Value::str(match name {
        "strip" => receiver.trim_matches(drops),
        "lstrip" => receiver.trim_start_matches(drops),
        _ => receiver.trim_end_matches(drops),
    }))
}

/// Whether it starts or ends with a text, or any of a tuple.
fn has_affix(receiver: &str, name: &str, args: CallArgs) -> Result<Value> {
    let [affix, start, stop] = args.places(name)?;
    let affix = required(affix, name, "prefix")?;
    let Some((_, part)) = within(receiver, &start, &stop)? else {
        return Ok(Value::Bool(false));
    };
    let has = |affix: &Value| -> Result<bool> {
        let affix = text(affix, name)?;
        Ok(if name == "startswith" { part.starts_with(affix) } else { part.ends_with(affix) })
    };
    let mut found = false;
    match &affix {
        Value::Tuple(list) => {
            for affix in &list.items {
                found |= has(affix)?;
            }
        }
        affix => found = has(affix)?,
    }
    Ok(Value::Bool(found))
}

/// Where a text is in it, or how often.
fn find(receiver: &str, name: &str, args: CallArgs) -> Result<Value> {
    let [part, start, stop] = args.places(name)?;
    let part = required(part, name, "sub")?;
    let part = text(&part, name)?;
    let area = within(receiver, &start, &stop)?;
    if name == "count" {
        let count = |(_, area): (usize, &str)| match part.is_empty() {
            true => area.chars().count() + 1,
            false => area.matches(part).count(),
        };
        return Ok(Value::Int(area.map_or(0, count) as i128));
    }
    let find = |(from, area): (usize, &str)| {
        let at = match name {
            "find" | "index" => area.find(part),
            _ => area.rfind(part),
        }?;
        Some((from + area[..at].chars().count()) as i128)
    };
    match (area.and_then(find), name) {
        (Some(at), _) => Ok(Value::Int(at)),
        (None, "find" | "rfind") => Ok(Value::Int(-1)),
        (None, _) => Err(type_error("substring not found")),
    }
}

/// Texts with it between them.
fn join(receiver: &str, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [items] = args.places("join")?;
    let items = iterate(&required(items, "join", "iterable")?, meter)?;
    let mut joined = String::new();
    for (n, item) in items.items.iter().enumerate() {
        let Some(item) = item.as_str() else {
            let found = item.type_name();
            return Err(type_error(format!(
                "sequence item {n}: expected str instance, {found} found"
            )));
        };
        meter.bytes(item.len() + receiver.len() + 8)?;
        if n > 0 {
            joined.push_str(receiver);
        }
        joined.push_str(item);
    }
    Ok(Value::str(joined))
}

/// Filled to a width.
fn justify(receiver: &str, name: &str, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [width, fill] = args.places(name)?;
    let width = integer(&required(width, name, "width")?)?;
    let fill = match &fill {
        None => ' ',
        Some(fill) => {
            let mut chars = text(fill, name)?.chars();
            match (chars.next(), chars.next()) {
                (Some(fill), None) => fill,
                _ => return Err(type_error("The fill character must be one character")),
            }
        }
    };
    Ok(Value::str(pad(receiver, width, fill, name, meter)?))
}

/// Zeros between a sign and the rest.
fn zfill(receiver: &str, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [width] = args.places("zfill")?;
    let width = integer(&required(width, "zfill", "width")?)?;
    let (sign, digits) = match receiver.chars().next() {
        Some(sign @ ('+' | '-')) => (sign.to_string(), &receiver[1..]),
        _ => (String::new(), receiver),
    };
    let filled = pad(digits, width.saturating_sub(sign.len() as i128), '0', "rjust", meter)?;
    Ok(Value::str(sign + &filled))
}

/// Spaces up to the next column for each tab.
fn expand_tabs(receiver: &str, args: CallArgs, meter: &Meter) -> Result<Value> {
    let [size] = args.bind("expandtabs", ["tabsize"])?;
    let size = integer_or(size.as_ref(), 8)?.clamp(0, 1 << 20) as usize;
    let mut out = String::new();
    let mut column = 0;
    for c in receiver.chars() {
        match c {
            '\t' => {
                let spaces = if size > 0 { size - column % size } else { 0 };
                meter.bytes(spaces)?;
                out.extend(std::iter::repeat_n(' ', spaces));
                column += spaces;
            }
            c => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(Value::str(out))
}

/// The bytes of a text between two characters, for the methods that take bounds; `None` if they are the wrong way round.
fn within<'a>(
    receiver: &'a str,
    start: &Option<Value>,
    stop: &Option<Value>,
) -> Result<Option<(usize, &'a str)>> {
    if start.is_none() && stop.is_none() {
        return Ok(Some((0, receiver)));
    }
    let length = receiver.chars().count();
    let beyond = integer_or(start.as_ref(), 0)? > length as i128;
    let (from, to) = bounds(start, stop, length)?;
    if from > to || beyond {
        return Ok(None);
    }
    let byte = |at: usize| receiver.char_indices().nth(at).map_or(receiver.len(), |(at, _)| at);
    Ok(Some((from, &receiver[byte(from)..byte(to)])))
}
