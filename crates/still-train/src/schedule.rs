//! Learning-rate schedule.

/// Linear warmup over `warmup` steps, then a cosine to `floor · lr` at the last of `total` steps.
///
/// `step` counts from 0; the first step already moves.
pub fn warmup_cosine(lr: f64, step: usize, warmup: usize, total: usize, floor: f64) -> f64 {
    if step < warmup {
        return lr * (step + 1) as f64 / warmup as f64;
    }
    let span = total.saturating_sub(warmup + 1).max(1) as f64;
    let progress = ((step - warmup) as f64 / span).min(1.0);
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
    lr * (floor + (1.0 - floor) * cosine)
}

#[cfg(test)]
mod tests {
    use super::warmup_cosine;

    #[test]
    fn rises_then_falls_to_the_floor() {
        let lr = |step| warmup_cosine(1.0, step, 4, 20, 0.1);
        assert_eq!(lr(0), 0.25);
        assert_eq!(lr(3), 1.0);
        assert_eq!(lr(4), 1.0);
        assert!((lr(19) - 0.1).abs() < 1e-12);
        assert!((4..19).all(|step| lr(step + 1) < lr(step)));
        assert!((lr(100) - 0.1).abs() < 1e-12);
    }
}
