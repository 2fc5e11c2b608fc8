//! What stands after the colon in `"{:>8.3f}"`.

use super::args::integer;
use super::number::{Number, float_repr};
use super::text::to_str;
use super::value::Value;
use crate::error::{Result, type_error};
use crate::meter::Meter;

/// The most digits after the point, and the widest field: anything more is no text for a model.
const MOST: usize = 10_000;

#[derive(Debug, Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

fn parse(spec: &str) -> Result<Spec> {
    let mut parsed = Spec::default();
    let chars: Vec<char> = spec.chars().collect();
    let mut at = 0;
    let is_align = |c: Option<&char>| c.is_some_and(|c| "<>^=".contains(*c));
    if is_align(chars.get(1)) {
        parsed.fill = Some(chars[0]);
        parsed.align = Some(chars[1]);
        at = 2;
    } else if is_align(chars.first()) {
        parsed.align = Some(chars[0]);
        at = 1;
    }
    let mut take = |known: &str| {
        let found = chars.get(at).copied().filter(|c| known.contains(*c));
        at += usize::from(found.is_some());
        found
    };
    parsed.sign = take("+- ");
    parsed.alternate = take("#").is_some();
    parsed.zero = take("0").is_some();
    let number = |take: &mut dyn FnMut(&str) -> Option<char>| -> Result<Option<usize>> {
        let mut number = None;
        while let Some(digit) = take("0123456789") {
            let value = number.unwrap_or(0) * 10 + digit as usize - '0' as usize;
            if value > MOST {
                return Err(type_error(format!("a format wider than {MOST}")));
            }
            number = Some(value);
        }
        Ok(number)
    };
    parsed.width = number(&mut take)?.unwrap_or(0);
    parsed.grouping = take(",_");
    if take(".").is_some() {
        parsed.precision = number(&mut take)?;
        if parsed.precision.is_none() {
            return Err(type_error("Format specifier missing precision"));
        }
    }
    parsed.kind = take("bcdeEfFgGnosxX%");
    if at != chars.len() {
        return Err(type_error("Invalid format specifier"));
    }
    Ok(parsed)
}

/// `format(value, spec)`.
pub(crate) fn format_value(value: &Value, spec: &str, meter: &Meter) -> Result<String> {
    if spec.is_empty() {
        return to_str(value, meter);
    }
    value.used()?;
    let spec = parse(spec)?;
    meter.bytes(4 * spec.width)?;
    let wrong = |kind: char| {
        let name = value.type_name();
        type_error(format!("Unknown format code '{kind}' for object of type '{name}'"))
    };
    match (value, spec.kind) {
        (Value::Str(text) | Value::Markup(text), None | Some('s')) => {
            let text: String = match spec.precision {
                Some(most) => text.chars().take(most).collect(),
                None => text.to_string(),
            };
            Ok(fill(&spec, "", &text, '<'))
        }
        (Value::Int(_) | Value::Bool(_), None | Some('d' | 'n' | 'b' | 'o' | 'x' | 'X' | 'c')) => {
            let number = integer(value)?;
            if spec.kind == Some('c') {
                let c = u32::try_from(number).ok().and_then(char::from_u32);
                let c = c.ok_or_else(|| type_error("%c arg not in range(0x110000)"))?;
                return Ok(fill(&spec, "", &c.to_string(), '<'));
            }
            let size = number.unsigned_abs();
            let (prefix, digits) = match spec.kind {
                Some('b') => ("0b", format!("{size:b}")),
                Some('o') => ("0o", format!("{size:o}")),
                Some('x') => ("0x", format!("{size:x}")),
                Some('X') => ("0X", format!("{size:X}")),
                _ => ("", size.to_string()),
            };
            let every = if prefix.is_empty() { 3 } else { 4 };
            let digits = group(&digits, spec.grouping, every);
            let sign = sign(&spec, number < 0);
            let prefix = if spec.alternate { prefix } else { "" };
            Ok(fill(&spec, &format!("{sign}{prefix}"), &digits, '>'))
        }
        (_, kind) => match (Number::of(value), kind) {
            (Some(number), None | Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | 'n' | '%')) => {
                let number = number.float();
                let negative = number.is_sign_negative() && !number.is_nan();
                let kind = kind.unwrap_or('r');
                let text = float(number.abs(), kind, spec.precision, spec.alternate);
                let (whole, rest) = match text.find(['.', 'e', '%']) {
                    Some(at) => text.split_at(at),
                    None => (&*text, ""),
                };
                let text = group(whole, spec.grouping, 3) + rest;
                Ok(fill(&spec, &sign(&spec, negative), &text, '>'))
            }
            (_, Some(kind)) => Err(wrong(kind)),
            (_, None) => {
                let name = value.type_name();
                Err(type_error(format!("unsupported format string passed to {name}.__format__")))
            }
        },
    }
}

/// A number that is not negative, in the notation of `%e`, `%f`, `%g`, `%%`, or the shortest.
pub(crate) fn float(value: f64, kind: char, precision: Option<usize>, alternate: bool) -> String {
    if !value.is_finite() {
        let text = float_repr(value);
        return if kind.is_uppercase() { text.to_uppercase() } else { text };
    }
    let digits = precision.unwrap_or(6);
    match kind {
        'f' | 'F' => format!("{value:.digits$}"),
        '%' => format!("{:.digits$}%", value * 100.0),
        'e' => exponential(value, digits),
        'E' => exponential(value, digits).to_uppercase(),
        'r' if precision.is_none() => float_repr(value),
        _ => {
            let digits = digits.max(1);
            let scientific = exponential(value, digits - 1);
            let exponent: i32 =
                scientific.rsplit_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
            // The shortest with a precision shows a point where `%g` does not.
            let most = if kind == 'r' { digits as i32 - 1 } else { digits as i32 };
            let plain = exponent >= -4 && exponent < most;
            let mut text = if plain {
                let after = (digits as i32 - 1 - exponent).max(0) as usize;
                format!("{value:.after$}")
            } else {
                scientific
            };
            if !alternate && text.contains('.') {
                let (mantissa, tail) = match text.find('e') {
                    Some(at) => text.split_at(at),
                    None => (&*text, ""),
                };
                let mantissa = mantissa.trim_end_matches('0').trim_end_matches('.');
                text = format!("{mantissa}{tail}");
            }
            if kind == 'r' && plain && !text.contains('.') {
                text.push_str(".0");
            }
            if kind == 'G' { text.to_uppercase() } else { text }
        }
    }
}

fn exponential(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

fn sign(spec: &Spec, negative: bool) -> String {
    match (negative, spec.sign) {
        (true, _) => "-".into(),
        (false, Some(sign @ ('+' | ' '))) => sign.to_string(),
        _ => String::new(),
    }
}

fn group(digits: &str, separator: Option<char>, every: usize) -> String {
    let Some(separator) = separator else {
        return digits.to_owned();
    };
    let mut out = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(every) {
            out.push(separator);
        }
        out.push(digit);
    }
    out
}

fn fill(spec: &Spec, head: &str, body: &str, default: char) -> String {
    let missing = spec.width.saturating_sub(head.chars().count() + body.chars().count());
    let zero = spec.zero && spec.align.is_none();
    let filler = spec.fill.unwrap_or(if zero { '0' } else { ' ' });
    let align = spec.align.unwrap_or(if zero && default == '>' { '=' } else { default });
    let run = |count: usize| filler.to_string().repeat(count);
    match align {
        '<' => format!("{head}{body}{}", run(missing)),
        '^' => format!("{}{head}{body}{}", run(missing / 2), run(missing - missing / 2)),
        '=' => format!("{head}{}{body}", run(missing)),
        _ => format!("{}{head}{body}", run(missing)),
    }
}
