//! A comparison of student and teacher in a sentence, and what to do next.

use still_eval::Interval;

use super::row::{Recall, Row};

/// How close a student is to its teacher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Quality {
    /// At most 1.02 times the teacher's perplexity, and nothing lost that the teacher finds.
    AsGood,
    /// At most 1.1 times, and nothing lost.
    Close,
    /// At most 1.3 times, and at least half of what the teacher finds.
    Usable,
    /// Anything else.
    NotYet,
    /// Neither perplexity nor recall was measured.
    Unknown,
}

impl Quality {
    /// Of a student compared with its teacher.
    pub fn of(teacher: &Row, student: &Row) -> Self {
        let ratio = student.perplexity_ratio.map(|ratio| ratio.mean);
        let ((had, asked), (has, _)) = (teacher.found(), student.found());
        if ratio.is_none() && asked == 0 {
            return Self::Unknown;
        }
        let within = |most: f64| ratio.is_none_or(|ratio| ratio <= most);
        match () {
            () if within(1.02) && has >= had => Self::AsGood,
            () if within(1.1) && has >= had => Self::Close,
            () if within(1.3) && 2 * has >= had => Self::Usable,
            () => Self::NotYet,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::AsGood => "As good as its teacher",
            Self::Close => "Close to its teacher",
            Self::Usable => "Usable, with losses",
            Self::NotYet => "Not good yet",
            Self::Unknown => "Not judged",
        }
    }

    /// The comparison: quality, then cost.
    pub fn sentence(self, teacher: &Row, student: &Row) -> String {
        let mut quality = Vec::new();
        if let Some(Interval { mean, low, high }) = student.perplexity_ratio {
            quality.push(format!(
                "perplexity is {mean:.3} times the teacher's (95 %: {low:.3} to {high:.3})"
            ));
        }
        for (had, has) in teacher.recall.iter().zip(&student.recall) {
            quality.push(format!("the student finds {}", found_words(had, has)));
        }
        let mut sentence = self.words().to_owned();
        if !quality.is_empty() {
            sentence += &format!(": {}", quality.join("; "));
        }
        sentence.push('.');
        if let Some(cost) = cost(teacher, student) {
            sentence += &format!(" {cost}");
        }
        sentence
    }
}

/// What a student takes of its teacher's bytes and time, in a sentence; nothing if neither was measured.
pub fn cost(teacher: &Row, student: &Row) -> Option<String> {
    let bytes = teacher.cache_bytes.zip(student.cache_bytes).map(|(dense, bytes)| {
        let share = 100.0 * bytes as f64 / dense as f64;
        format!("takes {share:.0} % of the teacher's cache bytes")
    });
    let speeds = teacher.decode_tokens_per_s.zip(student.decode_tokens_per_s);
    let speed = speeds.map(|(slow, fast)| {
        let whose = if bytes.is_some() { "its" } else { "the teacher's" };
        format!("decodes at {:.1} times {whose} speed", fast / slow)
    });
    let parts: Vec<String> = bytes.into_iter().chain(speed).collect();
    (!parts.is_empty()).then(|| format!("It {}.", parts.join(" and ")))
}

/// `3 of 4 pass keys (teacher: 4)`
fn found_words(teacher: &Recall, student: &Recall) -> String {
    format!("{} of {} {} (teacher: {})", student.right, student.of, student.what, teacher.right)
}

/// What to change, in a line each; nothing if the student is as good as its teacher. `steps` are those of both stages.
pub fn advice(
    teacher: &Row,
    untrained: Option<&Row>,
    trained: &Row,
    steps: (usize, usize),
) -> Vec<String> {
    let mut lines = Vec::new();
    let ratio = |row: &Row| row.perplexity_ratio.map(|ratio| ratio.mean);
    // Of one trained on little text the last digit says nothing: the intervals have to lie apart.
    let worse = untrained
        .and_then(|row| row.perplexity_ratio)
        .zip(trained.perplexity_ratio)
        .is_some_and(|(untrained, trained)| trained.low > untrained.high);
    if worse {
        lines.push(
            "training made it worse: lower transfer.optimizer.lr and finetune.optimizer.lr".into(),
        );
    } else if ratio(trained).is_some_and(|ratio| ratio > 1.02) {
        let (transfer, finetune) = (steps.0.max(1) * 2, steps.1.max(1) * 2);
        lines.push(format!(
            "train longer: --set transfer.steps={transfer} --set finetune.steps={finetune}"
        ));
    }
    if trained.found().0 < teacher.found().0 {
        lines
            .push("find more: keep more exact tokens, --set calibration.cache_fraction=0.3".into());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::TEACHER;

    fn row(model: &str, ratio: Option<f64>, right: usize) -> Row {
        Row {
            perplexity_ratio: ratio.map(|mean| Interval {
                mean,
                low: mean - 0.01,
                high: mean + 0.01,
            }),
            recall: vec![Recall { what: "pass keys".into(), right, of: 4, length: 2048 }],
            ..Row::named(model)
        }
    }

    #[test]
    fn a_student_is_judged_by_perplexity_and_recall() {
        let teacher = row(TEACHER, None, 4);
        for (ratio, right, quality) in [
            (1.01, 4, Quality::AsGood),
            (1.09, 4, Quality::Close),
            (1.01, 3, Quality::Usable),
            (1.29, 4, Quality::Usable),
            (1.01, 1, Quality::NotYet),
            (1.5, 4, Quality::NotYet),
            (f64::NAN, 4, Quality::NotYet),
        ] {
            let student = row("trained", Some(ratio), right);
            assert_eq!(Quality::of(&teacher, &student), quality, "{ratio} {right}");
        }
        assert_eq!(Quality::of(&Row::named(TEACHER), &Row::named("trained")), Quality::Unknown);
    }

    #[test]
    fn the_sentence_says_quality_and_cost() {
        let teacher = Row {
            cache_bytes: Some(1000),
            decode_tokens_per_s: Some(20.0),
            ..row(TEACHER, None, 4)
        };
        let student = Row {
            cache_bytes: Some(220),
            decode_tokens_per_s: Some(50.0),
            ..row("trained", Some(1.05), 3)
        };
        let quality = Quality::of(&teacher, &student);
        assert_eq!(
            quality.sentence(&teacher, &student),
            "Usable, with losses: perplexity is 1.050 times the teacher's (95 %: 1.040 to 1.060); the student finds 3 of 4 \
             pass keys (teacher: 4). It takes 22 % of the teacher's cache bytes and decodes at 2.5 times its speed."
        );
    }

    #[test]
    fn advice_is_for_what_is_wrong() {
        let teacher = row(TEACHER, None, 4);
        let untrained = row("untrained", Some(1.2), 4);
        let advice = |ratio, right| {
            advice(&teacher, Some(&untrained), &row("trained", Some(ratio), right), (48, 24))
                .join("\n")
        };
        assert_eq!(advice(1.01, 4), "");
        assert!(advice(1.1, 4).contains("transfer.steps=96 --set finetune.steps=48"));
        assert!(advice(1.3, 4).contains("lr"));
        // Trained and untrained differ by less than is known of either.
        let untrained = row("untrained", Some(1.0), 4);
        let told =
            super::advice(&teacher, Some(&untrained), &row("trained", Some(1.001), 4), (2, 2));
        assert!(told.is_empty(), "{told:?}");
        assert!(advice(1.01, 2).contains("cache_fraction"));
    }
}
