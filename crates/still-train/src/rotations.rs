//! Rotations kept for the next sequences of the same length: making one takes as long as a step's smaller parts.

use std::sync::{Mutex, PoisonError};

use still_model::{Decoder, Rotation};

use crate::error::Result;

/// Lengths whose rotations are kept.
const KEPT: usize = 4;

/// Rotations by length, the last used at the end.
#[derive(Debug, Default)]
pub(crate) struct Rotations(Mutex<Vec<(usize, Rotation)>>);

impl Rotations {
    /// The rotation of positions `0..tokens`.
    ///
    /// # Errors
    /// If `tokens` is 0.
    pub fn of(&self, decoder: &Decoder, tokens: usize) -> Result<Rotation> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rotation = match kept.iter().position(|(length, _)| *length == tokens) {
            Some(place) => kept.remove(place).1,
            None => decoder.rotation(0, tokens)?,
        };
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push((tokens, rotation.clone()));
        Ok(rotation)
    }
}

#[cfg(test)]
mod tests {
    use still_model::random::{random_model, tiny_config};

    use super::*;

    #[test]
    fn the_lengths_used_last_are_kept() {
        let decoder = random_model(tiny_config(), 1).unwrap().decoder;
        let rotations = Rotations::default();
        for tokens in [5, 6, 7, 5, 8, 9] {
            rotations.of(&decoder, tokens).unwrap();
        }
        let kept: Vec<usize> =
            rotations.0.lock().unwrap().iter().map(|(length, _)| *length).collect();
        assert_eq!(kept, [7, 5, 8, 9]);
        let (kept, fresh) = (rotations.of(&decoder, 5).unwrap(), decoder.rotation(0, 5).unwrap());
        assert_eq!(format!("{kept:?}"), format!("{fresh:?}"));
    }
}
