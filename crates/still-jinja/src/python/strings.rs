//! What methods and filters of text share.

use super::is_space;
use crate::error::Result;
use crate::meter::Meter;

/// Whether a character has two cases, and which this is.
pub(crate) fn is_cased(c: char) -> bool {
    c.is_uppercase() || c.is_lowercase() || is_title(c)
}

fn is_title(c: char) -> bool {
    matches!(c, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ')
}

pub(crate) fn upper_first(word: &str) -> String {
    let mut chars = word.chars();
    match chars.next() {
        Some(first) => title_char(first) + &chars.as_str().to_lowercase(),
        None => String::new(),
    }
}

/// Title case: `ß` becomes `Ss`, not `SS`.
fn title_char(c: char) -> String {
    match c {
        'Ǆ'..='ǆ' => "ǅ".into(),
        'Ǉ'..='ǉ' => "ǈ".into(),
        'Ǌ'..='ǌ' => "ǋ".into(),
        'Ǳ'..='ǳ' => "ǲ".into(),
        c => {
            let mut upper = c.to_uppercase();
            let first: String = upper.next().into_iter().collect();
            first + &upper.flat_map(char::to_lowercase).collect::<String>()
        }
    }
}

/// `str.title`: a word begins after anything that has no case.
pub(crate) fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.push_str(&title_char(c));
        }
        inside = is_cased(c);
    }
    out
}

/// `str.splitlines`.
pub(crate) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(at) = rest.find(ends) else {
            lines.push(rest);
            break;
        };
        let end = if rest[at..].starts_with("\r\n") {
            at + 2
        } else {
            at + rest[at..].chars().next().map_or(1, char::len_utf8)
        };
        lines.push(&rest[..if keep_ends { end } else { at }]);
        rest = &rest[end..];
    }
    lines
}

/// `str.split` without a separator.
pub(crate) fn split_spaces(text: &str, most: Option<usize>) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        if most == Some(parts.len()) {
            parts.push(rest);
            break;
        }
        let end = rest.find(is_space).unwrap_or(rest.len());
        parts.push(&rest[..end]);
        rest = rest[end..].trim_start_matches(is_space);
    }
    parts
}

/// `str.rsplit` without a separator.
pub(crate) fn rsplit_spaces(text: &str, most: Option<usize>) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while !rest.is_empty() {
        if most == Some(parts.len()) {
            parts.push(rest);
            break;
        }
        let start = rest.char_indices().rev().find(|&(_, c)| is_space(c));
        let start = start.map_or(0, |(at, c)| at + c.len_utf8());
        parts.push(&rest[start..]);
        rest = rest[..start].trim_end_matches(is_space);
    }
    parts.reverse();
    parts
}

/// `str.islower` and `str.isupper`.
pub(crate) fn has_case(text: &str, upper: bool) -> bool {
    let mut cased = false;
    for c in text.chars().filter(|&c| is_cased(c)) {
        if c.is_uppercase() != upper || c.is_lowercase() == upper {
            return false;
        }
        cased = true;
    }
    cased
}

/// `str.replace`, at most `count` times if that is not negative.
pub(crate) fn replace(
    text: &str,
    old: &str,
    new: &str,
    count: i128,
    meter: &Meter,
) -> Result<String> {
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    let places = match old.is_empty() {
        true => text.chars().count() + 1,
        false => text.matches(old).count(),
    };
    let written = places.min(most).saturating_mul(new.len()).saturating_add(text.len());
    meter.bytes(text.len().saturating_add(written))?;
    Ok(text.replacen(old, new, most))
}

/// Text filled up to a width.
pub(crate) fn pad(text: &str, width: i128, fill: char, how: &str, meter: &Meter) -> Result<String> {
    let length = text.chars().count();
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(length);
    meter.bytes(text.len().saturating_add(missing.saturating_mul(4)))?;
    let left = match how {
        "ljust" => 0,
        "rjust" => missing,
        // As Python: the odd one goes to the left where the width is odd.
        _ => missing / 2 + (missing & width as usize & 1),
    };
    let mut out = String::with_capacity(text.len() + missing * fill.len_utf8());
    out.extend(std::iter::repeat_n(fill, left));
    out.push_str(text);
    out.extend(std::iter::repeat_n(fill, missing - left));
    Ok(out)
}

/// Digits of any script: zero to nine lie together, and only letters and other numbers lie elsewhere.
pub(crate) fn is_decimal(c: char) -> bool {
    c.is_ascii_digit()
        || (c.is_numeric()
            && !is_super_digit(c)
            && !is_letter_number(c)
            && !matches!(c, '\u{BC}'..='\u{BE}' | '\u{2150}'..='\u{218B}' | '\u{2460}'..='\u{24FF}'
                | '\u{2776}'..='\u{2793}' | '\u{3192}'..='\u{3195}' | '\u{3220}'..='\u{3229}'
                | '\u{3248}'..='\u{324F}' | '\u{3251}'..='\u{325F}' | '\u{3280}'..='\u{3289}'
                | '\u{32B1}'..='\u{32BF}'))
}

pub(crate) fn is_super_digit(c: char) -> bool {
    matches!(c, '²' | '³' | '¹' | '\u{2070}' | '\u{2074}'..='\u{2079}' | '\u{2080}'..='\u{2089}'
        | '\u{2460}'..='\u{2468}' | '\u{2474}'..='\u{247C}' | '\u{2488}'..='\u{2490}')
}

/// Roman numerals and the like are numbers, not letters.
pub(crate) fn is_letter_number(c: char) -> bool {
    matches!(c, '\u{2160}'..='\u{2188}' | '\u{3007}' | '\u{3021}'..='\u{3029}' | '\u{16EE}'..='\u{16F0}')
}

/// Text as HTML.
pub(crate) fn escape(text: &str, meter: &Meter) -> Result<String> {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    meter.bytes(out.len())?;
    Ok(out)
}
