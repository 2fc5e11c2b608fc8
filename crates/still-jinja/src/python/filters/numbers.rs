//! Filters of numbers.

use super::{CallArgs, Meter, Result, Value, integer_or, lists, type_error};
use crate::python::number::{Number, parse_float, parse_int, too_large};

pub(super) fn filter(name: &str, value: &Value, args: CallArgs, meter: &Meter) -> Result<Value> {
    Ok(match name {
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
        _ => return lists::filter(name, value, args, meter),
    })
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
