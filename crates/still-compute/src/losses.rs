//! Losses of a row and their gradients, and the softmax that they share: each compiled for the widest vectors of the CPU at hand.
//!
//! They are functions of slices here, and not closures where losses are added up, so that the crates that train and evaluate can be
//! compiled for size. f32, sums of many values in float64.

use crate::vector::{self, vectorize};

/// Logits summed in f32 before they join a float64 total.
const SHORT: usize = 512;

/// The largest value of a row; `−∞` of an empty one, NaN if any value is NaN.
pub fn largest(row: &[f32]) -> f32 {
    vectorize(
        #[inline(always)]
        || vector::max(row),
    )
}

/// `x_i = e^{x_i − shift}`; returns their sum.
pub fn exponentials(row: &mut [f32], shift: f32) -> f32 {
    vectorize(
        #[inline(always)]
        || vector::exp_sub_sum(row, shift),
    )
}

/// Softmax in place.
pub fn softmax(row: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || vector::softmax(row),
    );
}

/// `x_i = e^{scale · x_i − m}` with the largest exponent as `m`; returns their sum.
pub fn softmax_terms(row: &mut [f32], scale: f32) -> f32 {
    vectorize(
        #[inline(always)]
        || {
            row.iter_mut().for_each(|x| *x *= scale);
            let largest = vector::max(row);
            vector::exp_sub_sum(row, largest)
        },
    )
}

/// `Σ (x − target)²`; `gradient` becomes `weight · (x − target)`. All are of one length.
pub fn squared_error(x: &[f32], target: &[f32], weight: f32, gradient: &mut [f32]) -> f64 {
    vectorize(
        #[inline(always)]
        || {
            for ((gradient, &x), &target) in gradient.iter_mut().zip(x).zip(target) {
                *gradient = x - target;
            }
            let squares = f64::from(vector::dot(gradient, gradient));
            gradient.iter_mut().for_each(|gradient| *gradient *= weight);
            squares
        },
    )
}

/// `−ln p(id)` of one row of logits, which becomes `weight` times its gradient.
pub fn cross_entropy(logits: &mut [f32], id: usize, weight: f32) -> f64 {
    vectorize(
        #[inline(always)]
        || {
            let max = vector::max(logits);
            let of_id = f64::from(logits[id] - max);
            let sum = vector::exp_sub_sum(logits, max);
            let scale = weight / sum;
            logits.iter_mut().for_each(|x| *x *= scale);
            logits[id] -= weight;
            f64::from(sum.ln()) - of_id
        },
    )
}

/// KL(teacher ‖ student) of one row of logits each and, if `next` gives an id and its weight, `−ln p(id)`, else 0.
///
/// `student` becomes the gradient of `weight` times the one plus the id's weight times the other; `teacher` is spent.
pub fn divergence(
    student: &mut [f32],
    teacher: &mut [f32],
    weight: f32,
    next: Option<(usize, f32)>,
) -> (f64, f64) {
    vectorize(
        #[inline(always)]
        || {
            let (max_s, max_t) = (vector::max(student), vector::max(teacher));
            let of_id = next.map(|(id, _)| f64::from(student[id] - max_s));
            let (mut sum_s, mut sum_t, mut cross) = (0.0_f64, 0.0_f64, 0.0_f64);
            // Short partial sums in f32, their total in f64.
            for (student, teacher) in student.chunks_mut(SHORT).zip(teacher.chunks_mut(SHORT)) {
                let mut shifted = [0.0_f32; SHORT];
                for ((shifted, &s), &t) in shifted.iter_mut().zip(student.iter()).zip(&*teacher) {
                    *shifted = (t - max_t) - (s - max_s);
                }
                sum_s += f64::from(vector::exp_sub_sum(student, max_s));
                sum_t += f64::from(vector::exp_sub_sum(teacher, max_t));
                cross += f64::from(vector::dot(teacher, &shifted[..teacher.len()]));
            }
            let next_weight = next.map_or(0.0, |(_, weight)| weight);
            let (scale_s, scale_t) = ((weight + next_weight) / sum_s as f32, weight / sum_t as f32);
            for (student, &teacher) in student.iter_mut().zip(&*teacher) {
                *student = *student * scale_s - teacher * scale_t;
            }
            if let Some((id, weight)) = next {
                student[id] -= weight;
            }
            let surprise = of_id.map_or(0.0, |of_id| sum_s.ln() - of_id);
            (cross / sum_t + sum_s.ln() - sum_t.ln(), surprise)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(seed: u64, length: usize) -> Vec<f32> {
        (0..length).map(|i| 8.0 * crate::random::uniform(seed, [0, 0, i]) as f32 - 4.0).collect()
    }

    fn log_softmax(row: &[f32]) -> Vec<f64> {
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        row.iter().map(|&x| f64::from(x) - sum.ln()).collect()
    }

    fn assert_near(got: &[f32], expected: impl Iterator<Item = f64>) {
        for (i, (&got, expected)) in got.iter().zip(expected).enumerate() {
            assert!((f64::from(got) - expected).abs() < 1e-6, "{i}: {got} for {expected}");
        }
    }

    /// Lengths that are no vectors, and more than one partial sum.
    const LENGTHS: [usize; 4] = [1, 19, SHORT, 2 * SHORT + 37];

    #[test]
    fn terms_are_those_of_the_scaled_softmax() {
        for length in LENGTHS {
            let logits = row(1, length);
            let scaled: Vec<f32> = logits.iter().map(|x| 0.25 * x).collect();
            let mut terms = logits.clone();
            let sum = softmax_terms(&mut terms, 0.25);
            let expected = log_softmax(&scaled);
            let mut whole = scaled.clone();
            softmax(&mut whole);
            assert_near(&whole, expected.iter().map(|x| x.exp()));
            terms.iter_mut().for_each(|x| *x /= sum);
            assert_near(&terms, expected.iter().map(|x| x.exp()));
            let mut again = scaled.clone();
            let top = largest(&scaled);
            assert_eq!(exponentials(&mut again, top), sum);
        }
        assert!(largest(&[1.0, f32::NAN, 2.0]).is_nan());
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
    }

    #[test]
    fn squares_and_their_gradient_are_the_definitions() {
        for length in LENGTHS {
            let (x, target) = (row(1, length), row(2, length));
            let mut gradient = vec![f32::NAN; length];
            let got = squared_error(&x, &target, 0.5, &mut gradient);
            let errors = || x.iter().zip(&target).map(|(x, t)| f64::from(*x) - f64::from(*t));
            let expected: f64 = errors().map(|e| e * e).sum();
            assert!((got / expected - 1.0).abs() < 1e-5, "{got} for {expected}");
            assert_near(&gradient, errors().map(|e| 0.5 * e));
        }
    }

    #[test]
    fn cross_entropy_and_its_gradient_are_the_definitions() {
        for length in LENGTHS {
            let (logits, id) = (row(3, length), length / 2);
            let expected = log_softmax(&logits);
            let mut gradient = logits.clone();
            let got = cross_entropy(&mut gradient, id, 0.5);
            assert!((got + expected[id]).abs() < 1e-5, "{got} for {}", -expected[id]);
            let one = |i| f64::from(u8::from(i == id));
            assert_near(&gradient, (0..length).map(|i| 0.5 * (expected[i].exp() - one(i))));
        }
    }

    #[test]
    fn divergence_and_its_gradient_are_the_definitions() {
        for length in LENGTHS {
            for next in [None, Some((length / 3, 0.75))] {
                let (student, teacher) = (row(4, length), row(5, length));
                let (s, t) = (log_softmax(&student), log_softmax(&teacher));
                let mut gradient = student.clone();
                let (kl, surprise) = divergence(&mut gradient, &mut teacher.clone(), 0.5, next);
                let expected: f64 = t.iter().zip(&s).map(|(t, s)| t.exp() * (t - s)).sum();
                assert!((kl - expected).abs() < 1e-5, "{kl} for {expected}");
                let expected = next.map_or(0.0, |(id, _)| -s[id]);
                assert!((surprise - expected).abs() < 1e-5, "{surprise} for {expected}");
                let (id, weight) = next.map_or((0, 0.0), |(id, weight)| (id, f64::from(weight)));
                let one = |i| f64::from(u8::from(i == id));
                let of =
                    |i: usize| 0.5 * (s[i].exp() - t[i].exp()) + weight * (s[i].exp() - one(i));
                assert_near(&gradient, (0..length).map(of));
            }
        }
    }
}
