//! HellaSwag's text, as the harness cleans it.

/// The harness's `preprocess`: headings become sentences, bracketed leftovers of WikiHow go.
pub fn preprocess(text: &str) -> String {
    without_brackets(&text.trim().replace(" [title]", ". ")).replace("  ", " ")
}

/// Without every `[`, the `]` after it and what lies between, as `re.sub(r"\[.*?\]", "")`.
fn without_brackets(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find('[') {
        // The expression's dot matches no line break.
        let inside = &rest[open + 1..];
        let close = inside.find(']').filter(|&close| !inside[..close].contains('\n'));
        match close {
            Some(close) => {
                kept.push_str(&rest[..open]);
                rest = &inside[close + 1..];
            }
            None => {
                kept.push_str(&rest[..=open]);
                rest = inside;
            }
        }
    }
    kept + rest
}

/// `Label: Sentences. the beginning of one` → `Label: Sentences. The beginning of one`.
///
/// The harness joins `ctx_a` and `ctx_b.capitalize()`; data files that hold the joined context have lost the capital. What
/// follows the last full stop, begins in lower case and ends without one is the `ctx_b` of an item from ActivityNet.
pub fn capitalize_beginning(query: &str) -> String {
    let mut start = 0;
    let mut ended = false;
    for (at, c) in query.char_indices() {
        match c {
            '.' | '!' | '?' => ended = true,
            c if c.is_whitespace() && ended => start = at + c.len_utf8(),
            _ => ended = false,
        }
    }
    let (before, beginning) = query.split_at(start);
    let lower = beginning.starts_with(char::is_lowercase);
    if !lower || beginning.ends_with(['.', '!', '?']) {
        return query.to_owned();
    }
    let mut chars = beginning.chars();
    let first = chars.next().map(char::to_uppercase).into_iter().flatten();
    before.chars().chain(first).chain(chars.as_str().to_lowercase().chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_and_headings_go() {
        assert_eq!(
            preprocess(" Bake it [title] Wait [step] a while "),
            "Bake it.  Wait a while".replace("  ", " ")
        );
        assert_eq!(preprocess("see [a [b] c] here"), "see c] here");
        assert_eq!(preprocess("open [ for ever"), "open [ for ever");
        assert_eq!(preprocess("[one\n] stays"), "[one\n] stays");
    }

    #[test]
    fn only_a_sentences_beginning_is_capitalized() {
        let cases = [
            ("Rowing: Two men sit in a boat. the men", "Rowing: Two men sit in a boat. The men"),
            ("Rowing: A boat! a Man in it", "Rowing: A boat! A man in it"),
            ("Health: How to rest. Lie down.", "Health: How to rest. Lie down."),
            (
                "Travel: From 6 a.m. to noon it is closed.",
                "Travel: From 6 a.m. to noon it is closed.",
            ),
            ("Rowing: the men", "Rowing: the men"),
            ("", ""),
        ];
        for (query, expected) in cases {
            assert_eq!(capitalize_beginning(query), expected);
        }
    }
}
