//! Source to tokens, as Jinja2's lexer with `trim_blocks` and `lstrip_blocks`.

use super::escapes::unescape;
use crate::error::{Error, ErrorKind, Result};
use crate::python::is_space;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Tok<'s> {
    Data(&'s str),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(&'s str),
    Str(String),
    Int(i128),
    Float(f64),
    Op(&'static str),
    Eof,
}

#[derive(Clone, Debug)]
pub(crate) struct Token<'s> {
    pub line: u32,
    pub tok: Tok<'s>,
}

/// Longest first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";",
];

/// Line ends become `\n`, and one at the end of the source is not part of it.
pub(crate) fn normalize(source: &str) -> String {
    let mut text = source.replace("\r\n", "\n").replace('\r', "\n");
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

/// Tokens of a normalized source, [`Tok::Eof`] at the end.
pub(crate) fn tokenize(source: &str) -> Result<Vec<Token<'_>>> {
    let mut lexer = Lexer { rest: source, line: 1, tokens: Vec::new(), line_starting: true };
    lexer.root()?;
    let line = lexer.line;
    lexer.tokens.push(Token { line, tok: Tok::Eof });
    Ok(lexer.tokens)
}

struct Lexer<'s> {
    rest: &'s str,
    line: u32,
    tokens: Vec<Token<'s>>,
    /// Whether what was read last ended in a line end.
    line_starting: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tag {
    Variable,
    Block,
    Comment,
}

impl<'s> Lexer<'s> {
    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::new(ErrorKind::Syntax, message).on_line(self.line))
    }

    fn push(&mut self, tok: Tok<'s>) {
        self.tokens.push(Token { line: self.line, tok });
    }

    fn advance(&mut self, bytes: usize) -> &'s str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.line += taken.bytes().filter(|&byte| byte == b'\n').count() as u32;
        if !taken.is_empty() {
            self.line_starting = taken.ends_with('\n');
        }
        self.rest = rest;
        taken
    }

    fn skip_spaces(&mut self) {
        self.advance(spaces(self.rest));
    }

    fn root(&mut self) -> Result<()> {
        while !self.rest.is_empty() {
            let Some((at, tag)) = next_tag(self.rest) else {
                let text = self.rest;
                self.push(Tok::Data(text));
                self.advance(text.len());
                return Ok(());
            };
            let sign = self.rest[at + 2..].chars().next().filter(|c| matches!(c, '-' | '+'));
            let raw = if tag == Tag::Block { raw_begin(&self.rest[at..]) } else { None };
            self.data(at, sign, tag != Tag::Variable);
            if let Some(length) = raw {
                self.advance(length);
                self.raw()?;
                continue;
            }
            self.advance(2 + sign.map_or(0, char::len_utf8));
            match tag {
                Tag::Comment => self.comment()?,
                Tag::Variable => {
                    self.push(Tok::VariableBegin);
                    self.inside("}}", false)?;
                    self.push(Tok::VariableEnd);
                }
                Tag::Block => {
                    self.push(Tok::BlockBegin);
                    self.inside("%}", true)?;
                    self.push(Tok::BlockEnd);
                }
            }
        }
        Ok(())
    }

    /// The text before a tag, without the white space that the tag takes.
    fn data(&mut self, length: usize, sign: Option<char>, strips_lines: bool) {
        let text = &self.rest[..length];
        let kept = match sign {
            Some('-') => text.trim_end_matches(is_space),
            None if strips_lines => {
                let line = text.rfind('\n').map_or(0, |at| at + 1);
                let blank = text[line..].chars().all(is_space);
                if blank && (line > 0 || self.line_starting) { &text[..line] } else { text }
            }
            _ => text,
        };
        if !kept.is_empty() {
            self.push(Tok::Data(kept));
        }
        let starting = self.line_starting;
        self.advance(length);
        if length == 0 {
            self.line_starting = starting;
        }
    }

    fn comment(&mut self) -> Result<()> {
        let Some(at) = self.rest.find("#}") else {
            return self.fail("missing end of comment tag");
        };
        let sign = self.rest[..at].chars().next_back();
        self.advance(at + 2);
        self.after_end(sign, true);
        Ok(())
    }

    /// White space after `%}`, `#}` or, without `trims`, `}}`.
    fn after_end(&mut self, sign: Option<char>, trims: bool) {
        match sign {
            Some('-') => self.skip_spaces(),
            Some('+') => {}
            _ if trims && self.rest.starts_with('\n') => {
                self.advance(1);
            }
            _ => {}
        }
    }

    fn raw(&mut self) -> Result<()> {
        let mut from = 0;
        while let Some(at) = self.rest[from..].find("{%").map(|at| at + from) {
            let mut after = &self.rest[at + 2..];
            let sign = after.chars().next().filter(|c| matches!(c, '-' | '+'));
            after = &after[sign.map_or(0, char::len_utf8)..];
            after = after.trim_start_matches(is_space);
            if let Some(rest) = after.strip_prefix("endraw") {
                let rest = rest.trim_start_matches(is_space);
                let end = rest.chars().next().filter(|c| matches!(c, '-' | '+'));
                let rest = &rest[end.map_or(0, char::len_utf8)..];
                if let Some(rest) = rest.strip_prefix("%}") {
                    let length = self.rest.len() - rest.len();
                    self.data(at, sign, true);
                    self.advance(length - at);
                    self.after_end(end, true);
                    return Ok(());
                }
            }
            from = at + 2;
        }
        self.fail("missing end of raw directive")
    }

    /// Tokens up to the end of a tag.
    fn inside(&mut self, end: &str, block: bool) -> Result<()> {
        let mut open: Vec<char> = Vec::new();
        loop {
            self.skip_spaces();
            let Some(c) = self.rest.chars().next() else {
                return self.fail("unexpected end of the template inside a tag");
            };
            if open.is_empty() {
                let sign = Some(c).filter(|&c| c == '-' || (block && c == '+'));
                if self.rest[sign.map_or(0, char::len_utf8)..].starts_with(end) {
                    self.advance(sign.map_or(0, char::len_utf8) + 2);
                    self.after_end(sign, block);
                    return Ok(());
                }
            }
            match c {
                '0'..='9' => self.number()?,
                '\'' | '"' => self.string(c)?,
                c if c == '_' || c.is_alphabetic() => {
                    let word = |c: char| c == '_' || c.is_alphanumeric();
                    let length = self.rest.find(|c: char| !word(c)).unwrap_or(self.rest.len());
                    let name = &self.rest[..length];
                    self.push(Tok::Name(name));
                    self.advance(length);
                }
                _ => {
                    let Some(operator) = OPERATORS.iter().find(|op| self.rest.starts_with(**op))
                    else {
                        return self.fail(format!("unexpected character {c:?}"));
                    };
                    match *operator {
                        "(" => open.push(')'),
                        "[" => open.push(']'),
                        "{" => open.push('}'),
                        ")" | "]" | "}" => match open.pop() {
                            None => return self.fail(format!("unexpected '{c}'")),
                            Some(expected) if expected != c => {
                                return self
                                    .fail(format!("unexpected '{c}', expected '{expected}'"));
                            }
                            Some(_) => {}
                        },
                        _ => {}
                    }
                    self.push(Tok::Op(operator));
                    self.advance(operator.len());
                }
            }
        }
    }

    fn number(&mut self) -> Result<()> {
        // After a dot a number is an index, never the beginning of a fraction.
        let after_dot = matches!(self.tokens.last(), Some(Token { tok: Tok::Op("."), .. }));
        let text = self.rest;
        let bytes = text.as_bytes();
        let radix = match bytes.get(1).map(u8::to_ascii_lowercase) {
            Some(b'x') if bytes[0] == b'0' => 16,
            Some(b'o') if bytes[0] == b'0' => 8,
            Some(b'b') if bytes[0] == b'0' => 2,
            _ => 10,
        };
        let digits = |from: usize, radix: u32| {
            let valid = |b: u8| b == b'_' || (b as char).is_digit(radix);
            from + bytes[from..].iter().take_while(|&&b| valid(b)).count()
        };
        let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
        if radix != 10 {
            let end = digits(2, radix);
            let value = i128::from_str_radix(&text[2..end].replace('_', ""), radix);
            return self.int(value, end);
        }
        let mut end = digits(0, 10);
        let whole = end;
        if !after_dot {
            if bytes.get(end) == Some(&b'.') && is_digit(end + 1) {
                end = digits(end + 1, 10);
            }
            if bytes.get(end).is_some_and(|b| b.eq_ignore_ascii_case(&b'e')) {
                let signed = matches!(bytes.get(end + 1), Some(b'+' | b'-')) as usize;
                if is_digit(end + 1 + signed) {
                    end = digits(end + 1 + signed, 10);
                }
            }
        }
        let literal = text[..end].replace('_', "");
        if end == whole {
            return self.int(literal.parse(), end);
        }
        let Ok(value) = literal.parse() else {
            return self.fail(format!("{literal} is not a number"));
        };
        self.push(Tok::Float(value));
        self.advance(end);
        Ok(())
    }

    fn int(
        &mut self,
        value: std::result::Result<i128, std::num::ParseIntError>,
        length: usize,
    ) -> Result<()> {
        match value {
            Ok(value) => {
                self.push(Tok::Int(value));
                self.advance(length);
                Ok(())
            }
            Err(_) => self.fail("a number that is too large"),
        }
    }

    fn string(&mut self, quote: char) -> Result<()> {
        let mut escaped = false;
        let end = self.rest[1..].find(|c: char| {
            let ends = c == quote && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let Some(end) = end else {
            return self.fail("a string that does not end");
        };
        match unescape(&self.rest[1..end + 1]) {
            Ok(text) => self.push(Tok::Str(text)),
            Err(what) => return self.fail(what),
        }
        self.advance(end + 2);
        Ok(())
    }
}

fn spaces(text: &str) -> usize {
    text.len() - text.trim_start_matches(is_space).len()
}

fn next_tag(text: &str) -> Option<(usize, Tag)> {
    let mut from = 0;
    while let Some(at) = text[from..].find('{').map(|at| at + from) {
        match text.as_bytes().get(at + 1) {
            Some(b'%') => return Some((at, Tag::Block)),
            Some(b'{') => return Some((at, Tag::Variable)),
            Some(b'#') => return Some((at, Tag::Comment)),
            _ => from = at + 1,
        }
    }
    None
}

/// The length of `{% raw %}` if the text begins with it.
fn raw_begin(text: &str) -> Option<usize> {
    let rest = text.strip_prefix("{%")?;
    let rest = rest.strip_prefix(['-', '+']).unwrap_or(rest);
    let rest = rest.trim_start_matches(is_space).strip_prefix("raw")?;
    let rest = rest.trim_start_matches(is_space);
    let rest = match rest.strip_prefix("-%}") {
        Some(rest) => rest.trim_start_matches(is_space),
        None => rest.strip_prefix("%}")?,
    };
    Some(text.len() - rest.len())
}
