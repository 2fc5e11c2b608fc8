//! Numbers: text to number and back, arithmetic.

use super::is_space;
use super::value::Value;
use crate::ast::MathOp;
use crate::error::{Result, type_error};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Number {
    Int(i128),
    Float(f64),
}

impl Number {
    pub fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(value) => Some(Self::Int((*value).into())),
            Value::Int(value) => Some(Self::Int(*value)),
            Value::Float(value) => Some(Self::Float(*value)),
            _ => None,
        }
    }

    pub fn float(self) -> f64 {
        match self {
            Self::Int(value) => value as f64,
            Self::Float(value) => value,
        }
    }

    pub fn value(self) -> Value {
        match self {
            Self::Int(value) => Value::Int(value),
            Self::Float(value) => Value::Float(value),
        }
    }
}

pub(crate) fn too_large() -> crate::error::Error {
    type_error("a number that is too large")
}

/// `left op right` on numbers.
pub(crate) fn arithmetic(op: MathOp, left: Number, right: Number) -> Result<Value> {
    use Number::{Float, Int};
    let zero = matches!(right, Int(0)) || matches!(right, Float(0.0));
    if zero && matches!(op, MathOp::Div | MathOp::FloorDiv | MathOp::Mod) {
        return Err(type_error("division by zero"));
    }
    if let (Int(a), Int(b)) = (left, right) {
        let result = match op {
            MathOp::Add => a.checked_add(b),
            MathOp::Sub => a.checked_sub(b),
            MathOp::Mul => a.checked_mul(b),
            MathOp::Div => return Ok(Value::Float(a as f64 / b as f64)),
            MathOp::FloorDiv => floor_div(a, b),
            MathOp::Mod => a
                .checked_rem(b)
                .map(|rest| if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }),
            MathOp::Pow if b < 0 => return Ok(Value::Float((a as f64).powf(b as f64))),
            MathOp::Pow => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
        };
        return result.map(Value::Int).ok_or_else(too_large);
    }
    let (a, b) = (left.float(), right.float());
    Ok(Value::Float(match op {
        MathOp::Add => a + b,
        MathOp::Sub => a - b,
        MathOp::Mul => a * b,
        MathOp::Div => a / b,
        MathOp::FloorDiv => (a / b).floor(),
        MathOp::Mod => {
            let rest = a % b;
            if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }
        }
        MathOp::Pow => a.powf(b),
    }))
}

fn floor_div(a: i128, b: i128) -> Option<i128> {
    let quotient = a.checked_div(b)?;
    Some(if a % b != 0 && (a < 0) != (b < 0) { quotient - 1 } else { quotient })
}

/// `repr` of a float: the shortest digits that read back the same, in Python's notation.
pub(crate) fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

/// `int(text, base)`: white space around, a sign, underscores between digits, a prefix of its base.
pub(crate) fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = text.trim_matches(is_space);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let prefix = |letters: [&str; 2]| letters.iter().find_map(|p| digits.strip_prefix(p));
    let (base, digits) = match base {
        0 | 16 if prefix(["0x", "0X"]).is_some() => (16, prefix(["0x", "0X"])?),
        0 | 8 if prefix(["0o", "0O"]).is_some() => (8, prefix(["0o", "0O"])?),
        0 | 2 if prefix(["0b", "0B"]).is_some() => (2, prefix(["0b", "0B"])?),
        0 => (10, digits),
        2..=36 => (base, digits),
        _ => return None,
    };
    let spelled = !digits.is_empty()
        && !digits.starts_with('_')
        && !digits.ends_with('_')
        && !digits.contains("__")
        && digits.chars().all(|c| c == '_' || c.is_digit(base));
    if !spelled {
        return None;
    }
    let value = i128::from_str_radix(&digits.replace('_', ""), base).ok()?;
    Some(if negative { -value } else { value })
}

/// `float(text)`.
pub(crate) fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(is_space);
    let lower = text.to_ascii_lowercase();
    match lower.trim_start_matches(['+', '-']) {
        "nan" => return Some(f64::NAN),
        "inf" | "infinity" => {
            return Some(if lower.starts_with('-') { f64::NEG_INFINITY } else { f64::INFINITY });
        }
        _ => {}
    }
    let valid = |c: char| c.is_ascii_digit() || matches!(c, '.' | 'e' | '+' | '-' | '_');
    if !lower.chars().all(valid) || lower.starts_with('_') || lower.ends_with('_') {
        return None;
    }
    lower.replace('_', "").parse().ok()
}
