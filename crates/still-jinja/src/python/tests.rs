//! What stands after `is`.

use super::args::{CallArgs, required};
use super::filters::FILTERS;

use super::number::Number;
use super::operators::{compare, math};
use super::sequence::length;
use super::strings::has_case;
use super::text::to_str;
use super::value::{Object, Value};
use crate::ast::{Comparison, MathOp};
use crate::error::{Error, ErrorKind, Result};
use crate::meter::Meter;

const TESTS: [&str; 39] = [
    "odd",
    "even",
    "divisibleby",
    "defined",
    "undefined",
    "filter",
    "test",
    "none",
    "boolean",
    "false",
    "true",
    "integer",
    "float",
    "lower",
    "upper",
    "string",
    "mapping",
    "number",
    "sequence",
    "iterable",
    "callable",
    "sameas",
    "escaped",
    "in",
    "==",
    "eq",
    "equalto",
    "!=",
    "ne",
    ">",
    "gt",
    "greaterthan",
    "ge",
    ">=",
    "<",
    "lt",
    "lessthan",
    "<=",
    "le",
];

/// `value is name(…)`.
pub(crate) fn test(name: &str, value: &Value, args: CallArgs, meter: &Meter) -> Result<bool> {
    let remainder = |by: &Value| -> Result<Value> { math(MathOp::Mod, value, by, meter) };
    let comparison = match name {
        "==" | "eq" | "equalto" => Some(Comparison::Eq),
        "!=" | "ne" => Some(Comparison::Ne),
        ">" | "gt" | "greaterthan" => Some(Comparison::Gt),
        ">=" | "ge" => Some(Comparison::Ge),
        "<" | "lt" | "lessthan" => Some(Comparison::Lt),
        "<=" | "le" => Some(Comparison::Le),
        "in" => Some(Comparison::In),
        _ => None,
    };
    if let Some(comparison) = comparison {
        let [other] = args.places(name)?;
        return compare(comparison, value, &required(other, name, "other")?, meter);
    }
    match name {
        "divisibleby" => {
            let [by] = args.places(name)?;
            return remainder(&required(by, name, "num")?)?.equals(&Value::Int(0), meter);
        }
        "sameas" => {
            let [other] = args.places(name)?;
            return Ok(value.is(&required(other, name, "other")?));
        }
        _ => {}
    }
    let [] = args.places(name)?;
    Ok(match name {
        "odd" => remainder(&Value::Int(2))?.equals(&Value::Int(1), meter)?,
        "even" => remainder(&Value::Int(2))?.equals(&Value::Int(0), meter)?,
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "filter" => value.as_str().is_some_and(|name| FILTERS.contains(&name)),
        "test" => value.as_str().is_some_and(|name| TESTS.contains(&name)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "false" => matches!(value, Value::Bool(false)),
        "true" => matches!(value, Value::Bool(true)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "lower" => has_case(&to_str(value, meter)?, false),
        "upper" => has_case(&to_str(value, meter)?, true),
        "string" => matches!(value, Value::Str(_) | Value::Markup(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "number" => Number::of(value).is_some(),
        // A view has a length, but nothing at an index; an undefined value has both, to be an error.
        "sequence" => !matches!(value, Value::View(..)) && length(value, meter).is_ok(),
        "iterable" => matches!(
            value,
            Value::Undefined(_)
                | Value::Str(_)
                | Value::Markup(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::View(..)
                | Value::Dict(_)
                | Value::Range(_)
                | Value::Iterator(_)
                | Value::Object(Object::Loop(_))
        ),
        // An undefined value can be called, to be an error.
        "callable" => matches!(
            value,
            Value::Undefined(_)
                | Value::Function(_)
                | Value::Method(_)
                | Value::Object(Object::Macro(_) | Object::Loop(_) | Object::Joiner(_))
        ),
        "escaped" => matches!(value, Value::Markup(_)),
        other => {
            let other: String = other.chars().take(60).collect();
            let what = format!("No test named '{other}'.");
            return Err(Error::new(ErrorKind::Type, what));
        }
    })
}
