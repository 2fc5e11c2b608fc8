//! Jinja templates as Python's Jinja2 renders them, in the environment that transformers' `apply_chat_template` makes:
//! the immutable sandbox, `trim_blocks`, `lstrip_blocks`, `break` and `continue`, `{% generation %}`, `tojson` without HTML
//! escapes, `raise_exception`, `strftime_now`.
//!
//! A template comes with a model, so it is as little to be trusted as a program from the network. It reads nothing but what it is
//! given, and everything it does is counted: steps and bytes by [`Meter`](meter::Meter), nesting by the parser and the
//! interpreter. A renderer whose strings and lists cannot be counted could not be bounded from outside, which is why this is
//! not a general engine with a limit on its instructions.
//!
//! `python` holds what values do (`str`, `repr`, methods, operators, filters), `parse` what a source says, `render` what follows.

mod ast;
mod error;
mod meter;
mod parse;
mod python;
mod render;
mod stack;

use std::ops::Range;
use std::time::SystemTime;

use serde_json::{Map, Value as Json};

pub use error::{Error, ErrorKind, Result};

/// The longest source that is parsed, in bytes. Real templates have up to about 40 thousand.
pub const MAX_SOURCE_BYTES: usize = 1 << 20;
/// How deep expressions and blocks nest, as they are written.
pub const MAX_NESTING: usize = 150;

/// A parsed template.
#[derive(Debug)]
pub struct Template {
    body: Vec<ast::Stmt>,
}

/// What a template wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Bytes of the text that `{% generation %}` blocks wrote, in order; `None` if the template has no such block, or one whose
    /// place in the text cannot be told because a macro or filter took it up first.
    pub generated: Option<Vec<Range<usize>>>,
}

impl Template {
    /// Parses a source.
    ///
    /// # Errors
    /// Where it does not parse, with the line; a source that is too long or nests too deep.
    pub fn parse(source: &str) -> Result<Self> {
        if source.len() > MAX_SOURCE_BYTES {
            let what = format!("{} bytes long; at most {MAX_SOURCE_BYTES} are read", source.len());
            return Err(Error::new(ErrorKind::Limit, what));
        }
        stack::on_a_large_one(|| parse::parse(source).map(|body| Self { body }))
    }

    /// Renders it with these variables; `now` is what `strftime_now` tells, in local time.
    ///
    /// # Errors
    /// What the template refuses ([`ErrorKind::Raised`]), what Python would refuse, and limits.
    pub fn render(&self, variables: &Map<String, Json>, now: SystemTime) -> Result<Rendered> {
        stack::on_a_large_one(|| render::render(&self.body, variables, now))
    }
}
