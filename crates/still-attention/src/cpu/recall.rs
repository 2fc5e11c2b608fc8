//! Self-recall (LoLA): how badly the linear state would give back a token's value, asked with the token's own key.

use super::head_input::HeadInput;
use super::head_state::HeadState;
use super::linear_only::at_least;
use super::query_rows::take;
use super::retirement::Gathered;
use still_compute::Real;
use still_compute::matmul::{Mat, matmul};
use still_compute::vector;

impl<T: Real> HeadState<T> {
    /// Scores the tokens of `chunk` and, where they are ranked, the salient ones by the state as it is: `‖φ(k)ᵀS / φ(k)ᵀz − v‖²`.
    ///
    /// An empty state recalls 0.
    pub fn score_by_recall(
        &mut self,
        chunk: usize,
        input: &HeadInput<'_, T>,
        gathered: &mut Gathered<T>,
    ) {
        let (features, d) = (input.features.width(), input.head_dim);
        let first = chunk * input.chunk;
        let Gathered { k, v, phi, recalled, .. } = gathered;
        k.clear();
        v.clear();
        for position in first..first + input.chunk {
            let slot = self.slot(position as u32, input.chunk);
            self.ring_k.append_row(slot, k);
            self.ring_v.append_row(slot, v);
        }
        let ranked = self.ranks.as_ref().map_or(0, Vec::len);
        for index in 0..ranked {
            self.salient_k.append_row(index, k);
            self.salient_v.append_row(index, v);
        }
        let rows = input.chunk + ranked;
        let recalled = take(recalled, rows * d);
        if self.count == 0 {
            recalled.fill(T::zero());
        } else {
            let phi = take(phi, rows * features);
            input.features.of_keys_into(k, d, phi);
            let state = Mat::rows(&self.s, d);
            matmul((rows, d, features), recalled, d, false, Mat::rows(phi, features), state);
            T::vectorize(
                #[inline(always)]
                || {
                    for (recalled, phi) in
                        recalled.chunks_exact_mut(d).zip(phi.chunks_exact(features))
                    {
                        let inverse = at_least(vector::dot(phi, &self.z)).recip();
                        recalled.iter_mut().for_each(|x| *x *= inverse);
                    }
                },
            );
        }
        let mut errors = recalled.chunks_exact(d).zip(v.chunks_exact(d)).map(|(recalled, v)| {
            recalled.iter().zip(v).map(|(&a, &b)| (a - b) * (a - b)).sum::<T>()
        });
        for (position, error) in (first..first + input.chunk).zip(errors.by_ref()) {
            self.ring_score[position % (2 * input.chunk)] = error;
        }
        for ((score, _), error) in self.ranks.iter_mut().flatten().zip(errors) {
            *score = error;
        }
    }
}
