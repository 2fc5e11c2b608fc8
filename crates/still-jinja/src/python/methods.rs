//! Methods of `dict`, `list`, `tuple`, `range` and `float`; those of `str` are `str_methods`'.

use super::args::{CallArgs, bounds, no_method, required};
use super::operators::{escaped, position};
use super::sequence::iterate;
use super::str_methods::str_method;
use super::value::{Dict, Function, List, Value};
use crate::error::{Result, type_error};
use crate::meter::Meter;

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
        Value::Dict(dict) => dict_method(on, dict, name, args, meter),
        Value::List(_) | Value::Tuple(_) | Value::Range(_) => list_method(on, name, args, meter),
        Value::Function(Function::Dict) if name == "fromkeys" => from_keys(args, meter),
        Value::Float(value) if name == "is_integer" => Ok(Value::Bool(value.fract() == 0.0)),
        _ => Err(no_method(on, name)),
    }
}

/// Methods of `on`, which is `dict`.
fn dict_method(
    on: &Value,
    dict: &Dict,
    name: &str,
    args: CallArgs,
    meter: &Meter,
) -> Result<Value> {
    let view = |kind, items| -> Result<Value> { Ok(Value::View(kind, List::new(items, meter)?)) };
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

/// Methods of a list, a tuple or a range.
fn list_method(on: &Value, name: &str, args: CallArgs, meter: &Meter) -> Result<Value> {
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

/// `dict.fromkeys`.
fn from_keys(args: CallArgs, meter: &Meter) -> Result<Value> {
    let [keys, value] = args.places("fromkeys")?;
    let keys = iterate(&required(keys, "fromkeys", "iterable")?, meter)?;
    let value = value.unwrap_or(Value::None);
    let pair = |key: &Value| (key.clone(), value.clone());
    Value::dict(keys.items.iter().map(pair).collect(), meter)
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
