//! Messages and tools, rendered by the model's template.

use serde::Deserialize;
use serde_json::{Map, Value};
use still_model::{ChatTemplate, Context, Message};

use super::app::App;
use super::body::fields;
use super::error::{ApiError, Result};
use super::tool_calls::{CallReader, Form};
use super::tool_choice::{ToolChoice, grammar};

/// Messages, tools and other variables of the template.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Conversation {
    /// Messages, each with `role` and `content`, perhaps `tool_calls` or `tool_call_id`.
    #[cfg_attr(test, schema(value_type = Vec<Object>))]
    messages: Vec<Value>,
    /// JSON schemas of functions that the model may call. The template renders them.
    #[cfg_attr(test, schema(value_type = Option<Vec<Object>>))]
    tools: Option<Vec<Value>>,
    /// `auto`; `none`: the template does not see the tools; `required`: the answer is one call or several;
    /// `{"type": "function", "function": {"name": …}}`: the answer is one call of that function.
    #[cfg_attr(test, schema(value_type = Option<Object>))]
    tool_choice: Option<Value>,
    /// Whether an answer that must call a tool may have several calls. Default: true.
    parallel_tool_calls: Option<bool>,
    /// Variables of the template, such as `enable_thinking`.
    #[cfg_attr(test, schema(value_type = Option<Object>))]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// A variable of the template.
    reasoning_effort: Option<String>,
    /// Whether the template opens the assistant's turn. Default: true.
    add_generation_prompt: Option<bool>,
}

/// Allowed roles. A template copies the role, so any other role could inject text.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// The tokens of a text, of ids or of a conversation, whichever is given.
///
/// # Errors
/// 400 for none or several of them; what the tokenizer or the template refuses.
pub async fn ids_of(
    app: &App,
    prompt: Option<String>,
    tokens: Option<Vec<u32>>,
    conversation: Option<Box<Conversation>>,
) -> Result<Vec<u32>> {
    match (prompt, tokens, conversation) {
        (Some(text), None, None) => {
            let ids = app.tokenizer().encode(&text, true);
            ids.map_err(|error| ApiError::invalid("prompt", format!("prompt: {error}")))
        }
        (None, Some(ids), None) => Ok(ids),
        (None, None, Some(conversation)) => conversation.render(app).await,
        _ => {
            let what = "give one of `prompt`, `tokens` and `messages`";
            Err(ApiError::invalid("prompt", what))
        }
    }
}

impl Conversation {
    /// That of a request which may have other fields instead.
    ///
    /// # Errors
    /// 400 for fields of wrong types.
    pub fn in_a_request(request: &Value) -> Result<Option<Box<Self>>> {
        let given = request.get("messages").is_some_and(|messages| !messages.is_null());
        given.then(|| fields(request).map(Box::new)).transpose()
    }

    /// The tokens of the rendered messages. A separate thread computes them, because a long conversation takes some time.
    ///
    /// # Errors
    /// 400 for messages that are malformed or that the template refuses; for tools or a system message that it ignores.
    pub async fn render(self, app: &App) -> Result<Vec<u32>> {
        let app = app.clone();
        let rendered = tokio::task::spawn_blocking(move || self.rendered(&app));
        rendered.await.unwrap_or_else(|_| Err(ApiError::internal()))
    }

    /// A reader that finds tool calls in an answer, if there are tools and the template has a known form of calls.
    ///
    /// # Errors
    /// 400 for tools that are malformed.
    pub fn call_reader(&self, app: &App) -> Result<Option<CallReader>> {
        let (tools, template) = (self.tools()?, app.tokenizer().chat_template());
        Ok(tools.zip(template).and_then(|(tools, template)| CallReader::new(template, &tools)))
    }

    /// The grammar of an answer that must call a tool, if it must.
    ///
    /// # Errors
    /// 400 for tools that are malformed, or none to be called; for a template whose calls are not known.
    pub fn forced_calls(&self, app: &App) -> Result<Option<String>> {
        let choice = ToolChoice::read(self.tool_choice.as_ref())?;
        if !choice.forces() {
            return Ok(None);
        }
        let tools = self.tools()?.unwrap_or_default();
        let functions = choice.among(&tools)?;
        let tokenizer = app.tokenizer();
        let template = tokenizer.chat_template().map_or("", ChatTemplate::source);
        let Some(form) = Form::of(template) else {
            let what = "tool_choice: how calls are written is not known of the model's chat template: use \"auto\", or `response_format`";
            return Err(ApiError::unsupported("tool_choice", what));
        };
        let several =
            matches!(choice, ToolChoice::Required) && self.parallel_tool_calls.unwrap_or(true);
        let special =
            |marker: &str| tokenizer.token_id(marker).filter(|id| tokenizer.is_special(*id));
        Ok(Some(grammar(form, template, &functions, several, special)))
    }

    fn rendered(self, app: &App) -> Result<Vec<u32>> {
        let tokenizer = app.tokenizer();
        let Some(template) = tokenizer.chat_template() else {
            let what = "the model has no chat template: use /v1/completions";
            return Err(ApiError::invalid("messages", what));
        };
        let messages = self.messages(template)?;
        let context =
            Context { tools: self.tools()?, documents: None, variables: self.variables(template) };
        let refused = |error: still_model::ModelError| {
            ApiError::invalid("messages", format!("messages: {error}"))
        };
        let opens = self.add_generation_prompt.unwrap_or(true);
        let text = template.render_in(&messages, &context, opens).map_err(refused)?.text;
        if context.tools.is_some() {
            let without = Context { tools: None, ..context };
            let without = template.render_in(&messages, &without, opens);
            if without.is_ok_and(|without| without.text == text) {
                let what = "the model's chat template ignores `tools`: leave them out, or describe them in a message";
                return Err(ApiError::unsupported("tools", what));
            }
        }
        if template.ignores(&messages, "system").map_err(refused)? {
            let what = "messages: the model's chat template ignores system messages: say it in a user's message";
            return Err(ApiError::invalid("messages", what));
        }
        let ids = tokenizer.encode(&text, false).map_err(refused)?;
        if ids.is_empty() {
            return Err(ApiError::invalid("messages", "messages: there is nothing to answer"));
        }
        Ok(ids)
    }

    fn messages(&self, template: &ChatTemplate) -> Result<Vec<Message>> {
        if self.messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages: there are none"));
        }
        let knows_developers = template.source().contains("developer");
        let all = self.messages.iter().enumerate();
        all.map(|(at, message)| {
            let wrong = |what: String| {
                let place = format!("messages[{at}]");
                ApiError::invalid(place.clone(), format!("{place}: {what}"))
            };
            let Value::Object(object) = message else { return Err(wrong("not an object".into())) };
            let mut object = object.clone();
            match object.get("role").and_then(Value::as_str) {
                Some(role) if !ROLES.contains(&role) => {
                    return Err(wrong(format!("the role is not one of {}", ROLES.join(", "))));
                }
                Some("developer") if !knows_developers => {
                    object.insert("role".into(), "system".into());
                }
                _ => {}
            }
            join_parts(&mut object);
            parse_arguments(&mut object);
            Message::try_from(object).map_err(wrong)
        })
        .collect()
    }

    fn tools(&self) -> Result<Option<Vec<Value>>> {
        let tools = self.tools.clone().filter(|tools| !tools.is_empty());
        if let Some(tools) = &tools
            && tools.iter().any(|tool| !tool.is_object())
        {
            return Err(ApiError::invalid("tools", "tools: each is an object"));
        }
        let choice = ToolChoice::read(self.tool_choice.as_ref())?;
        Ok(tools.filter(|_| choice != ToolChoice::None))
    }

    /// Passes a reasoning effort to templates that use one.
    fn variables(&self, template: &ChatTemplate) -> Map<String, Value> {
        let mut variables = self.chat_template_kwargs.clone().unwrap_or_default();
        if let Some(effort) = &self.reasoning_effort
            && template.source().contains("reasoning_effort")
        {
            variables.entry("reasoning_effort").or_insert(effort.clone().into());
        }
        variables
    }
}

/// Joins a list of text parts to one text, because most templates do not take lists.
fn join_parts(message: &mut Map<String, Value>) {
    let Some(Value::Array(parts)) = message.get("content") else { return };
    let text = |part: &Value| match part {
        Value::String(text) => Some(text.clone()),
        part if part["type"] == "text" => part["text"].as_str().map(str::to_owned),
        _ => None,
    };
    if let Some(texts) = parts.iter().map(text).collect::<Option<Vec<String>>>() {
        message.insert("content".into(), texts.join("\n").into());
    }
}

/// OpenAI's clients send a call's arguments as text, and templates expect an object.
fn parse_arguments(message: &mut Map<String, Value>) {
    let Some(Value::Array(calls)) = message.get_mut("tool_calls") else { return };
    for call in calls {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        if let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str(text).ok())
            && let Value::Object(_) = parsed
        {
            *arguments = parsed;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn parts_of_text_become_one_text() {
        let mut message = object(json!({ "content": [{ "type": "text", "text": "a" }, "b"] }));
        join_parts(&mut message);
        assert_eq!(message["content"], "a\nb");
        let image = json!({ "content": [{ "type": "image_url", "image_url": {} }] });
        let mut message = object(image.clone());
        join_parts(&mut message);
        assert_eq!(Value::Object(message), image);
    }

    #[test]
    fn arguments_of_calls_become_objects() {
        let call = |arguments: Value| json!({ "tool_calls": [{ "function": { "name": "f", "arguments": arguments } }] });
        let mut message = object(call(json!("{\"x\": 1}")));
        parse_arguments(&mut message);
        assert_eq!(Value::Object(message), call(json!({ "x": 1 })));
        for kept in [json!("no object"), json!("3"), json!({ "x": 1 })] {
            let mut message = object(call(kept.clone()));
            parse_arguments(&mut message);
            assert_eq!(Value::Object(message), call(kept));
        }
    }
}
