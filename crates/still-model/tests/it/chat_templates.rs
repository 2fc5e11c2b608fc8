//! What the templates of the families ask of the renderer.

use still_model::{ChatTemplate, Message, ModelError};

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source.into(), Some("<s>".into()), Some("</s>".into()))
}

fn turns(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|&(role, content)| Message::new(role, content)).collect()
}

/// Turns in brackets, in the manner of Mistral: users and assistants alternate, or the template says so.
const BRACKETS: &str = r#"
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate: user, assistant, user, …") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"#;

#[test]
fn bracketed_turns_alternate_or_the_template_says_why() {
    let template = template(BRACKETS);
    let rendered = template.render(
        &turns(&[
            ("system", "Be brief."),
            ("user", "Hi"),
            ("assistant", " Hello "),
            ("user", "Bye"),
        ]),
        true,
    );
    let expected = "<s>[INST] Hi [/INST] Hello</s>[INST] Be brief.\n\nBye [/INST]";
    assert_eq!(rendered.unwrap(), expected);
    let twice = template.render(&turns(&[("user", "Hi"), ("user", "Hi?")]), true).unwrap_err();
    assert!(matches!(twice, ModelError::ChatTemplate(_)));
    assert!(twice.to_string().contains("roles must alternate"), "{twice}");
}

/// Reasoning in a block of its own, in the manner of Qwen3: kept after the last question, dropped before.
const THINKING: &str = r#"
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content.lstrip('\n') + '<|im_end|>\n' }}
        {%- if message.tool_calls %}{{- message.tool_calls | tojson }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"#;

#[test]
fn thoughts_are_kept_after_the_last_question_only() {
    let thought = "<think>\nhm\n</think>\n\nFour.";
    let mut turns = turns(&[
        ("system", "Count."),
        ("user", "2 + 2?"),
        ("assistant", thought),
        ("user", "Sure?"),
    ]);
    let template = template(THINKING);
    let before = "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n\
                  <|im_start|>assistant\nFour.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n";
    let rendered = template.render(&turns, true).unwrap();
    assert_eq!(rendered, format!("{before}<|im_start|>assistant\n"));
    turns.push(Message::new("assistant", "<think>\nyes\n</think>\n\nYes."));
    let rendered = template.render(&turns, false).unwrap();
    let after = "<|im_start|>assistant\n<think>\nyes\n</think>\n\nYes.<|im_end|>\n";
    assert_eq!(rendered, format!("{before}{after}"));
}

#[test]
fn loops_can_be_left_early() {
    let source = "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}\
                  {% if loop.index0 > 2 %}{% break %}{% endif %}{{ message.content }};{% endfor %}";
    let turns = turns(&[("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]);
    assert_eq!(template(source).render(&turns, false).unwrap(), "b;c;");
}
