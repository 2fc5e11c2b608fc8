//! The text of a generation as it grows, and what ends it.

use crate::error::Result;
use crate::generate::Finish;
use crate::model::Model;
use crate::tokenizer::TokenStream;

/// The text of a generation as it grows, and what ends it: an end-of-sequence id, a stop text, or the limit on tokens.
#[derive(Debug)]
pub struct Continuation {
    stream: TokenStream,
    output: StopBuffer,
    /// Stop texts that are special tokens. Their text never appears, so they are compared as ids.
    stop_ids: Vec<u32>,
    end_of_sequence: Vec<u32>,
    max_new_tokens: usize,
    ids: Vec<u32>,
}

/// The result of adding a token to a [`Continuation`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Text that is now certain. At the end of the generation, all the rest.
    pub text: String,
    /// Why the generation has ended, if it has.
    pub finish: Option<Finish>,
}

impl Continuation {
    /// A generation of at most `max_new_tokens` tokens, up to one of the texts `stop`, which are not part of it.
    pub fn new(model: &Model, max_new_tokens: usize, stop: &[String]) -> Self {
        let stop_ids = stop.iter().flat_map(|stop| model.tokenizer.ids_of_text(stop)).collect();
        Self {
            stream: model.tokenizer.stream(),
            output: StopBuffer::new(stop.to_vec()),
            stop_ids,
            end_of_sequence: model.config().eos_token_ids.clone(),
            max_new_tokens,
            ids: Vec::new(),
        }
    }

    /// Ignores end-of-sequence ids.
    #[must_use]
    pub fn past_end_of_sequence(mut self) -> Self {
        self.end_of_sequence.clear();
        self
    }

    /// Includes the text of these special tokens.
    #[must_use]
    pub fn showing(mut self, special: Vec<u32>) -> Self {
        self.stream = self.stream.showing(special);
        self
    }

    /// Adds the next id. Do not call it again after it has reported the end.
    ///
    /// # Errors
    /// An error of the tokenizer.
    pub fn push(&mut self, id: u32) -> Result<Pushed> {
        if self.end_of_sequence.contains(&id) {
            return self.end(Finish::EndOfSequence);
        }
        self.ids.push(id);
        if self.stop_ids.contains(&id) {
            return self.end(Finish::StopString);
        }
        let mut text = String::new();
        if let Some(new) = self.stream.push(id)?
            && self.output.push(&new, &mut |new| text.push_str(new))
        {
            return Ok(Pushed { text, finish: Some(Finish::StopString) });
        }
        if self.ids.len() < self.max_new_tokens {
            return Ok(Pushed { text, finish: None });
        }
        let Pushed { text: rest, finish } = self.end(Finish::Length)?;
        Ok(Pushed { text: text + &rest, finish })
    }

    /// Whether this id ends a generation by itself: an end-of-sequence id, or a stop text that is one token.
    pub fn ends_at(&self, id: u32) -> bool {
        self.end_of_sequence.contains(&id) || self.stop_ids.contains(&id)
    }

    /// The text that was held back, up to a stop text in it.
    fn end(&mut self, finish: Finish) -> Result<Pushed> {
        let mut text = String::new();
        let rest = self.stream.clone().finish()?.unwrap_or_default();
        let stopped = self.output.push(&rest, &mut |new| text.push_str(new));
        if !stopped {
            self.output.flush(&mut |new| text.push_str(new));
        }
        Ok(Pushed { text, finish: Some(if stopped { Finish::StopString } else { finish }) })
    }

    /// The text that is certain so far.
    pub fn text(&self) -> &str {
        &self.output.text
    }

    /// The ids so far, without an end-of-sequence id.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// [`ids`](Self::ids).
    pub fn into_ids(self) -> Vec<u32> {
        self.ids
    }
}

/// Holds back text that may be the beginning of a stop string.
#[derive(Debug)]
struct StopBuffer {
    stop: Vec<String>,
    /// All text that was returned.
    text: String,
    /// Text that is held back.
    held: String,
}

impl StopBuffer {
    fn new(stop: Vec<String>) -> Self {
        Self { stop, text: String::new(), held: String::new() }
    }

    /// Adds text. Returns whether it contains a stop string, after returning the text before it.
    fn push(&mut self, text: &str, emit: &mut dyn FnMut(&str)) -> bool {
        self.held.push_str(text);
        let stops = self.stop.iter().filter(|stop| !stop.is_empty());
        if let Some(at) = stops.filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            self.flush(emit);
            return true;
        }
        let keep = self.longest_beginning();
        let rest = self.held.split_off(self.held.len() - keep);
        self.flush(emit);
        self.held = rest;
        false
    }

    /// Bytes at the end of `held` that begin a stop string.
    fn longest_beginning(&self) -> usize {
        let begins = |at: &usize| {
            let tail = &self.held[*at..];
            self.stop.iter().any(|stop| stop.len() > tail.len() && stop.starts_with(tail))
        };
        let starts = self.held.char_indices().map(|(at, _)| at);
        starts.into_iter().find(begins).map_or(0, |at| self.held.len() - at)
    }

    fn flush(&mut self, emit: &mut dyn FnMut(&str)) {
        if !self.held.is_empty() {
            emit(&self.held);
            self.text.push_str(&self.held);
            self.held.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{random_model, tiny_config};

    fn run(stop: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let stop: Vec<String> = stop.iter().map(|s| (*s).to_owned()).collect();
        let mut buffer = StopBuffer::new(stop);
        let mut emitted = Vec::new();
        let mut stopped = false;
        for piece in pieces {
            stopped |= buffer.push(piece, &mut |text| emitted.push(text.to_owned()));
            if stopped {
                break;
            }
        }
        if !stopped {
            buffer.flush(&mut |text| emitted.push(text.to_owned()));
        }
        (emitted, buffer.text, stopped)
    }

    #[test]
    fn special_tokens_are_text_where_they_are_to_be_shown() {
        let model = random_model(tiny_config(), 7).unwrap();
        let ids = model.tokenizer.encode("a<|im_start|>b", false).unwrap();
        let special = model.tokenizer.token_id("<|im_start|>").unwrap();
        assert_eq!(ids.len(), 3);
        for (shown, text) in [(vec![], "ab"), (vec![special], "a<|im_start|>b")] {
            let mut continuation = Continuation::new(&model, 3, &[]).showing(shown);
            let told: String = ids.iter().map(|id| continuation.push(*id).unwrap().text).collect();
            assert_eq!((told.as_str(), continuation.text()), (text, text));
        }
    }

    #[test]
    fn a_stop_string_across_pieces_never_leaks() {
        let (emitted, text, stopped) = run(&["END."], &["one E", "N", "D. two"]);
        assert_eq!((emitted, text.as_str(), stopped), (vec!["one ".to_owned()], "one ", true));
    }

    #[test]
    fn a_false_beginning_is_given_out_late() {
        let (emitted, text, stopped) = run(&["END."], &["one E", "NE", "X"]);
        assert_eq!(emitted, ["one ", "EN", "EX"]);
        assert_eq!((text.as_str(), stopped), ("one ENEX", false));
    }

    #[test]
    fn the_earliest_of_several_counts() {
        let (_, text, stopped) = run(&["b", "ab"], &["xxab"]);
        assert_eq!((text.as_str(), stopped), ("xx", true));
    }
}
