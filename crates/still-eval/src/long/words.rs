//! Words, numbers and UUIDs for keys, values and lists.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use petname::Petnames;
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

static MEDIUM: LazyLock<Petnames<'static>> = LazyLock::new(Petnames::medium);

/// What keys and values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `adjective-noun`
    Words,
    /// Seven digits.
    Numbers,
    /// Version 4.
    Uuids,
}

impl Kind {
    pub fn plural(self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Numbers => "numbers",
            Self::Uuids => "uuids",
        }
    }

    pub fn singular(self) -> &'static str {
        match self {
            Self::Words => "word",
            Self::Numbers => "number",
            Self::Uuids => "uuid",
        }
    }

    pub fn draw(self, rng: &mut ChaCha8Rng) -> String {
        match self {
            Self::Words => {
                let mut word = |words: &[&'static str]| words.choose(rng).copied().unwrap_or("a");
                let adjective = word(&MEDIUM.adjectives);
                format!("{adjective}-{}", word(&MEDIUM.nouns))
            }
            Self::Numbers => rng.random_range(1_000_000..10_000_000).to_string(),
            Self::Uuids => uuid(rng.random()),
        }
    }

    /// One that is not among `taken`, to which it is added.
    pub fn draw_new(self, taken: &mut BTreeSet<String>, rng: &mut ChaCha8Rng) -> String {
        loop {
            let drawn = self.draw(rng);
            if taken.insert(drawn.clone()) {
                return drawn;
            }
        }
    }
}

fn uuid(bits: u128) -> String {
    // Version 4, variant 1.
    let bits = bits & !(0xf << 76) | 4 << 76;
    let bits = bits & !(0b11 << 62) | 0b10 << 62;
    let hex = format!("{bits:032x}");
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    parts.join("-")
}

/// Different words, at least `count` if there are so many: the usual ones or, where those are too few, rare ones too.
pub(super) fn different_words(count: usize) -> &'static [&'static str] {
    static USUAL: LazyLock<Vec<&'static str>> = LazyLock::new(|| all(&MEDIUM));
    static RARE: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
        static LARGE: LazyLock<Petnames<'static>> = LazyLock::new(Petnames::large);
        all(&LARGE)
    });
    if count <= USUAL.len() { &USUAL } else { &RARE }
}

fn all(names: &'static Petnames<'static>) -> Vec<&'static str> {
    let lists = [&names.adjectives, &names.nouns, &names.adverbs];
    let words: BTreeSet<_> = lists.into_iter().flat_map(|list| list.iter().copied()).collect();
    words.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_of_version_4() {
        for bits in [0, u128::MAX, 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef] {
            let uuid = uuid(bits);
            let lengths: Vec<_> = uuid.split('-').map(str::len).collect();
            assert_eq!(lengths, [8, 4, 4, 4, 12], "{uuid}");
            assert_eq!(uuid.as_bytes()[14], b'4', "{uuid}");
            assert!("89ab".contains(char::from(uuid.as_bytes()[19])), "{uuid}");
        }
    }

    #[test]
    fn there_are_words_for_long_lists() {
        assert!(different_words(3_000).len() >= 3_000);
        assert!(different_words(20_000).len() >= 20_000);
    }
}
