//! `"%s: %d" % values`.

use std::iter::Peekable;
use std::str::Chars;

use super::args::integer;
use super::format_spec::float;
use super::number::Number;
use super::text::{write_repr, write_str};
use super::value::Value;
use crate::error::{Result, type_error};
use crate::meter::Meter;

/// The widest field.
const MOST: usize = 10_000;

/// `format % values`.
pub(crate) fn printf(format: &str, values: &Value, meter: &Meter) -> Result<String> {
    let mut given = Given { values, next: 0, named: false, meter };
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    meter.bytes(format.len())?;
    while let Some(c) = chars.next() {
        if c != '%' || chars.next_if_eq(&'%').is_some() {
            out.push(c);
            continue;
        }
        let field = Field::read(&mut chars, &mut given)?;
        let value = match field.named {
            Some(value) => value,
            None => given.next()?,
        };
        let (kind, flags) = (field.kind, &field.flags);
        let (sign, body) = convert(kind, flags, field.precision, &value, meter)?;
        let missing = field.width.saturating_sub(sign.chars().count() + body.chars().count());
        meter.bytes(missing + body.len())?;
        let fill = |c: char| c.to_string().repeat(missing);
        if flags.contains('-') {
            out += &format!("{sign}{body}{}", fill(' '));
        } else if flags.contains('0') && !"srac".contains(kind) {
            out += &format!("{sign}{}{body}", fill('0'));
        } else {
            out += &format!("{}{sign}{body}", fill(' '));
        }
    }
    given.finish()?;
    Ok(out)
}

/// What follows a `%`: `(key)`, flags, width, `.precision`, kind.
struct Field {
    /// The value of the key.
    named: Option<Value>,
    flags: String,
    width: usize,
    precision: Option<usize>,
    kind: char,
}

impl Field {
    fn read(chars: &mut Peekable<Chars<'_>>, given: &mut Given<'_>) -> Result<Self> {
        let named = match chars.next_if_eq(&'(') {
            Some(_) => Some(given.key(&key(chars)?)?),
            None => None,
        };
        let mut flags = String::new();
        while let Some(flag) = chars.next_if(|c| "-+ #0".contains(*c)) {
            flags.push(flag);
        }
        let mut width = number(chars, given)?.unwrap_or(0);
        let precision = match chars.next_if_eq(&'.') {
            Some(_) => Some(number(chars, given)?.unwrap_or(0).max(0)),
            None => None,
        };
        if width < 0 {
            flags.push('-');
            width = width.saturating_neg();
        }
        if width > MOST as i128 || precision.is_some_and(|p| p > MOST as i128) {
            return Err(type_error(format!("a format wider than {MOST}")));
        }
        while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
        let kind = chars.next().ok_or_else(|| type_error("incomplete format"))?;
        let precision = precision.map(|p| p as usize);
        Ok(Self { named, flags, width: width as usize, precision, kind })
    }
}

/// A key up to its closing parenthesis; others may be open within it.
fn key(chars: &mut Peekable<Chars<'_>>) -> Result<String> {
    let mut key = String::new();
    let mut open = 1;
    for c in chars {
        open += i32::from(c == '(') - i32::from(c == ')');
        if open == 0 {
            return Ok(key);
        }
        key.push(c);
    }
    Err(type_error("incomplete format key"))
}

/// Digits, or the next value in place of `*`.
fn number(chars: &mut Peekable<Chars<'_>>, given: &mut Given<'_>) -> Result<Option<i128>> {
    if chars.next_if_eq(&'*').is_some() {
        return integer(&given.next()?).map(Some);
    }
    let mut number = None;
    while let Some(digit) = chars.next_if(char::is_ascii_digit) {
        let digit = i128::from(digit as u8 - b'0');
        number = Some((number.unwrap_or(0) * 10 + digit).min(MOST as i128 + 1));
    }
    Ok(number)
}

fn convert(
    kind: char,
    flags: &str,
    precision: Option<usize>,
    value: &Value,
    meter: &Meter,
) -> Result<(String, String)> {
    let sign = |negative: bool| -> String {
        match negative {
            true => "-".into(),
            false if flags.contains('+') => "+".into(),
            false if flags.contains(' ') => " ".into(),
            false => String::new(),
        }
    };
    let alternate = flags.contains('#');
    let needs_number = || {
        let name = value.type_name();
        type_error(format!("%{kind} format: a number is required, not {name}"))
    };
    match kind {
        's' | 'r' | 'a' => {
            let mut text = String::new();
            match kind {
                's' => write_str(value, &mut text, meter)?,
                _ => write_repr(value, &mut text, meter)?,
            }
            if let Some(most) = precision {
                text = text.chars().take(most).collect();
            }
            Ok((String::new(), text))
        }
        'c' => match value {
            Value::Str(text) | Value::Markup(text) if text.chars().count() == 1 => {
                Ok((String::new(), text.to_string()))
            }
            Value::Int(code) => {
                let c = u32::try_from(*code).ok().and_then(char::from_u32);
                let c = c.ok_or_else(|| type_error("%c arg not in range(0x110000)"))?;
                Ok((String::new(), c.into()))
            }
            _ => Err(type_error("%c requires int or char")),
        },
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
            let number = match (Number::of(value.used()?), kind) {
                (Some(Number::Int(number)), _) => number,
                (Some(Number::Float(number)), 'd' | 'i' | 'u') if number.is_finite() => {
                    number.trunc() as i128
                }
                _ => return Err(needs_number()),
            };
            let size = number.unsigned_abs();
            let (prefix, digits) = match kind {
                'x' => ("0x", format!("{size:x}")),
                'X' => ("0X", format!("{size:X}")),
                'o' => ("0o", format!("{size:o}")),
                _ => ("", size.to_string()),
            };
            let zeros = precision.unwrap_or(0).saturating_sub(digits.len());
            let prefix = if alternate { prefix } else { "" };
            Ok((sign(number < 0) + prefix, "0".repeat(zeros) + &digits))
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let number = Number::of(value.used()?).ok_or_else(needs_number)?.float();
            let negative = number.is_sign_negative() && !number.is_nan();
            Ok((sign(negative), float(number.abs(), kind, precision, alternate)))
        }
        other => Err(type_error(format!("unsupported format character '{other}'"))),
    }
}

/// The values at the right of `%`.
struct Given<'a> {
    values: &'a Value,
    next: usize,
    named: bool,
    meter: &'a Meter,
}

impl Given<'_> {
    fn next(&mut self) -> Result<Value> {
        let value = match self.values {
            Value::Tuple(list) => list.items.get(self.next).cloned(),
            single => Some(single.clone()).filter(|_| self.next == 0),
        };
        self.next += 1;
        value.ok_or_else(|| type_error("not enough arguments for format string"))
    }

    fn key(&mut self, key: &str) -> Result<Value> {
        self.named = true;
        let Value::Dict(dict) = self.values else {
            return Err(type_error("format requires a mapping"));
        };
        let found = dict.get(&Value::str(key), self.meter)?.cloned();
        found.ok_or_else(|| type_error(format!("no value for '{key}' in a format")))
    }

    /// Whether all were used: a mapping's need not be.
    fn finish(&self) -> Result<()> {
        let unused = match self.values {
            Value::Tuple(list) => self.next < list.items.len(),
            Value::Dict(_) | Value::List(_) => false,
            _ => self.next == 0 && !self.named,
        };
        if unused {
            return Err(type_error("not all arguments converted during string formatting"));
        }
        Ok(())
    }
}
