//! What stands after `|`: one value to another. Those of text and of lists have files of their own.

mod keyed;
mod lists;
mod text;

use super::args::{CallArgs, integer_or, is_true, required};
use super::json::tojson;
use super::methods;
use super::methods::pairs;
use super::number::{Number, parse_float, parse_int, too_large};
use super::operators::{math, order};
use super::sequence::{attribute, item, iterate, length};
use super::strings::{escape, pad, replace, upper_first};
use super::text::to_str;
use super::value::Value;
use crate::ast::MathOp;
use crate::error::{Error, ErrorKind, Result, type_error};
use crate::meter::Meter;
use text::{indent, strip_tags, title, truncate, urlencode};

pub(crate) const FILTERS: &[&str] = &[
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

const NO_ARGUMENTS: [&str; 20] = [
    "abs",
    "capitalize",
    "count",
    "e",
    "escape",
    "first",
    "forceescape",
    "items",
    "last",
    "length",
    "list",
    "lower",
    "reverse",
    "safe",
    "string",
    "striptags",
    "title",
    "upper",
    "urlencode",
    "wordcount",
];

/// Filters that leave marked text marked.
const KEEP_MARKED: [&str; 7] =
    ["upper", "lower", "capitalize", "trim", "string", "center", "indent"];

/// `value | name(…)`.
pub(crate) fn filter(name: &str, value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let filtered = filter_one(name, value, args, meter)?;
    let marks = match value {
        Value::Markup(_) => KEEP_MARKED.contains(&name),
        _ => false,
    };
    if marks { filtered.marked(meter) } else { Ok(filtered) }
}

fn filter_one(name: &str, value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    let string = || to_str(value, meter);
    if NO_ARGUMENTS.contains(&name) && !(args.positional.is_empty() && args.keywords.is_empty()) {
        return Err(type_error(format!("the filter '{name}' takes no arguments")));
    }
    Ok(match name {
        "tojson" => Value::str(tojson(value, args, meter)?),
        "default" | "d" => {
            let [default, boolean] = args.bind(name, ["default_value", "boolean"])?;
            let missing = matches!(value, Value::Undefined(_));
            if missing || (is_true(&boolean) && !value.is_true()) {
                default.unwrap_or_else(|| Value::str(""))
            } else {
                value.clone()
            }
        }
        "length" | "count" => Value::Int(length(value, meter)? as i128),
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
        "format" => {
            let values = match (args.positional.is_empty(), args.keywords.is_empty()) {
                (false, false) => {
                    return Err(type_error(
                        "can't handle positional and keyword arguments at the same time",
                    ));
                }
                (true, false) => {
                    let pair = |(key, value)| (Value::str(String::as_str(&key)), value);
                    Value::dict(args.keywords.into_iter().map(pair).collect(), meter)?
                }
                _ => Value::tuple(args.positional, meter)?,
            };
            {
                let format = if let Value::Markup(_) = value {
                    value.clone()
                } else {
                    Value::str(string()?)
                };
                math(MathOp::Mod, &format, &values, meter)?
            }
        }
        "indent" => indent(value.used()?, args, meter)?,
        "truncate" => truncate(value, args, meter)?,
        "wordcount" => {
            let text = string()?;
            let word = |c: char| c == '_' || c.is_alphanumeric();
            Value::Int(text.split(|c| !word(c)).filter(|part| !part.is_empty()).count() as i128)
        }
        "striptags" => Value::str(strip_tags(&string()?)),
        "urlencode" => Value::str(urlencode(value, meter)?),
        "abs" => match Number::of(value.used()?) {
            Some(Number::Int(value)) => Value::Int(value.checked_abs().ok_or_else(too_large)?),
            Some(Number::Float(value)) => Value::Float(value.abs()),
            None => {
                let name = value.type_name();
                return Err(type_error(format!("bad operand type for abs(): '{name}'")));
            }
        },
        "int" => {
            let [default, base] = args.bind(name, ["default", "base"])?;
            let base = integer_or(base.as_ref(), 10)?;
            to_int(value, base)?.unwrap_or_else(|| default.unwrap_or(Value::Int(0)))
        }
        "float" => {
            let [default] = args.bind(name, ["default"])?;
            let found = match value.used()? {
                Value::Str(text) | Value::Markup(text) => parse_float(text),
                other => Number::of(other).map(Number::float),
            };
            found.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float)
        }
        "round" => {
            let [precision, method] = args.bind(name, ["precision", "method"])?;
            let precision = integer_or(precision.as_ref(), 0)?;
            let method = method.unwrap_or_else(|| Value::str("common"));
            round(value, precision, method.as_str().unwrap_or(""))?
        }
        "attr" => {
            let [attribute_name] = args.bind(name, ["name"])?;
            let wanted = required(attribute_name, name, "name")?;
            match attribute(value, wanted.as_str().unwrap_or(""), meter)? {
                // Items do not count as attributes.
                found if matches!(value, Value::Dict(_)) && !matches!(found, Value::Method(_)) => {
                    super::sequence::missing(value, &wanted)
                }
                found => found,
            }
        }
        "items" => match value {
            Value::Undefined(_) => Value::iterator(Vec::new(), meter)?,
            value => Value::iterator(pairs(value, meter)?, meter)?,
        },
        "filesizeformat" | "pprint" | "random" | "urlize" | "wordwrap" | "xmlattr" => {
            let what = format!("the filter '{name}' is not supported");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        _ => return lists::filter(name, value, args, meter),
    })
}

fn unknown(name: &str) -> Error {
    let name: String = name.chars().take(60).collect();
    type_error(format!("No filter named '{name}'."))
}

/// `int(value, base)`, then `int(float(value))`, or nothing.
fn to_int(value: &Value, base: i128) -> Result<Option<Value>> {
    let truncated = |number: f64| {
        let fits = number.is_finite() && number.abs() < 1e38;
        fits.then_some(Value::Int(number.trunc() as i128))
    };
    Ok(match value.used()? {
        Value::Str(text) | Value::Markup(text) => {
            let whole = u32::try_from(base).ok().and_then(|base| parse_int(text, base));
            whole.map(Value::Int).or_else(|| parse_float(text).and_then(truncated))
        }
        other => match Number::of(other) {
            Some(Number::Int(value)) => Some(Value::Int(value)),
            Some(Number::Float(value)) => truncated(value),
            None => None,
        },
    })
}

fn round(value: &Value, precision: i128, method: &str) -> Result<Value> {
    let Some(number) = Number::of(value.used()?) else {
        let name = value.type_name();
        return Err(type_error(format!("type {name} doesn't define __round__ method")));
    };
    let precision = precision.clamp(-300, 300) as i32;
    let scale = 10f64.powi(precision);
    Ok(match (method, number) {
        ("common", Number::Int(value)) if precision >= 0 => Value::Int(value),
        ("common", Number::Int(value)) => {
            let unit = u32::try_from(-precision).ok().and_then(|p| 10i128.checked_pow(p));
            let Some(unit) = unit else { return Ok(Value::Int(0)) };
            let (down, rest) = (value.div_euclid(unit), value.rem_euclid(unit));
            let up = rest > unit - rest || (rest == unit - rest && down % 2 != 0);
            Value::Int((down + i128::from(up)).checked_mul(unit).ok_or_else(too_large)?)
        }
        // As Python: the decimal number nearest to the value's own digits, ties to even.
        ("common", Number::Float(value)) if precision >= 0 => {
            let text = format!("{value:.0$}", precision as usize);
            Value::Float(text.parse().unwrap_or(value))
        }
        ("common", Number::Float(value)) => Value::Float((value * scale).round_ties_even() / scale),
        ("ceil", number) => Value::Float((number.float() * scale).ceil() / scale),
        ("floor", number) => Value::Float((number.float() * scale).floor() / scale),
        _ => return Err(type_error("method must be common, ceil or floor")),
    })
}
