//! Methods of `str`, `dict`, `list`, `tuple`, `range` and `float`.

use std::sync::Arc;

use super::args::{CallArgs, integer, integer_or, is_true, required, text};
use super::format::format;
use super::is_space;
use super::operators::{escaped, position};
use super::sequence::iterate;
use super::strings::{
    has_case, is_cased, is_decimal, is_letter_number, is_super_digit, pad, replace, rsplit_spaces,
    split_lines, split_spaces, title, upper_first,
};
use super::value::{Function, List, Value};
use crate::error::{Error, ErrorKind, Result, type_error};
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

/// Methods that marked text has from `str`: what they look for is not escaped.
const UNESCAPED: [&str; 10] = [
    "count",
    "endswith",
    "find",
    "index",
    "rfind",
    "rindex",
    "split",
    "rsplit",
    "splitlines",
    "startswith",
];

/// `on.name(…)`.
pub(crate) fn call(on: &Value, name: &str, args: CallArgs, meter: &Meter) -> Result<Value> {
    match on {
        Value::Str(receiver) => {
            meter.bytes(2 * receiver.len())?;
            str_method(receiver, name, args, meter)
        }
        Value::Markup(receiver) => {
            meter.bytes(2 * receiver.len())?;
            let escapes = !UNESCAPED.contains(&name);
            let one = |value: Value| if escapes { escaped(&value, meter) } else { Ok(value) };
            let named = |(name, value): (String, Value)| Ok((name, one(value)?));
            let args = CallArgs {
                positional: args.positional.into_iter().map(one).collect::<Result<_>>()?,
                keywords: args.keywords.into_iter().map(named).collect::<Result<_>>()?,
            };
            str_method(receiver, name, args, meter)?.marked(meter)
        }
        Value::Dict(dict) => {
            let view =
                |kind, items| -> Result<Value> { Ok(Value::View(kind, List::new(items, meter)?)) };
            match name {
                "get" => {
                    let [key, default] = args.places("get")?;
                    let key = required(key, "get", "key")?;
                    if !key.is_hashable() {
                        return Err(type_error(format!("unhashable type: '{}'", key.type_name())));
                    }
                    let found = dict.get(&key, meter)?.cloned();
                    Ok(found.or(default).unwrap_or(Value::None))
                }
                "keys" => {
                    let [] = args.places("keys")?;
                    view("dict_keys", dict.entries.iter().map(|(key, _)| key.clone()).collect())
                }
                "values" => {
                    let [] = args.places("values")?;
                    view("dict_values", dict.entries.iter().map(|(_, v)| v.clone()).collect())
                }
                "items" => {
                    let [] = args.places("items")?;
                    view("dict_items", pairs(on, meter)?)
                }
                "copy" => {
                    let [] = args.places("copy")?;
                    Ok(on.clone())
                }
                "fromkeys" => from_keys(args, meter),
                _ => Err(no_method(on, name)),
            }
        }
        Value::List(_) | Value::Tuple(_) | Value::Range(_) => {
            let list = iterate(on, meter)?;
            match name {
                "count" => {
                    let [item] = args.places("count")?;
                    let item = required(item, "count", "value")?;
                    let mut count = 0;
                    for known in &list.items {
                        count += i128::from(known.equals(&item, meter)?);
                    }
                    Ok(Value::Int(count))
                }
                "index" => {
                    let [item, start, stop] = args.places("index")?;
                    let item = required(item, "index", "value")?;
                    let (start, stop) = bounds(&start, &stop, list.items.len())?;
                    let part = list.items.get(start..stop).unwrap_or_default();
                    match position(part, &item, meter)? {
                        Some(at) => Ok(Value::Int((start + at) as i128)),
                        None => Err(type_error("value is not in the list")),
                    }
                }
                "copy" => Ok(on.clone()),
                _ => Err(no_method(on, name)),
            }
        }
        Value::Function(Function::Dict) if name == "fromkeys" => from_keys(args, meter),
        Value::Float(value) if name == "is_integer" => Ok(Value::Bool(value.fract() == 0.0)),
        _ => Err(no_method(on, name)),
    }
}

/// `dict.fromkeys`.
fn from_keys(args: CallArgs, meter: &Meter) -> Result<Value> {
    let [keys, value] = args.places("fromkeys")?;
    let keys = iterate(&required(keys, "fromkeys", "iterable")?, meter)?;
    let value = value.unwrap_or(Value::None);
    let pair = |key: &Value| (key.clone(), value.clone());
    Value::dict(keys.items.iter().map(pair).collect(), meter)
}

fn no_method(on: &Value, name: &str) -> Error {
    let what = format!("the method '{name}' of '{}'", on.type_name());
    Error::new(ErrorKind::Unsupported, format!("{what} is not supported"))
}

/// Key and value of each entry, as tuples.
pub(crate) fn pairs(dict: &Value, meter: &Meter) -> Result<Vec<Value>> {
    let Value::Dict(dict) = dict else {
        return Err(type_error("Can only get item pairs from a mapping."));
    };
    let pair =
        |(key, value): &(Value, Value)| Value::tuple(vec![key.clone(), value.clone()], meter);
    dict.entries.iter().map(pair).collect()
}

/// A slice's bounds within a length.
fn bounds(start: &Option<Value>, stop: &Option<Value>, length: usize) -> Result<(usize, usize)> {
    let length = length as i128;
    let place = |value: &Option<Value>, default| -> Result<usize> {
        let at = integer_or(value.as_ref(), default)?;
        let at = if at < 0 { at.saturating_add(length) } else { at };
        Ok(at.clamp(0, length) as usize)
    };
    Ok((place(start, 0)?, place(stop, length)?))
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

fn str_method(receiver: &Arc<str>, name: &str, args: CallArgs, meter: &Meter) -> Result<Value> {
    let string = |text: &str| Ok(Value::str(text));
    let strings = |parts: Vec<&str>| {
        meter.elements(parts.len())?;
        Value::list(parts.into_iter().map(Value::str).collect(), meter)
    };
    let tuple = |parts: [&str; 3]| Value::tuple(parts.map(Value::str).to_vec(), meter);
    let all = |test: fn(char) -> bool| !receiver.is_empty() && receiver.chars().all(test);
    Ok(match name {
        "format" => Value::str(format(receiver, args, meter)?),
        "format_map" => {
            let [mapping] = args.places(name)?;
            let Some(Value::Dict(dict)) = &mapping else {
                return Err(type_error("format_map needs a mapping"));
            };
            let named = dict
                .entries
                .iter()
                .filter_map(|(key, value)| Some((key.as_str()?.to_owned(), value.clone())));
            let args = CallArgs { positional: Vec::new(), keywords: named.collect() };
            Value::str(format(receiver, args, meter)?)
        }
        "split" | "rsplit" => {
            let [sep, most] = args.bind(name, ["sep", "maxsplit"])?;
            let most = usize::try_from(integer_or(most.as_ref(), -1)?).ok();
            let right = name == "rsplit";
            let sep = match &sep {
                None | Some(Value::None) => {
                    let split = if right { rsplit_spaces } else { split_spaces };
                    return strings(split(receiver, most));
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
            return strings(parts);
        }
        "splitlines" => {
            let [keep] = args.bind(name, ["keepends"])?;
            return strings(split_lines(receiver, is_true(&keep)));
        }
        "partition" | "rpartition" => {
            let [sep] = args.places(name)?;
            let sep = required(sep, name, "sep")?;
            let sep = text(&sep, name)?;
            if sep.is_empty() {
                return Err(type_error("empty separator"));
            }
            let (found, rest) = match name {
                "partition" => (receiver.split_once(sep), [&**receiver, "", ""]),
                _ => (receiver.rsplit_once(sep), ["", "", &**receiver]),
            };
            return match found {
                Some((before, after)) => tuple([before, sep, after]),
                None => tuple(rest),
            };
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = args.places(name)?;
            let chars = match &chars {
                None | Some(Value::None) => None,
                Some(chars) => Some(text(chars, name)?),
            };
            let drops = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            return string(match name {
                "strip" => receiver.trim_matches(drops),
                "lstrip" => receiver.trim_start_matches(drops),
                _ => receiver.trim_end_matches(drops),
            });
        }
        "startswith" | "endswith" => {
            let [affix, start, stop] = args.places(name)?;
            let affix = required(affix, name, "prefix")?;
            let Some((_, part)) = within(receiver, &start, &stop)? else {
                return Ok(Value::Bool(false));
            };
            let has = |affix: &Value| -> Result<bool> {
                let affix = text(affix, name)?;
                Ok(if name == "startswith" {
                    part.starts_with(affix)
                } else {
                    part.ends_with(affix)
                })
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
            Value::Bool(found)
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = args.places(name)?;
            let affix = required(affix, name, "prefix")?;
            let affix = text(&affix, name)?;
            return string(match name {
                "removeprefix" => receiver.strip_prefix(affix).unwrap_or(receiver),
                _ => receiver.strip_suffix(affix).unwrap_or(receiver),
            });
        }
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let (old, new) = (required(old, name, "old")?, required(new, name, "new")?);
            let count = integer_or(count.as_ref(), -1)?;
            Value::str(replace(receiver, text(&old, name)?, text(&new, name)?, count, meter)?)
        }
        "count" | "find" | "rfind" | "index" | "rindex" => {
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
                (Some(at), _) => Value::Int(at),
                (None, "find" | "rfind") => Value::Int(-1),
                (None, _) => return Err(type_error("substring not found")),
            }
        }
        "join" => {
            let [items] = args.places(name)?;
            let items = iterate(&required(items, name, "iterable")?, meter)?;
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
            Value::str(joined)
        }
        "center" | "ljust" | "rjust" => {
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
            Value::str(pad(receiver, width, fill, name, meter)?)
        }
        "zfill" => {
            let [width] = args.places(name)?;
            let width = integer(&required(width, name, "width")?)?;
            let (sign, digits) = match receiver.chars().next() {
                Some(sign @ ('+' | '-')) => (sign.to_string(), &receiver[1..]),
                _ => (String::new(), &**receiver),
            };
            let filled =
                pad(digits, width.saturating_sub(sign.len() as i128), '0', "rjust", meter)?;
            Value::str(sign + &filled)
        }
        "expandtabs" => {
            let [size] = args.bind(name, ["tabsize"])?;
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
            Value::str(out)
        }
        "encode" | "translate" => return Err(no_method(&Value::Str(receiver.clone()), name)),
        other => {
            let [] = args.places(other)?;
            match other {
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
                    receiver.chars().enumerate().all(|(n, c)| {
                        c == '_' || c.is_alphabetic() || (n > 0 && c.is_alphanumeric())
                    }) && !receiver.is_empty(),
                ),
                "islower" | "isupper" => Value::Bool(has_case(receiver, other == "isupper")),
                "istitle" => {
                    let cased = receiver.chars().any(is_cased);
                    Value::Bool(cased && title(receiver) == **receiver)
                }
                _ => return Err(no_method(&Value::Str(receiver.clone()), other)),
            }
        }
    })
}
