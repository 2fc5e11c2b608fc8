#![doc = include_str!("../README.md")]
//!
//! # Files
//!
//! `python` holds what values do (`str`, `repr`, methods, operators, filters), `parse` reads a source, `render` runs it, `meter`
//! counts steps and bytes. A general engine with a limit on its instructions would not do: the strings and lists that one
//! instruction makes cannot be counted from outside.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

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

/// The result of rendering.
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
    /// Errors that the template raises ([`ErrorKind::Raised`]), operations that Python refuses, and limits.
    pub fn render(&self, variables: &Map<String, Json>, now: SystemTime) -> Result<Rendered> {
        stack::on_a_large_one(|| render::render(&self.body, variables, now))
    }
}
