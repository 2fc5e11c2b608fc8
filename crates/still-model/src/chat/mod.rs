//! Chat templates: a model's own, rendered as transformers' `apply_chat_template` does.

mod message;
mod templates;
mod unwritten;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::SystemTime;

use serde_json::{Map, Value};
use still_jinja::Template;

pub use message::{Context, Message};
pub use still_jinja::Rendered;
pub(crate) use templates::{
    TEMPLATE_DIR, TEMPLATE_FILE, add_gguf_templates, add_special_tokens, read_template_files,
    template_in,
};

use crate::error::{ModelError, Result};

/// A model's templates. They are parsed on first use, so that a template that does not parse is an error only where it is needed.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    templates: Vec<Named>,
    /// `bos_token` and other special tokens that the model has.
    special: Map<String, Value>,
    /// The file that they are from, for errors.
    origin: Option<String>,
    /// Kinds of conversations of which is known that everything said in them is written.
    written: Mutex<HashSet<String>>,
}

#[derive(Debug)]
struct Named {
    name: String,
    source: String,
    parsed: OnceLock<still_jinja::Result<Template>>,
}

/// The name of the template for conversations without tools, and of the only one.
const DEFAULT: &str = "default";
/// The name of the template for conversations with tools.
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// A template made in memory. It is parsed when it is first rendered.
    pub fn new(source: String, bos: Option<String>, eos: Option<String>) -> Self {
        let tokens = [("bos_token", bos), ("eos_token", eos)];
        let special = tokens
            .into_iter()
            .filter_map(|(name, token)| Some((name.to_owned(), Value::String(token?))))
            .collect();
        Self::from_named(vec![(DEFAULT.into(), source)], special, None)
    }

    fn from_named(
        templates: Vec<(String, String)>,
        special: Map<String, Value>,
        origin: Option<String>,
    ) -> Self {
        let named = |(name, source)| Named { name, source, parsed: OnceLock::new() };
        let templates = templates.into_iter().map(named).collect();
        Self { inner: Arc::new(Inner { templates, special, origin, written: Mutex::default() }) }
    }

    /// The text of the template for conversations without tools.
    pub fn source(&self) -> &str {
        let templates = &self.inner.templates;
        let default = templates.iter().find(|named| named.name == DEFAULT);
        default.or(templates.first()).map_or("", |named| &named.source)
    }

    /// Renders a conversation; `add_generation_prompt` opens the assistant's turn.
    ///
    /// # Errors
    /// A template that does not parse or exceeds its limits, with its file and line; an error that the template itself raises.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_in(messages, &Context::default(), add_generation_prompt)
            .map(|rendered| rendered.text)
    }

    /// [`ChatTemplate::render`] with tools, documents and variables.
    ///
    /// # Errors
    /// As there; a variable that already has another meaning.
    pub fn render_in(
        &self,
        messages: &[Message],
        context: &Context,
        add_generation_prompt: bool,
    ) -> Result<Rendered> {
        self.render_at(messages, context, add_generation_prompt, SystemTime::now())
    }

    fn render_at(
        &self,
        messages: &[Message],
        context: &Context,
        add_generation_prompt: bool,
        now: SystemTime,
    ) -> Result<Rendered> {
        let mut variables = self.inner.special.clone();
        variables.extend(context.variables.clone());
        let list = |values: &Option<Vec<Value>>| values.clone().map_or(Value::Null, Value::Array);
        let reserved = [
            ("messages", messages.iter().map(Message::for_template).collect()),
            ("tools", list(&context.tools)),
            ("documents", list(&context.documents)),
            ("add_generation_prompt", Value::Bool(add_generation_prompt)),
        ];
        for (name, value) in reserved {
            if context.variables.contains_key(name) {
                let what = format!("the variable \"{name}\" is the renderer's own");
                return Err(ModelError::ChatTemplate(what));
            }
            variables.insert(name.into(), value);
        }
        let named = self.chosen(context)?;
        let parsed = named.parsed.get_or_init(|| Template::parse(&named.source));
        let template = parsed.as_ref().map_err(|error| self.failed(error, named))?;
        template.render(&variables, now).map_err(|error| self.failed(&error, named))
    }

    /// `tool_use` where there are tools, else `default`, as transformers does.
    fn chosen(&self, context: &Context) -> Result<&Named> {
        let find = |name| self.inner.templates.iter().find(|named| named.name == name);
        let tool_use = context.tools.as_ref().and_then(|_| find(TOOL_USE));
        tool_use.or_else(|| find(DEFAULT)).ok_or_else(|| {
            let names: Vec<&str> =
                self.inner.templates.iter().map(|named| named.name.as_str()).collect();
            let what =
                format!("none of the model's templates ({}) is the default", names.join(", "));
            ModelError::ChatTemplate(what + &self.place(None))
        })
    }

    fn failed(&self, error: &still_jinja::Error, named: &Named) -> ModelError {
        ModelError::ChatTemplate(format!("{error}{}", self.place(Some(named))))
    }

    /// ` (in FILE)`, with the template's name if it is one of several.
    fn place(&self, named: Option<&Named>) -> String {
        let name = named.filter(|_| self.inner.templates.len() > 1).map(|named| &named.name);
        match (&self.inner.origin, name) {
            (Some(file), Some(name)) => format!(" (\"{name}\" in {file})"),
            (Some(file), None) => format!(" (in {file})"),
            (None, Some(name)) => format!(" (in \"{name}\")"),
            (None, None) => String::new(),
        }
    }
}
