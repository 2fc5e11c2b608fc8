//! The share of a student's loss against its teacher that training won back.

/// `(ln before − ln after) / (ln before − ln teacher)` of three perplexities.
///
/// 0 means that training changed nothing, 1 that the teacher was reached. `None` if there was no gap.
pub fn gap_closed(teacher: f64, before: f64, after: f64) -> Option<f64> {
    let gap = before.ln() - teacher.ln();
    (gap > 0.0 && gap.is_finite()).then(|| (before.ln() - after.ln()) / gap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_log_gap() {
        let closed = gap_closed(10.0, 1000.0, 100.0).unwrap();
        assert!((closed - 0.5).abs() < 1e-12);
    }

    #[test]
    fn no_gap_no_share() {
        assert_eq!(gap_closed(10.0, 10.0, 9.0), None);
        assert_eq!(gap_closed(10.0, f64::NAN, 9.0), None);
    }
}
