//! `==`, `<`, `in`, `+` and the like.

use std::cmp::Ordering;

use super::number::{Number, arithmetic};
use super::printf::printf;
use super::sequence::iterate;
use super::strings::escape;
use super::value::Value;
use crate::ast::{Comparison, MathOp};
use crate::error::{Error, ErrorKind, Result, type_error};
use crate::meter::Meter;

impl Value {
    /// `==`. Values share what they hold, so that comparing two may take far more steps than making them: it is counted.
    pub fn equals(&self, other: &Self, meter: &Meter) -> Result<bool> {
        meter.steps(1)?;
        Ok(match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Str(a) | Self::Markup(a), Self::Str(b) | Self::Markup(b)) => {
                meter.bytes(a.len().min(b.len()))?;
                a == b
            }
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => {
                a.items.len() == b.items.len() && {
                    for (a, b) in a.items.iter().zip(&b.items) {
                        if !a.equals(b, meter)? {
                            return Ok(false);
                        }
                    }
                    true
                }
            }
            (Self::View("dict_keys", a), Self::View("dict_keys", b)) => {
                a.items.len() == b.items.len() && {
                    for a in &a.items {
                        if position(&b.items, a, meter)?.is_none() {
                            return Ok(false);
                        }
                    }
                    true
                }
            }
            (Self::Dict(a), Self::Dict(b)) => {
                a.entries.len() == b.entries.len() && {
                    for (key, value) in &a.entries {
                        match b.get(key, meter)? {
                            Some(other) if value.equals(other, meter)? => {}
                            _ => return Ok(false),
                        }
                    }
                    true
                }
            }
            (Self::Range(a), Self::Range(b)) => {
                let (a, b) = (*a, *b);
                a.len() == b.len()
                    && (a.len() == 0 || a.start == b.start)
                    && (a.len() < 2 || a.step == b.step)
            }
            (Self::Function(a), Self::Function(b)) => a == b,
            (Self::Object(a), Self::Object(b)) => a == b,
            (Self::Method(a), Self::Method(b)) => a.1 == b.1 && a.0.is(&b.0),
            (Self::Iterator(a), Self::Iterator(b)) => std::rc::Rc::ptr_eq(a, b),
            _ => match (Number::of(self), Number::of(other)) {
                (Some(Number::Int(a)), Some(Number::Int(b))) => a == b,
                (Some(a), Some(b)) => a.float() == b.float(),
                _ => false,
            },
        })
    }

    /// `is`.
    pub fn is(&self, other: &Self) -> bool {
        use std::rc::Rc;
        match (self, other) {
            (Self::Bool(a), Self::Bool(b)) => a == b,
            (Self::None, Self::None) => true,
            // Python keeps one of each small number and of each literal.
            (Self::Int(a), Self::Int(b)) => a == b,
            (Self::Str(a), Self::Str(b)) => a == b,
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => Rc::ptr_eq(a, b),
            (Self::Dict(a), Self::Dict(b)) => Rc::ptr_eq(a, b),
            (Self::Object(a), Self::Object(b)) => a == b,
            (Self::Function(a), Self::Function(b)) => a == b,
            (Self::Iterator(a), Self::Iterator(b)) => Rc::ptr_eq(a, b),
            (Self::Undefined(a), Self::Undefined(b)) => Rc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// Where an equal value is among these.
pub(crate) fn position(items: &[Value], item: &Value, meter: &Meter) -> Result<Option<usize>> {
    for (n, known) in items.iter().enumerate() {
        if known.equals(item, meter)? {
            return Ok(Some(n));
        }
    }
    Ok(None)
}

/// How two values lie to each other; `None` if a number among them is none.
///
/// # Errors
/// Values that Python does not order.
pub(crate) fn order(
    left: &Value,
    right: &Value,
    op: &str,
    meter: &Meter,
) -> Result<Option<Ordering>> {
    meter.steps(1)?;
    left.used()?;
    right.used()?;
    match (left, right) {
        (Value::Str(a) | Value::Markup(a), Value::Str(b) | Value::Markup(b)) => {
            meter.bytes(a.len().min(b.len()))?;
            return Ok(Some(a.cmp(b)));
        }
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
            for (a, b) in a.items.iter().zip(&b.items) {
                if !a.equals(b, meter)? {
                    return order(a, b, op, meter);
                }
            }
            return Ok(Some(a.items.len().cmp(&b.items.len())));
        }
        _ => {}
    }
    match (Number::of(left), Number::of(right)) {
        (Some(Number::Int(a)), Some(Number::Int(b))) => Ok(Some(a.cmp(&b))),
        (Some(a), Some(b)) => Ok(a.float().partial_cmp(&b.float())),
        _ => {
            let (left, right) = (left.type_name(), right.type_name());
            let what = format!("'{op}' not supported between instances of '{left}' and '{right}'");
            Err(type_error(what))
        }
    }
}

/// One comparison of a chain.
pub(crate) fn compare(op: Comparison, left: &Value, right: &Value, meter: &Meter) -> Result<bool> {
    let ordered = |word: &str, test: fn(Ordering) -> bool| -> Result<bool> {
        Ok(order(left, right, word, meter)?.is_some_and(test))
    };
    match op {
        Comparison::Eq => left.equals(right, meter),
        Comparison::Ne => Ok(!left.equals(right, meter)?),
        Comparison::Lt => ordered("<", Ordering::is_lt),
        Comparison::Le => ordered("<=", Ordering::is_le),
        Comparison::Gt => ordered(">", Ordering::is_gt),
        Comparison::Ge => ordered(">=", Ordering::is_ge),
        Comparison::In => contains(right, left, meter),
        Comparison::NotIn => Ok(!contains(right, left, meter)?),
    }
}

/// `item in container`.
pub(crate) fn contains(container: &Value, item: &Value, meter: &Meter) -> Result<bool> {
    match container {
        Value::Str(text) | Value::Markup(text) => match item {
            Value::Str(part) | Value::Markup(part) => {
                meter.bytes(text.len())?;
                Ok(text.contains(&**part))
            }
            Value::Undefined(_) => {
                item.used()?;
                Ok(false)
            }
            other => {
                let name = other.type_name();
                Err(type_error(format!(
                    "'in <string>' requires string as left operand, not {name}"
                )))
            }
        },
        Value::Dict(dict) => {
            if !item.is_hashable() {
                return Err(type_error(format!("unhashable type: '{}'", item.type_name())));
            }
            Ok(dict.get(item, meter)?.is_some())
        }
        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
            let name = container.type_name();
            Err(type_error(format!("argument of type '{name}' is not iterable")))
        }
        other => {
            let list = iterate(other, meter)?;
            Ok(position(&list.items, item, meter)?.is_some())
        }
    }
}

/// `left op right`.
pub(crate) fn math(op: MathOp, left: &Value, right: &Value, meter: &Meter) -> Result<Value> {
    match (op, left) {
        (MathOp::Mod, Value::Str(format)) => return Ok(Value::str(printf(format, right, meter)?)),
        (MathOp::Mod, Value::Markup(format)) => {
            let right = escaped(right, meter)?;
            return Ok(Value::Markup(printf(format, &right, meter)?.into()));
        }
        _ => {}
    }
    left.used()?;
    right.used()?;
    if let (Some(left), Some(right)) = (Number::of(left), Number::of(right)) {
        return arithmetic(op, left, right);
    }
    match (op, left, right) {
        (MathOp::Add, Value::Str(a), Value::Str(b)) => {
            meter.bytes(a.len() + b.len())?;
            Ok(Value::str(format!("{a}{b}")))
        }
        (MathOp::Add, Value::Str(_) | Value::Markup(_), Value::Str(_) | Value::Markup(_)) => {
            let (left, right) = (escaped(left, meter)?, escaped(right, meter)?);
            let [a, b] = [&left, &right].map(|text| text.as_str().unwrap_or_default());
            meter.bytes(a.len() + b.len())?;
            Ok(Value::Markup(format!("{a}{b}").into()))
        }
        (MathOp::Add, Value::List(a), Value::List(b)) => {
            meter.elements(a.items.len() + b.items.len())?;
            Value::list(a.items.iter().chain(&b.items).cloned().collect(), meter)
        }
        (MathOp::Add, Value::Tuple(a), Value::Tuple(b)) => {
            meter.elements(a.items.len() + b.items.len())?;
            Value::tuple(a.items.iter().chain(&b.items).cloned().collect(), meter)
        }
        (MathOp::Mul, _, _) => repeat(left, right, meter),
        _ => Err(unsupported(op, left, right)),
    }
}

fn repeat(left: &Value, right: &Value, meter: &Meter) -> Result<Value> {
    let (sequence, times) = match (left, right) {
        (Value::Int(_) | Value::Bool(_), other) => (other, left),
        (other, times) => (other, times),
    };
    let Some(Number::Int(times)) = Number::of(times) else {
        return Err(unsupported(MathOp::Mul, left, right));
    };
    let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
    let all = |length: usize| {
        length.checked_mul(times).ok_or_else(|| {
            Error::new(ErrorKind::Limit, "repeats a text or list more often than a template may")
        })
    };
    match sequence {
        Value::Str(text) | Value::Markup(text) => {
            meter.bytes(all(text.len())?)?;
            let repeated = Value::str(text.repeat(if text.is_empty() { 0 } else { times }));
            if let Value::Markup(_) = sequence { repeated.marked(meter) } else { Ok(repeated) }
        }
        Value::List(list) | Value::Tuple(list) => {
            meter.elements(all(list.items.len())?)?;
            let times = if list.items.is_empty() { 0 } else { times };
            let items: Vec<Value> = (0..times).flat_map(|_| list.items.iter().cloned()).collect();
            match sequence {
                Value::List(_) => Value::list(items, meter),
                _ => Value::tuple(items, meter),
            }
        }
        _ => Err(unsupported(MathOp::Mul, left, right)),
    }
}

/// What is put into marked text: texts that are not marked themselves are escaped, alone, in a tuple or as a mapping's values.
pub(crate) fn escaped(value: &Value, meter: &Meter) -> Result<Value> {
    Ok(match value {
        Value::Str(text) => Value::str(escape(text, meter)?),
        Value::Tuple(list) | Value::List(list) => {
            let items = list.items.iter().map(|item| escaped(item, meter));
            let items = items.collect::<Result<_>>()?;
            match value {
                Value::List(_) => Value::list(items, meter)?,
                _ => Value::tuple(items, meter)?,
            }
        }
        Value::Dict(dict) => {
            let pair = |(key, value): &(Value, Value)| Ok((key.clone(), escaped(value, meter)?));
            Value::dict(dict.entries.iter().map(pair).collect::<Result<_>>()?, meter)?
        }
        other => other.clone(),
    })
}

fn unsupported(op: MathOp, left: &Value, right: &Value) -> Error {
    let op = match op {
        MathOp::Add => "+",
        MathOp::Sub => "-",
        MathOp::Mul => "*",
        MathOp::Div => "/",
        MathOp::FloorDiv => "//",
        MathOp::Mod => "%",
        MathOp::Pow => "**",
    };
    let (left, right) = (left.type_name(), right.type_name());
    type_error(format!("unsupported operand type(s) for {op}: '{left}' and '{right}'"))
}

/// `-value` and `+value`.
pub(crate) fn sign(value: &Value, negative: bool) -> Result<Value> {
    match (Number::of(value.used()?), negative) {
        (Some(number), false) => Ok(number.value()),
        (Some(Number::Int(value)), true) => {
            value.checked_neg().map(Value::Int).ok_or_else(super::number::too_large)
        }
        (Some(Number::Float(value)), true) => Ok(Value::Float(-value)),
        (None, _) => {
            let name = value.type_name();
            Err(type_error(format!("bad operand type for unary operator: '{name}'")))
        }
    }
}
