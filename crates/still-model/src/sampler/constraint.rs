//! Tokens that a grammar allows.

use std::fmt::{self, Debug};
use std::sync::Arc;

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

/// Makes the constraint of each generation: none by default. Two are equal if they are clones of one.
#[derive(Clone, Default)]
pub struct Constraints(Option<Arc<dyn Fn() -> Box<dyn Constraint> + Send + Sync>>);

impl Constraints {
    /// `make` gives one that has followed no token yet.
    pub fn new(make: impl Fn() -> Box<dyn Constraint> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(make)))
    }

    /// Whether there is none.
    pub fn are_off(&self) -> bool {
        self.0.is_none()
    }

    /// What limits the tokens of the next generation.
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
