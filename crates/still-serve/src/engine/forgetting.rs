//! Drops a kept state after which the model computes NaN, and reads the prompt without it.
//!
//! A file's digest shows that it is complete, not who wrote it. Finite values that are too large lead to NaN a layer later.

use candle_core::{DType, Tensor};
use still_model::{ModelError, any_nan};

use super::worker::Worker;

impl Worker {
    /// If the last token's `hidden` state is NaN and the sequence continued a kept state, makes it read its prompt from the
    /// start. Returns whether it did.
    ///
    /// # Errors
    /// No memory for an empty cache.
    pub(super) fn gives_up_its_state(
        &mut self,
        at: usize,
        hidden: &Tensor,
    ) -> Result<bool, ModelError> {
        if !self.sequences[at].has_kept_state() {
            return Ok(false);
        }
        let hidden = hidden.flatten_all()?.to_dtype(DType::F32)?;
        if !any_nan(&hidden.to_vec1::<f32>()?) {
            return Ok(false);
        }
        self.forget_states_of(at);
        let empty = self.empty_cache()?;
        let mut sequence = self.sequences.remove(at);
        sequence.start_again(empty);
        self.plan_states(&mut sequence);
        self.sequences.insert(at, sequence);
        Ok(true)
    }

    /// Removes the kept state that this sequence continued, and those that it has kept since.
    pub(super) fn forget_states_of(&mut self, at: usize) {
        let sequence = &self.sequences[at];
        let (chain, prompt) = (&sequence.chain, &sequence.tokens[..sequence.prompt_tokens]);
        tracing::warn!(
            "what the model computes after a kept state of {} tokens is no numbers: it is not used again",
            sequence.cached
        );
        // In memory there is none of a file that is larger than all states may be.
        let continued = [false, true].map(|d| chain.prefix(prompt, sequence.cached, d));
        let kept = self.memory.remove_from(chain, prompt, sequence.cached);
        if let Some(store) = &self.kept {
            continued.into_iter().chain(kept).for_each(|prefix| store.is_damaged(prefix));
        }
    }
}
