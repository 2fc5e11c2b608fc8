//! Log-probabilities of tokens.

/// A token's log-probability, and the likeliest tokens in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub id: u32,
    /// Its log-probability: of the model's own distribution, before temperature, penalties and all that narrows the choice.
    pub logprob: f32,
    /// The likeliest tokens and their log-probabilities, likelier first, of equals the lower id.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// That of `id` after `logits`, with the `most` likeliest.
    ///
    /// # Panics
    /// If `id` is not below the number of logits.
    pub(super) fn new(logits: &[f32], id: u32, most: usize) -> Self {
        let log_sum = log_sum_exp(logits);
        let of = |id: u32| (f64::from(logits[id as usize]) - log_sum) as f32;
        let top = likeliest(logits, most).into_iter().map(|id| (id, of(id))).collect();
        Self { id, logprob: of(id), top }
    }
}

/// The `most` likeliest ids, likelier first, of equals the lower id. Few are asked for.
fn likeliest(logits: &[f32], most: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = Vec::with_capacity(most + 1);
    if most == 0 {
        return ids;
    }
    for (id, logit) in logits.iter().enumerate() {
        if ids.len() == most && logits[ids[most - 1] as usize] >= *logit {
            continue;
        }
        let at = ids.partition_point(|&other| logits[other as usize] >= *logit);
        ids.insert(at, id as u32);
        ids.truncate(most);
    }
    ids
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    largest + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let logits = [1.0, 3.0, f32::NEG_INFINITY, 3.0];
        let sum = 1_f64.exp() + 2.0 * 3_f64.exp();
        let expected = |logit: f64| (logit.exp() / sum).ln();
        let of = TokenLogprobs::new(&logits, 0, 3);
        let ids: Vec<u32> = of.top.iter().map(|(id, _)| *id).collect();
        assert_eq!((of.id, ids), (0, vec![1, 3, 0]));
        let got = [of.logprob, of.top[0].1, of.top[1].1, of.top[2].1];
        for (got, logit) in got.into_iter().zip([1.0, 3.0, 3.0, 1.0]) {
            assert!((f64::from(got) - expected(logit)).abs() < 1e-6);
        }
        assert_eq!(TokenLogprobs::new(&logits, 1, 0).top, []);
        assert_eq!(TokenLogprobs::new(&logits, 1, 9).top.len(), 4);
    }
}
