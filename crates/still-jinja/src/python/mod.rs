//! Python's values: what they are, what is done with them.

pub(crate) mod args;
pub(crate) mod filters;
pub(crate) mod format;
pub(crate) mod format_spec;
pub(crate) mod json;
pub(crate) mod methods;
pub(crate) mod number;
pub(crate) mod operators;
pub(crate) mod printf;
pub(crate) mod sequence;
pub(crate) mod str_methods;
pub(crate) mod strings;
pub(crate) mod tests;
pub(crate) mod text;
pub(crate) mod time;
pub(crate) mod value;

/// What Python's `str.isspace`, `strip` and `split` take for white space.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}
