//! Constraints on the next token, such as a grammar.

use std::fmt::{self, Debug};
use std::sync::Arc;

use crate::error::Result;

/// Limits the tokens of one generation, for a grammar or a JSON schema. It follows the chosen tokens.
pub trait Constraint: Debug + Send {
    /// Sets the logits of tokens that may not come next to −∞. End-of-sequence tokens stay where the text may end.
    ///
    /// # Errors
    /// A constraint that fails, such as a grammar beyond its limits.
    fn mask(&mut self, logits: &mut [f32]) -> Result<()>;

    /// Receives the chosen token, also an end-of-sequence token.
    ///
    /// # Errors
    /// As [`Constraint::mask`].
    fn accept(&mut self, id: u32) -> Result<()>;
}

/// Makes a constraint for each generation; none by default. Two values are equal if one is a clone of the other.
#[derive(Clone, Default)]
pub struct Constraints(Option<Arc<dyn Fn() -> Box<dyn Constraint> + Send + Sync>>);

impl Constraints {
    /// `make` returns a new constraint, which has followed no token.
    pub fn new(make: impl Fn() -> Box<dyn Constraint> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(make)))
    }

    /// Whether there is no constraint.
    pub fn are_off(&self) -> bool {
        self.0.is_none()
    }

    /// A constraint for the next generation.
    pub fn next(&self) -> Option<Box<dyn Constraint>> {
        self.0.as_ref().map(|make| make())
    }
}

impl Debug for Constraints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.are_off() { "Constraints(off)" } else { "Constraints(on)" })
    }
}

impl PartialEq for Constraints {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        }
    }
}
