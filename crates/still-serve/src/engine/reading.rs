//! Prefill, in pieces between decode steps.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{IndexOp, Tensor};
use still_model::{Model, ModelError};

use super::TokenLogprobs;
use super::decoding::panic_text;
use super::request::{Event, Failure};
use super::sequence::{Phase, Sequence};
use super::worker::{Worker, copy};
use crate::states::Kept;

/// Factor of the piece length when no sequence waits for its next token.
const ALONE: usize = 8;

/// A prompt's state is also kept at multiples of this many tokens, so that an edited prompt can continue it.
const KEEP_EVERY: usize = 1024;

/// Rows of logits that are computed together.
const LOGIT_ROWS: usize = 64;

impl Worker {
    /// Reads pieces of prompts, together at most one piece's tokens. The oldest request and the one with the fewest tokens left
    /// alternate, so that a short prompt does not wait for a long one, and a long one makes progress.
    pub(super) fn read_pieces(&mut self) {
        let mut tokens = 0;
        loop {
            let reading =
                self.sequences.iter().enumerate().filter(|(_, s)| s.phase == Phase::Reading);
            let next = match self.oldest_next {
                true => reading.min_by_key(|(_, sequence)| sequence.id),
                false => reading.min_by_key(|(_, sequence)| (sequence.unread(), sequence.id)),
            };
            let Some((at, sequence)) = next else { return };
            let continued = self.sequences.iter().any(|s| s.phase == Phase::Decoding);
            let most = self.prefill_chunk;
            // Where cuts decide how products are rounded, they do not depend on others.
            let most = if continued || self.cuts_alike() { most } else { most * ALONE };
            let end = piece_end(sequence, most);
            let piece = end - sequence.position();
            if tokens > 0 && tokens + piece > most {
                return;
            }
            tokens += piece;
            self.oldest_next = !self.oldest_next;
            self.read_piece(at, end);
            // A client that has its answer finds the states in the numbers.
            self.tell();
        }
    }

    /// Reads a prompt up to `end`.
    fn read_piece(&mut self, at: usize, end: usize) {
        let sequence = &mut self.sequences[at];
        let from = sequence.position();
        let model = &self.model;
        let read = catch_unwind(AssertUnwindSafe(|| read(model, sequence, end)));
        let last = match read {
            Ok(Ok(last)) => last,
            Ok(Err(ModelError::Cancelled)) => return,
            Ok(Err(error)) => return self.fail(at, error.into()),
            Err(panic) => return self.fail(at, Failure::Panicked(panic_text(&*panic))),
        };
        self.shared.metrics.tokens_read.inc_by((end - from) as u64);
        // Before the state that has come of it is kept.
        match self.gives_up_its_state(at, &last) {
            Ok(false) => {}
            Ok(true) => return,
            Err(error) => return self.fail(at, error.into()),
        }
        let id = self.sequences[at].id;
        self.keep_on_the_way(at);
        if self.sequences[at].unread() == 0 {
            self.first_token(at, &last);
        }
        self.wake_waiting(id);
    }

    /// Keeps the state at planned positions.
    fn keep_on_the_way(&mut self, at: usize) {
        let sequence = &mut self.sequences[at];
        let position = sequence.position();
        let planned = sequence.keep_at.remove(&position);
        let on_the_way = position.is_multiple_of(KEEP_EVERY) && position < sequence.prompt_tokens;
        if !sequence.takes_states() || !(planned || on_the_way) {
            return;
        }
        let prefix = sequence.chain.prefix(&sequence.tokens, position, sequence.decoded);
        if self.memory.touch(&prefix) {
            return;
        }
        let tokens = sequence.tokens[..position].into();
        let cache = match copy(&sequence.cache) {
            Ok(cache) => Arc::new(cache),
            Err(error) => return tracing::warn!("a state was not kept: {error}"),
        };
        let kept = Kept { tokens, cache };
        match planned {
            true => self.keep(prefix, kept),
            false => self.memory.insert(prefix, kept),
        }
    }

    /// Chooses the first token after the prompt.
    fn first_token(&mut self, at: usize, last: &Tensor) {
        let sequence = &mut self.sequences[at];
        sequence.phase = Phase::Decoding;
        if sequence.prompt_logprobs.is_some() {
            let of_prompt = std::mem::take(&mut sequence.of_prompt);
            let _ = sequence.events.send(Event::Prompt(of_prompt));
        }
        if sequence.max_new_tokens == 0 {
            return self.finish(at, still_model::Finish::Length, String::new());
        }
        let logits = self.model.logits(last).and_then(|x| Ok(x.flatten_all()?.to_vec1::<f32>()?));
        let chosen = match logits {
            Ok(logits) => self.sequences[at].choose(&logits, &self.shared.metrics),
            Err(error) => Err(error.into()),
        };
        match chosen {
            Ok(None) => {}
            Ok(Some((finish, text))) => self.finish(at, finish, text),
            Err(failure) => self.fail(at, failure),
        }
    }
}

/// The end of the next piece: at most `most` tokens further, at a multiple of its unit, at the prompt's end, or where the state
/// is kept. A prompt is therefore cut in the same places, whichever state it continues.
fn piece_end(sequence: &Sequence, most: usize) -> usize {
    let position = sequence.position();
    let furthest = match position + most {
        end if end >= sequence.prompt_tokens => sequence.prompt_tokens,
        end => sequence.cut_before(end),
    };
    let kept = sequence.keep_at.iter().copied().find(|at| *at > position);
    let every = (position / KEEP_EVERY + 1) * KEEP_EVERY;
    let last = Some(sequence.last_cut()).filter(|_| sequence.cuts.last).filter(|at| *at > position);
    furthest.min(every).min(kept.unwrap_or(furthest)).min(last.unwrap_or(furthest))
}

/// Reads the prompt up to `end` and returns the hidden state of the last token.
fn read(model: &Model, sequence: &mut Sequence, end: usize) -> Result<Tensor, ModelError> {
    let position = sequence.position();
    let Sequence { tokens, cache, cancel, prompt_logprobs, of_prompt, prompt_tokens, .. } =
        sequence;
    let ids = &tokens[position..end];
    let Some(most) = *prompt_logprobs else {
        return model.prefill_until(ids, cache, cancel, &Default::default());
    };
    of_prompt.resize(*prompt_tokens, None);
    let found = Mutex::new((Vec::new(), None));
    model.read_until(ids, cache, cancel, |start, hidden| {
        let rows = hidden.dim(0)?;
        let mut told = Vec::with_capacity(rows);
        for first in (0..rows).step_by(LOGIT_ROWS) {
            let count = LOGIT_ROWS.min(rows - first);
            let logits = model.logits(&hidden.narrow(0, first, count)?)?.to_vec2::<f32>()?;
            for (row, logits) in logits.iter().enumerate() {
                let at = position + start + first + row + 1;
                if let Some(&id) = tokens.get(at).filter(|_| at < *prompt_tokens) {
                    told.push((at, TokenLogprobs::new(logits, id, most)));
                }
            }
        }
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        found.0.extend(told);
        if start + rows == ids.len() {
            found.1 = Some(hidden.i(rows - 1..rows)?);
        }
        Ok::<_, ModelError>(())
    })?;
    let (told, last) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    for (at, logprobs) in told {
        of_prompt[at] = Some(logprobs);
    }
    last.ok_or_else(|| ModelError::Invalid("the prompt has no tokens".into()))
}
