//! Going through values, indexes and slices, attributes.

use std::rc::Rc;

use super::args::integer;
use super::value::{Function, List, Object, PyRange, Value};
use crate::error::{Result, type_error};
use crate::meter::Meter;

/// Items that a sandboxed `range` may have.
const MAX_RANGE: usize = 100_000;

/// All items of a value, in order.
pub(crate) fn iterate(value: &Value, meter: &Meter) -> Result<Rc<List>> {
    match value {
        Value::List(list) | Value::Tuple(list) | Value::View(_, list) => Ok(list.clone()),
        Value::Undefined(_) => List::new(Vec::new(), meter),
        Value::Dict(dict) => {
            List::new(dict.entries.iter().map(|(key, _)| key.clone()).collect(), meter)
        }
        Value::Str(text) | Value::Markup(text) => {
            meter.elements(text.len())?;
            let mut buffer = [0; 4];
            let chars = text.chars().map(|c| Value::str(&*c.encode_utf8(&mut buffer)));
            List::new(chars.collect(), meter)
        }
        Value::Range(range) => {
            meter.elements(range.len())?;
            List::new((0..range.len()).map(|n| range.get(n)).collect(), meter)
        }
        Value::Iterator(once) => {
            let from = once.at.replace(once.list.items.len());
            match from {
                0 => Ok(once.list.clone()),
                from => List::new(once.list.items[from..].to_vec(), meter),
            }
        }
        other => Err(type_error(format!("'{}' object is not iterable", other.type_name()))),
    }
}

/// `len(value)`.
pub(crate) fn length(value: &Value, meter: &Meter) -> Result<usize> {
    match value {
        Value::Undefined(_) => Ok(0),
        Value::Str(text) | Value::Markup(text) => {
            meter.bytes(text.len())?;
            Ok(text.chars().count())
        }
        Value::List(list) | Value::Tuple(list) | Value::View(_, list) => Ok(list.items.len()),
        Value::Dict(dict) => Ok(dict.entries.len()),
        Value::Range(range) => Ok(range.len()),
        other => Err(type_error(format!("object of type '{}' has no len()", other.type_name()))),
    }
}

/// `range(…)`.
pub(crate) fn range(arguments: &[Value]) -> Result<Value> {
    let numbers = arguments.iter().map(integer).collect::<Result<Vec<_>>>()?;
    let (start, stop, step) = match numbers[..] {
        [stop] => (0, stop, 1),
        [start, stop] => (start, stop, 1),
        [start, stop, step] => (start, stop, step),
        _ => {
            let given = numbers.len();
            return Err(type_error(format!("range expected 1 to 3 arguments, got {given}")));
        }
    };
    let far = |number: i128| number.unsigned_abs() > 1 << 62;
    if step == 0 {
        return Err(type_error("range() arg 3 must not be zero"));
    }
    let range = PyRange { start, stop, step };
    if far(start) || far(stop) || far(step) || range.len() > MAX_RANGE {
        let what = format!("range of more than {MAX_RANGE} items");
        return Err(crate::Error::new(crate::ErrorKind::Limit, what));
    }
    Ok(Value::Range(range))
}

/// `value[index]` where it exists.
fn index(value: &Value, at: &Value, meter: &Meter) -> Result<Option<Value>> {
    let place = |length: usize| -> Option<usize> {
        let at = match at {
            Value::Int(at) => *at,
            Value::Bool(at) => (*at).into(),
            _ => return None,
        };
        let at = if at < 0 { at + length as i128 } else { at };
        usize::try_from(at).ok().filter(|&at| at < length)
    };
    Ok(match value {
        Value::List(list) | Value::Tuple(list) => {
            place(list.items.len()).map(|at| list.items[at].clone())
        }
        Value::Str(text) | Value::Markup(text) => {
            meter.bytes(text.len())?;
            let length = if text.is_ascii() { text.len() } else { text.chars().count() };
            place(length)
                .and_then(|at| text.chars().nth(at))
                .map(|c| Value::str(&*c.encode_utf8(&mut [0; 4])))
        }
        Value::Range(range) => place(range.len()).map(|at| range.get(at)),
        Value::Dict(dict) if at.is_hashable() => dict.get(at, meter)?.cloned(),
        _ => None,
    })
}

/// `value[start:stop:step]`.
pub(crate) fn slice(value: &Value, parts: [Option<Value>; 3], meter: &Meter) -> Result<Value> {
    value.used()?;
    let number = |part: &Option<Value>| match part {
        None | Some(Value::None) => Ok(None),
        Some(value) => integer(value).map(Some),
    };
    let [start, stop, step] = [number(&parts[0])?, number(&parts[1])?, number(&parts[2])?];
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(type_error("slice step cannot be zero"));
    }
    // The first place and the one that is no more.
    let span = |length: usize| -> (i128, i128) {
        let length = length as i128;
        let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
        let bound = |given: Option<i128>, default: i128| match given {
            None => default,
            Some(at) => (if at < 0 { at.saturating_add(length) } else { at }).clamp(low, high),
        };
        if step > 0 {
            (bound(start, 0), bound(stop, length))
        } else {
            (bound(start, high), bound(stop, -1))
        }
    };
    let picks = |length: usize| -> Vec<usize> {
        let (mut at, end) = span(length);
        let mut picks = Vec::new();
        while if step > 0 { at < end } else { at > end } {
            picks.push(at as usize);
            at = at.saturating_add(step);
        }
        picks
    };
    match value {
        Value::Str(text) | Value::Markup(text) => {
            meter.bytes(8 * text.len())?;
            let chars: Vec<char> = text.chars().collect();
            let picked: String = picks(chars.len()).into_iter().map(|at| chars[at]).collect();
            let picked = Value::str(picked);
            if let Value::Markup(_) = value { picked.marked(meter) } else { Ok(picked) }
        }
        Value::List(list) | Value::Tuple(list) => {
            meter.elements(list.items.len())?;
            let items = picks(list.items.len()).into_iter().map(|at| list.items[at].clone());
            match value {
                Value::List(_) => Value::list(items.collect(), meter),
                _ => Value::tuple(items.collect(), meter),
            }
        }
        Value::Range(range) => {
            let (first, end) = span(range.len());
            let place = |at: i128| range.start + range.step * at;
            let step = range.step.saturating_mul(step);
            Ok(Value::Range(PyRange { start: place(first), stop: place(end), step }))
        }
        other => Err(type_error(format!("'{}' object is not subscriptable", other.type_name()))),
    }
}

fn described(value: &Value) -> String {
    match value {
        Value::None => "None".into(),
        other => format!("{} object", other.type_name()),
    }
}

/// `value.name` of values that do not lie with the interpreter: a method before an item.
pub(crate) fn attribute(value: &Value, name: &str, meter: &Meter) -> Result<Value> {
    value.used()?;
    if let Some(found) = own_attribute(value, name) {
        return Ok(found);
    }
    if let Value::Dict(dict) = value {
        meter.steps(dict.entries.len() as u64 / 8)?;
        if let Some(found) = dict.get_str(name) {
            return Ok(found.clone());
        }
    }
    Ok(missing(value, &Value::str(name)))
}

/// `value[at]`: an item before a method.
pub(crate) fn item(value: &Value, at: &Value, meter: &Meter) -> Result<Value> {
    value.used()?;
    if let Some(found) = index(value, at, meter)? {
        return Ok(found);
    }
    if let Some(name) = at.as_str()
        && let Some(found) = own_attribute(value, name)
    {
        return Ok(found);
    }
    Ok(missing(value, at))
}

pub(crate) fn missing(value: &Value, name: &Value) -> Value {
    let of = described(value);
    match name {
        Value::Str(name) => Value::undefined(format!("'{of}' has no attribute '{name}'")),
        // Only numbers are short for certain.
        Value::Int(at) => Value::undefined(format!("{of} has no element {at}")),
        other => Value::undefined(format!("{of} has no element of type {}", other.type_name())),
    }
}

/// What Python's type itself has under this name.
fn own_attribute(value: &Value, name: &str) -> Option<Value> {
    let method = |known: &[&'static str]| {
        let name = *known.iter().find(|known| **known == name)?;
        Some(Value::Method(Rc::new((value.clone(), name))))
    };
    let kept = |known: &[&str]| known.contains(&name);
    let of = value.type_name();
    if name.starts_with("__") && name.ends_with("__") && DUNDERS.contains(&name) {
        return Some(Value::forbidden(format!(
            "access to attribute '{name}' of '{of}' object is unsafe"
        )));
    }
    let mutates = match value {
        Value::Dict(_) => kept(&["clear", "pop", "popitem", "setdefault", "update"]),
        Value::List(_) => {
            kept(&["append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"])
        }
        _ => false,
    };
    if mutates {
        let what = format!("access to attribute '{name}' of '{of}' object is unsafe");
        return Some(Value::forbidden(what));
    }
    match value {
        Value::Dict(_) => method(&["get", "items", "keys", "values", "copy", "fromkeys"]),
        Value::List(_) => method(&["count", "index", "copy"]),
        Value::Tuple(_) => method(&["count", "index"]),
        Value::Str(_) | Value::Markup(_) => method(super::str_methods::STR_METHODS),
        Value::Function(Function::Dict) => method(&["fromkeys"]),
        Value::Range(range) => match name {
            "start" => Some(Value::Int(range.start)),
            "stop" => Some(Value::Int(range.stop)),
            "step" => Some(Value::Int(range.step)),
            _ => method(&["count", "index"]),
        },
        Value::Int(_) | Value::Float(_) if name == "real" => Some(value.clone()),
        Value::Float(_) => method(&["is_integer"]),
        Value::Object(Object::Cycler(_)) => method(&["next", "reset"]),
        _ => None,
    }
}

/// Names that lead from a value into the interpreter of Python.
const DUNDERS: [&str; 12] = [
    "__class__",
    "__dict__",
    "__doc__",
    "__init__",
    "__getattribute__",
    "__globals__",
    "__mro__",
    "__subclasses__",
    "__reduce__",
    "__reduce_ex__",
    "__len__",
    "__format__",
];
