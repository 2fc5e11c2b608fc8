//! Escapes text from files, models, templates and file names, so that no character of it controls the terminal.

use std::borrow::Cow;
use std::path::Path;

/// `text` with every control character but newline and tab shown as its escape, `\u{1b}`, and so are the characters that reorder
/// what is read (bidirectional overrides).
pub fn shown(text: &str) -> Cow<'_, str> {
    escaped(text, |c| steers(c) && !matches!(c, '\n' | '\t'))
}

/// [`shown`] of what has to stay one line: a newline is escaped too.
pub fn shown_in_line(text: &str) -> Cow<'_, str> {
    escaped(text, |c| steers(c) && c != '\t')
}

/// A path as a word of a command that is suggested: quoted where a shell needs it, so that it can be pasted.
pub fn in_shell(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%".contains(c);
    if !text.is_empty() && !text.starts_with('-') && text.chars().all(plain) {
        return text.into_owned();
    }
    // A path that begins with a hyphen would be an option.
    let text = if text.starts_with('-') { format!("./{text}").into() } else { text };
    shlex::try_quote(&text).map_or_else(|_| text.to_string(), Cow::into_owned)
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

    #[test]
    fn a_suggested_path_is_one_word_of_a_shell() {
        for plain in ["my-student", "/a/b_c.run", "Schüler", "demo"] {
            assert_eq!(in_shell(Path::new(plain)), plain);
        }
        for path in ["my student", "it's", "a$b", "a;b", "~x", "", "a\"b"] {
            let words = shlex::split(&in_shell(Path::new(path)));
            assert_eq!(words, Some(vec![path.to_owned()]), "{path:?}");
        }
        assert_eq!(in_shell(Path::new("-x y")), "'./-x y'");
        assert_eq!(in_shell(Path::new("-x")), "./-x");
    }
}
