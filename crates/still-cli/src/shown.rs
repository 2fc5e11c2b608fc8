//! Text of others (files, models, templates, file names) on a terminal: no character of it steers the terminal.

use std::borrow::Cow;

/// `text` with every control character but newline and tab shown as its escape, `\u{1b}`, and so are the characters that reorder
/// what is read (bidirectional overrides).
pub fn shown(text: &str) -> Cow<'_, str> {
    escaped(text, |c| steers(c) && !matches!(c, '\n' | '\t'))
}

/// [`shown`] of what has to stay one line: a newline is escaped too.
pub fn shown_in_line(text: &str) -> Cow<'_, str> {
    escaped(text, |c| steers(c) && c != '\t')
}

/// C0, DEL and C1, line and paragraph separators, bidirectional embeddings, overrides and isolates.
pub fn steers(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(text: &str, escapes: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&escapes) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if escapes(c) { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_escaped_and_nothing_else() {
        let harmless = "Grüße, 世界 👩‍🚀\n\ttab";
        assert!(matches!(shown(harmless), Cow::Borrowed(same) if same == harmless));
        assert_eq!(shown("\u{1b}]0;title\u{7}"), r"\u{1b}]0;title\u{7}");
        assert_eq!(shown("a\rb\u{9b}2J\u{7f}"), r"a\rb\u{9b}2J\u{7f}");
        assert_eq!(shown("abc\u{202e}def"), r"abc\u{202e}def");
        assert_eq!(shown_in_line("a\nerror: b\tc"), "a\\nerror: b\tc");
    }
}
