//! Layout of text: boxes, and lines that fit a width.
//!
//! A drawing cannot ask how wide a page's type is; what is estimated here is rather too wide than too narrow.

/// Size of the words, as the page's style has it.
const TYPE: f64 = 12.0;
/// Width of a letter, as a share of the type's size.
const LETTER: f64 = 0.6;
/// From one line of words to the next, in the drawing's units.
pub const LINE: f64 = 13.0;

/// Width of a text in the charts' type.
pub fn width(text: &str) -> f64 {
    LETTER * TYPE * text.chars().count() as f64
}

/// Which part of a text lies at its x.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// A rectangle of the drawing.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    pub left: f64,
    pub right: f64,
    pub top: f64,
    pub bottom: f64,
}

impl Area {
    /// Of a text whose line stands at `y`.
    pub fn of_text(text: &str, anchor: Anchor, x: f64, y: f64) -> Self {
        let width = width(text);
        let left = match anchor {
            Anchor::Start => x,
            Anchor::Middle => x - width / 2.0,
            Anchor::End => x - width,
        };
        Self { left, right: left + width, top: y - 0.75 * TYPE, bottom: y + 0.2 * TYPE }
    }

    /// The square around a dot.
    pub fn around(x: f64, y: f64, radius: f64) -> Self {
        Self { left: x - radius, right: x + radius, top: y - radius, bottom: y + radius }
    }

    /// Whether two share a place.
    pub fn meets(&self, other: &Self) -> bool {
        self.left < other.right
            && other.left < self.right
            && self.top < other.bottom
            && other.top < self.bottom
    }
}

/// A text in lines that are no wider than `room`: broken behind `_`, `-` and spaces, and where a word alone is wider, inside it.
pub fn wrapped(text: &str, room: f64) -> Vec<String> {
    let most = ((room / width("x")) as usize).max(1);
    let mut lines: Vec<String> = Vec::new();
    let letters = |text: &str| text.chars().count();
    for word in text.split_inclusive(['_', '-', ' ']) {
        let fits = |line: &&mut String| letters(line) + letters(word.trim_end()) <= most;
        if let Some(line) = lines.last_mut().filter(fits) {
            line.push_str(word);
            continue;
        }
        let word: Vec<char> = word.chars().collect();
        lines.extend(word.chunks(most).map(|part| part.iter().collect::<String>()));
    }
    lines.iter().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
}

/// The words of an SVG drawing, with the class and the area of each, for tests of what lies where.
#[cfg(test)]
pub fn words_of(html: &str) -> Vec<(String, String, Area)> {
    let attribute = |element: &str, name: &str| -> String {
        let from = element.find(&format!(" {name}=\"")).expect("the attribute") + name.len() + 3;
        element[from..].split('"').next().unwrap().to_owned()
    };
    let words = html.split("<text").skip(1).map(|element| {
        let (element, text) = element.split('<').next().unwrap().split_once('>').unwrap();
        let class = attribute(element, "class");
        let anchor = match class.as_str() {
            "y" | "name" => Anchor::End,
            "beside" => Anchor::Start,
            _ => Anchor::Middle,
        };
        let [x, y] = ["x", "y"].map(|name| attribute(element, name).parse::<f64>().unwrap());
        (class, text.to_owned(), Area::of_text(text, anchor, x, y))
    });
    words.collect()
}

/// Fails where two words lie on each other or one leaves the drawing.
#[cfg(test)]
pub fn assert_readable(html: &str) {
    let words = words_of(html);
    let view = html.split("viewBox=\"0 0 ").nth(1).unwrap().split('"').next().unwrap();
    let (width, height) = view.split_once(' ').unwrap();
    let (width, height): (f64, f64) = (width.parse().unwrap(), height.parse().unwrap());
    for (n, (_, text, area)) in words.iter().enumerate() {
        for (_, other, at) in &words[..n] {
            assert!(!area.meets(at), "{text:?} {area:?} lies on {other:?} {at:?}");
        }
        let inside = area.left >= 0.0 && area.right <= width && area.bottom <= height;
        assert!(inside, "{text:?} {area:?} leaves the drawing of {width} by {height}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_where_words_end_and_lose_nothing() {
        let lines = |text, letters| wrapped(text, f64::from(letters) * width("x"));
        assert_eq!(lines("piqa", 4), ["piqa"]);
        assert_eq!(lines("repeated_text_4096", 11), ["repeated_", "text_4096"]);
        assert_eq!(lines("a few words", 5), ["a few", "words"]);
        assert_eq!(lines("lambada_openai", 5), ["lamba", "da_", "opena", "i"]);
        assert_eq!(lines("ööö", 1), ["ö", "ö", "ö"]);
        assert!(lines("", 5).is_empty());
        for letters in 1..20 {
            let text = "niah_multivalue_131072";
            let lines = lines(text, letters);
            assert_eq!(lines.concat(), text);
            assert!(lines.iter().all(|line| line.len() <= letters as usize), "{lines:?}");
        }
    }

    #[test]
    fn areas_meet_where_they_share_a_place() {
        let at = |x, y| Area::of_text("word", Anchor::Start, x, y);
        assert!(at(0.0, 20.0).meets(&at(10.0, 25.0)));
        assert!(!at(0.0, 20.0).meets(&at(width("word"), 20.0)));
        assert!(!at(0.0, 20.0).meets(&at(0.0, 20.0 + LINE)));
        let ends = |anchor| Area::of_text("word", anchor, 100.0, 20.0).left;
        assert_eq!(ends(Anchor::End), 100.0 - width("word"));
        assert_eq!(ends(Anchor::Middle), 100.0 - width("word") / 2.0);
    }
}
