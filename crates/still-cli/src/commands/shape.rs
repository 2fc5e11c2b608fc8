//! The form that a text must have: a JSON schema, or a grammar, as `still serve` follows them.

use std::path::{Path, PathBuf};

use still_model::{Constraints, Model};

use super::input::read_text;
use crate::errors::user;

/// A schema or a grammar, and the file that it is from.
#[derive(Clone, Debug)]
#[cfg_attr(not(feature = "serve"), allow(dead_code, reason = "refused before it is read"))]
pub struct Shape {
    path: PathBuf,
    kind: Kind,
}

#[derive(Clone, Debug)]
#[cfg_attr(not(feature = "serve"), allow(dead_code, reason = "refused before it is read"))]
enum Kind {
    Schema(serde_json::Value),
    Grammar(String),
}

impl Shape {
    /// Reads the file of either.
    ///
    /// # Errors
    /// A file that cannot be read; a schema that is no JSON object; a build without the feature `serve`.
    pub fn read(schema: Option<&Path>, grammar: Option<&Path>) -> anyhow::Result<Option<Self>> {
        #[cfg(not(feature = "serve"))]
        if schema.or(grammar).is_some() {
            return Err(crate::errors::left_out("schemas and grammars", "serve"));
        }
        let of = |path: &Path, kind| Ok(Some(Self { path: path.to_owned(), kind }));
        if let Some(path) = schema {
            let wrong = |what: &str| {
                let what = format!("{} is not a JSON schema: {what}", path.display());
                user(what, "give a file such as {\"type\": \"object\", \"properties\": {…}}")
            };
            let schema: serde_json::Value = serde_json::from_str(&read_text(path)?)
                .map_err(|error| wrong(&error.to_string()))?;
            if !schema.is_object() {
                return Err(wrong("it is not an object"));
            }
            return of(path, Kind::Schema(schema));
        }
        match grammar {
            Some(path) => of(path, Kind::Grammar(read_text(path)?)),
            None => Ok(None),
        }
    }

    /// What limits the tokens of this model's texts.
    ///
    /// # Errors
    /// A schema or a grammar that is malformed or too large; a model that no text of which could end.
    #[cfg(feature = "serve")]
    pub fn constraints(&self, model: &Model) -> anyhow::Result<Constraints> {
        let grammars = still_serve::Grammars::new(model).map_err(|why| {
            user(why, "leave out --json-schema and --grammar, or take another model")
        })?;
        let made = match &self.kind {
            Kind::Schema(schema) => grammars.json_schema(schema),
            Kind::Grammar(grammar) => grammars.lark(grammar),
        };
        let made = made.map_err(|why| {
            let what = format!("{} is refused: {why}", self.path.display());
            user(what, "docs/serving.md says in what language schemas and grammars are")
        })?;
        Ok(made.constraints())
    }

    /// Never called, as [`Shape::read`] makes none.
    #[cfg(not(feature = "serve"))]
    pub fn constraints(&self, _: &Model) -> anyhow::Result<Constraints> {
        Err(crate::errors::left_out("schemas and grammars", "serve"))
    }
}
