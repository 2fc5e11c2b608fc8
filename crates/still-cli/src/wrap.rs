//! Wraps text at spaces to a width.

use console::measure_text_width;

use crate::shown::shown;

/// Columns of text that are worth breaking for: a narrower terminal breaks lines by itself.
const NARROWEST: usize = 20;

/// `text` in lines of at most `width` columns; its own line breaks stay. A longer word has its own line. What stands between
/// backticks is a word: a command that a reader copies stays in one line.
pub fn wrapped(text: &str, width: usize) -> String {
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        let mut length = 0;
        for word in words(paragraph) {
            let more = measure_text_width(word);
            if length > 0 && length + 1 + more > width {
                lines.push(std::mem::take(&mut line));
                length = 0;
            }
            if length > 0 {
                line.push(' ');
                length += 1;
            }
            line += word;
            length += more;
        }
        lines.push(line);
    }
    lines.join("\n")
}

/// [`wrapped`] of what a model wrote: a longer word is cut, nobody copies it. What steers a terminal is shown as its escape.
pub fn quoted(text: &str, width: usize) -> String {
    let mut lines = Vec::new();
    for line in wrapped(&shown(text), width).lines() {
        let mut row = String::new();
        for c in line.chars() {
            if !row.is_empty()
                && measure_text_width(&row) + measure_text_width(c.encode_utf8(&mut [0; 4])) > width
            {
                lines.push(std::mem::take(&mut row));
            }
            row.push(c);
        }
        lines.push(row);
    }
    lines.join("\n")
}

/// A message that begins after `margin` columns of a terminal's row: what does not fit goes on below its beginning.
pub fn hanging(text: &str, margin: usize, columns: usize) -> String {
    let width = columns.saturating_sub(margin);
    if width < NARROWEST || measure_text_width(text) <= width {
        return text.to_owned();
    }
    wrapped(text, width).replace('\n', &format!("\n{}", " ".repeat(margin)))
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    // A backtick without another one quotes nothing.
    let quotes = text.matches('`').count().is_multiple_of(2);
    let mut inside = false;
    let breaks = move |c: char| {
        inside ^= quotes && c == '`';
        c.is_whitespace() && !inside
    };
    text.split(breaks).filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_at_spaces_and_keeps_its_lines() {
        assert_eq!(wrapped("one two three\n\nfour", 7), "one two\nthree\n\nfour");
        assert_eq!(wrapped("éé éé éé", 5), "éé éé\néé");
        assert_eq!(wrapped("世界 世界", 8), "世界\n世界");
        assert_eq!(wrapped("a-long-word b", 4), "a-long-word\nb");
        assert_eq!(wrapped("", 4), "");
    }

    #[test]
    fn what_a_model_wrote_fits_whatever_it_is() {
        assert_eq!(quoted("one two\n\nthree", 5), "one\ntwo\n\nthree");
        assert_eq!(quoted("aaaaaaaa bb", 3), "aaa\naaa\naa\nbb");
        assert_eq!(quoted("世界世界", 4), "世界\n世界");
        assert_eq!(quoted("a\u{1b}b", 4), "a\\u{\n1b}b");
        assert_eq!(quoted("", 4), "");
    }

    #[test]
    fn a_command_stays_whole() {
        assert_eq!(
            wrapped("first try `still chat -m a`, then", 16),
            "first try\n`still chat -m a`,\nthen"
        );
        assert_eq!(wrapped("one ` is no command", 8), "one ` is\nno\ncommand");
    }

    #[test]
    fn a_message_goes_on_below_its_beginning() {
        let text = "12,345 tokens of the run in 2 documents";
        assert_eq!(hanging(text, 13, 80), text);
        assert_eq!(hanging(text, 7, 32), "12,345 tokens of the run\n       in 2 documents");
        // Wherever a row would be too narrow for words.
        assert_eq!(hanging(text, 13, 30), text);
    }
}
