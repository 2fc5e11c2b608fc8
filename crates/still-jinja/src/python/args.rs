//! Arguments of a call, by place or name.

use super::value::Value;
use crate::error::{Error, ErrorKind, Result, type_error};

#[derive(Debug, Default)]
pub(crate) struct CallArgs {
    pub positional: Vec<Value>,
    pub keywords: Vec<(String, Value)>,
}

impl CallArgs {
    /// Values in the order of these parameters.
    ///
    /// # Errors
    /// Too many, an unknown one, one given twice.
    pub fn bind<const N: usize>(self, of: &str, names: [&str; N]) -> Result<[Option<Value>; N]> {
        if self.positional.len() > N {
            let given = self.positional.len();
            return Err(type_error(format!("{of} takes at most {N} arguments ({given} given)")));
        }
        let mut bound = [const { None }; N];
        for (place, value) in bound.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.keywords {
            match names.iter().position(|known| *known == name) {
                Some(at) if bound[at].is_none() => bound[at] = Some(value),
                Some(_) => {
                    return Err(type_error(format!("{of} got two values for argument '{name}'")));
                }
                None => {
                    return Err(type_error(format!("{of} has no argument named '{name}'")));
                }
            }
        }
        Ok(bound)
    }

    /// For functions of Python that take no names.
    pub fn places<const N: usize>(self, of: &str) -> Result<[Option<Value>; N]> {
        if let Some((name, _)) = self.keywords.first() {
            return Err(type_error(format!("{of} takes no keyword arguments ('{name}' given)")));
        }
        self.bind(of, [""; N])
    }
}

/// An argument that has to be there.
pub(crate) fn required(value: Option<Value>, of: &str, name: &str) -> Result<Value> {
    value.ok_or_else(|| type_error(format!("{of} misses its argument '{name}'")))
}

pub(crate) fn text<'a>(value: &'a Value, of: &str) -> Result<&'a str> {
    value.used()?;
    value
        .as_str()
        .ok_or_else(|| type_error(format!("{of} needs a str, got '{}'", value.type_name())))
}

pub(crate) fn integer(value: &Value) -> Result<i128> {
    match value.used()? {
        Value::Int(value) => Ok(*value),
        Value::Bool(value) => Ok((*value).into()),
        other => {
            let name = other.type_name();
            Err(type_error(format!("'{name}' object cannot be interpreted as an integer")))
        }
    }
}

/// An integer, or this where none is given or `None` is.
pub(crate) fn integer_or(value: Option<&Value>, default: i128) -> Result<i128> {
    match value {
        None | Some(Value::None) => Ok(default),
        Some(value) => integer(value),
    }
}

pub(crate) fn is_true(value: &Option<Value>) -> bool {
    value.as_ref().is_some_and(Value::is_true)
}

/// A slice's bounds within a length.
pub(super) fn bounds(
    start: &Option<Value>,
    stop: &Option<Value>,
    length: usize,
) -> Result<(usize, usize)> {
    let length = length as i128;
    let place = |value: &Option<Value>, default| -> Result<usize> {
        let at = integer_or(value.as_ref(), default)?;
        let at = if at < 0 { at.saturating_add(length) } else { at };
        Ok(at.clamp(0, length) as usize)
    };
    Ok((place(start, 0)?, place(stop, length)?))
}

/// That `on` has no such method.
pub(super) fn no_method(on: &Value, name: &str) -> Error {
    let what = format!("the method '{name}' of '{}'", on.type_name());
    Error::new(ErrorKind::Unsupported, format!("{what} is not supported"))
}
