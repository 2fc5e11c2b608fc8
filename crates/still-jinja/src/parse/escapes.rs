//! Escapes in string literals.

/// Python's escapes.
pub(super) fn unescape(text: &str) -> std::result::Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    let mut high = None;
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let Some(escape) = chars.next() else {
            return Err("a string that ends in a backslash".into());
        };
        let simple = match escape {
            '\n' => continue,
            'n' => Some('\n'),
            't' => Some('\t'),
            'r' => Some('\r'),
            'a' => Some('\x07'),
            'b' => Some('\x08'),
            'f' => Some('\x0c'),
            'v' => Some('\x0b'),
            '\\' | '\'' | '"' => Some(escape),
            _ => None,
        };
        if let Some(simple) = simple {
            out.push(simple);
            continue;
        }
        let digits = match escape {
            'N' => return Err("characters by name (\\N) are not supported".into()),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            '0'..='7' => {
                let mut code = escape as u32 - '0' as u32;
                for _ in 0..2 {
                    match chars.peek().and_then(|c| c.to_digit(8)) {
                        Some(digit) => {
                            code = code * 8 + digit;
                            chars.next();
                        }
                        None => break,
                    }
                }
                out.push(char::from_u32(code).unwrap_or('\u{FFFD}'));
                continue;
            }
            other => {
                out.push('\\');
                out.push(other);
                continue;
            }
        };
        let hex: String = chars.by_ref().take(digits).collect();
        let valid = hex.len() == digits && hex.bytes().all(|b| b.is_ascii_hexdigit());
        let code = u32::from_str_radix(&hex, 16).ok().filter(|_| valid);
        let Some(code) = code else {
            return Err(format!("truncated \\{escape} escape"));
        };
        match (high.take(), code) {
            (None, 0xD800..0xDC00) => high = Some(code),
            (Some(first), 0xDC00..0xE000) => {
                let code = 0x10000 + ((first - 0xD800) << 10) + (code - 0xDC00);
                out.extend(char::from_u32(code));
            }
            (_, code) => match char::from_u32(code) {
                Some(c) => out.push(c),
                None => return Err(format!("\\{escape}{hex} is not a character")),
            },
        }
    }
    Ok(out)
}
