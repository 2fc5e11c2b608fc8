//! How answers over long contexts are judged.

/// A rule that gives an answer 0 to 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judge {
    /// RULER's `string_match_all`: the share of the targets that the answer contains, whatever their case.
    All,
    /// RULER's `string_match_part`: whether it contains any.
    Part,
    /// BABILong's rule: up to its first full stop, the answer names the target and no other of the task's labels,
    /// apart from those that the question names.
    OnlyLabel {
        /// The task's labels.
        labels: &'static [&'static str],
        /// The question.
        question: String,
    },
    /// The answer begins with the digits of the target, and no more digits.
    Digits,
}

impl Judge {
    /// Judges an answer.
    pub fn score(&self, targets: &[String], answer: &str) -> f64 {
        let lower = answer.to_lowercase();
        let contains = |target: &&String| lower.contains(&target.to_lowercase());
        match self {
            Self::All => {
                let found = targets.iter().filter(contains).count();
                found as f64 / targets.len().max(1) as f64
            }
            Self::Part => f64::from(u8::from(targets.iter().any(|target| contains(&target)))),
            Self::OnlyLabel { labels, question } => {
                let said = ["<context>", "<example>", "."]
                    .into_iter()
                    .fold(lower.as_str(), |said, end| said.split(end).next().unwrap_or_default());
                let question = question.to_lowercase();
                let mut named = labels.iter().map(|label| label.to_lowercase()).filter(|label| {
                    said.contains(label.as_str()) && !question.contains(label.as_str())
                });
                let only = named.next().filter(|_| named.next().is_none());
                let right =
                    only.is_some_and(|label| targets.iter().any(|t| t.to_lowercase() == label));
                f64::from(u8::from(right))
            }
            Self::Digits => {
                let digits = answer.trim_start().chars().take_while(char::is_ascii_digit);
                let digits: String = digits.collect();
                f64::from(u8::from(targets.contains(&digits)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn ruler_matches_strings_whatever_their_case() {
        let targets = strings(&["Alpha", "beta", "42"]);
        assert_eq!(Judge::All.score(&targets, " ALPHA and 142"), 2.0 / 3.0);
        assert_eq!(Judge::All.score(&targets, "gamma"), 0.0);
        assert_eq!(Judge::Part.score(&targets, "gamma Beta"), 1.0);
        assert_eq!(Judge::Part.score(&targets, "gamma"), 0.0);
    }

    #[test]
    fn babilong_takes_one_label_of_the_first_sentence() {
        let labels: &[&str] = &["Bill", "Fred", "milk"];
        let judge = Judge::OnlyLabel { labels, question: "What did Fred give to whom?".into() };
        let milk = strings(&["milk"]);
        for (answer, right) in [
            (" Milk", 1.0),
            ("Fred gave the milk. Then Bill came.", 1.0),
            ("the milk<example> bill", 1.0),
            ("milk and Bill", 0.0),
            ("Bill", 0.0),
            ("I cannot say. milk", 0.0),
            ("", 0.0),
        ] {
            assert_eq!(judge.score(&milk, answer), right, "{answer}");
        }
        assert_eq!(judge.score(&strings(&["Bill"]), "to bill"), 1.0);
    }

    #[test]
    fn only_the_whole_key_is_right() {
        let key = strings(&["12345"]);
        let right = |answer| Judge::Digits.score(&key, answer) == 1.0;
        assert!(right(" 12345."));
        assert!(right("12345"));
        assert!(!right(" 1234"));
        assert!(!right(" 123456"));
        assert!(!right(" the key 12345"));
        assert!(!right(" key 12345"));
        assert!(!right(""));
    }
}
