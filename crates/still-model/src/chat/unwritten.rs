//! What a template leaves out of a conversation without a word.

use std::collections::BTreeSet;
use std::time::SystemTime;

use super::message::REASONING;
use super::{ChatTemplate, Context, Message, Rendered};
use crate::error::Result;

/// Keys that only tell which answer belongs to which call.
const LINKS: [&str; 2] = ["tool_call_id", "id"];
/// What is added to contents to see whether they are written.
const MORE: &str = " [more]";
/// Kinds of conversations that are remembered.
const MOST_KINDS: usize = 4096;

impl ChatTemplate {
    /// [`ChatTemplate::render_in`] without a prompt, and what of the conversation the template ignores, in words: it is rendered
    /// again without each thing that it might leave out, and what makes no difference is left out. Messages of one
    /// role and with the same keys are looked at together, because a template may well keep the thoughts of the last
    /// turn only.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_in`].
    pub fn render_whole(
        &self,
        messages: &[Message],
        context: &Context,
    ) -> Result<(Rendered, Option<String>)> {
        let now = SystemTime::now();
        let rendered = self.render_at(messages, context, false, now)?;
        // What cannot be rendered otherwise was used.
        let is_unused = |messages: &[Message], context: &Context| {
            let other = self.render_at(messages, context, false, now);
            other.is_ok_and(|other| other.text == rendered.text)
        };
        let groups: BTreeSet<Group<'_>> = messages.iter().map(Group::of).collect();
        for group in &groups {
            for key in &group.keys {
                let keys = if *key == REASONING[0] { &REASONING[..] } else { &[*key][..] };
                if is_unused(&group.changed(messages, |message| message.without(keys)), context) {
                    let what = format!("\"{key}\" of messages of the role \"{}\"", group.role);
                    return Ok((rendered, Some(what)));
                }
            }
        }
        let without = Context { tools: None, ..context.clone() };
        if context.tools.as_ref().is_some_and(|tools| !tools.is_empty())
            && is_unused(messages, &without)
        {
            return Ok((rendered, Some("\"tools\"".into())));
        }
        let without = Context { documents: None, ..context.clone() };
        if context.documents.as_ref().is_some_and(|documents| !documents.is_empty())
            && is_unused(messages, &without)
        {
            return Ok((rendered, Some("\"documents\"".into())));
        }
        for name in context.variables.keys() {
            if !self.inner.templates.iter().any(|named| named.source.contains(name)) {
                return Ok((rendered, Some(format!("the variable \"{name}\""))));
            }
        }
        // Which contents are written is decided by roles and keys alone, so that a kind of conversation is looked at once.
        let kind = format!("{groups:?} {}", context.tools.is_some());
        if self.known_kinds().contains(&kind) {
            return Ok((rendered, None));
        }
        for group in &groups {
            let mut says = false;
            let changed = group.changed(messages, |message| {
                let more = message.saying_more(MORE);
                says |= more.is_some();
                more.unwrap_or_else(|| message.clone())
            });
            if says && is_unused(&changed, context) {
                let what = format!("what messages of the role \"{}\" say", group.role);
                return Ok((rendered, Some(what)));
            }
        }
        let mut kinds = self.known_kinds();
        if kinds.len() < MOST_KINDS {
            kinds.insert(kind);
        }
        drop(kinds);
        Ok((rendered, None))
    }

    /// Whether what messages of a role say makes no difference.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn ignores(&self, messages: &[Message], role: &str) -> Result<bool> {
        let more = |message: &Message| match message.role() == role {
            true => message.saying_more(MORE).unwrap_or_else(|| message.clone()),
            false => message.clone(),
        };
        let changed: Vec<Message> = messages.iter().map(more).collect();
        if changed == messages {
            return Ok(false);
        }
        let (context, now) = (Context::default(), SystemTime::now());
        let rendered = self.render_at(messages, &context, true, now)?;
        let other = self.render_at(&changed, &context, true, now);
        Ok(other.is_ok_and(|other| other.text == rendered.text))
    }

    fn known_kinds(&self) -> std::sync::MutexGuard<'_, std::collections::HashSet<String>> {
        // The set is whole after every step, whoever panicked.
        self.inner.written.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Messages of one role and with the same keys.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Group<'a> {
    role: &'a str,
    /// Besides role and content, those that say something.
    keys: Vec<&'a str>,
}

impl<'a> Group<'a> {
    fn of(message: &'a Message) -> Self {
        let mut keys: Vec<&str> = message
            .object()
            .iter()
            .filter(|(key, value)| {
                let plain =
                    matches!(key.as_str(), "role" | "content") || LINKS.contains(&key.as_str());
                !plain && !is_empty(value)
            })
            .map(|(key, _)| key.as_str())
            .map(|key| if REASONING.contains(&key) { REASONING[0] } else { key })
            .collect();
        keys.sort_unstable();
        keys.dedup();
        Self { role: message.role(), keys }
    }

    fn changed(
        &self,
        messages: &'a [Message],
        mut change: impl FnMut(&Message) -> Message,
    ) -> Vec<Message> {
        let each = |message: &'a Message| {
            if Group::of(message) == *self { change(message) } else { message.clone() }
        };
        messages.iter().map(each).collect()
    }
}

/// A key that says nothing: `"tool_calls": []` is how some write that there are none.
fn is_empty(value: &serde_json::Value) -> bool {
    use serde_json::Value;
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}
