//! Tokens that a grammar allows.

use std::fmt::Debug;

use crate::error::Result;

/// What limits the tokens of one generation: a grammar, a JSON schema. It follows the tokens that were chosen.
pub trait Constraint: Debug + Send {
    /// Sets the logits of tokens that may not come next to −∞. Where the text may end, the end-of-sequence tokens stay.
    ///
    /// # Errors
    /// A constraint that fails, such as a grammar beyond its limits.
    fn mask(&mut self, logits: &mut [f32]) -> Result<()>;

    /// Is told the token that was chosen, an end-of-sequence token too.
    ///
    /// # Errors
    /// As [`Constraint::mask`].
    fn accept(&mut self, id: u32) -> Result<()>;
}
