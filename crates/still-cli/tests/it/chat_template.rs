//! Chat templates that are damaged or hostile: an error of the chat, none of what needs no template.

use std::time::{Duration, Instant};

use crate::common::{Outcome, chat_dir, still};

#[test]
fn a_bad_template_hinders_only_the_chat() {
    let deep = format!("{{{{ {}1 }}}}", "-".repeat(100_000));
    let (open, close) = ("(".repeat(50_000), ")".repeat(50_000));
    let parentheses = format!("{{{{ {open}1{close} }}}}");
    for (template, words) in [
        ("{% call x() %}{% enddo %}", "unknown tag 'enddo'"),
        ("{{ 1 + }}", "line 1: unexpected '}}'"),
        (&*deep, "nests deeper"),
        (&*parentheses, "nests deeper"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
            "steps that a template may",
        ),
        ("{{ 'a' * 1000000000 }}", "steps that a template may"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deeper than"),
        ("{{ messages.foo.bar }}", "'list object' has no attribute 'foo'"),
        ("{% include 'x' %}", "no other templates"),
        (
            "{{ raise_exception('Only one question, please') }}",
            "chat template: Only one question, please (in",
        ),
    ] {
        let model = chat_dir(template);
        let dir = model.path().join("student");
        let started = Instant::now();
        let chat =
            Outcome::of(still().args(["chat", "-n", "1", "--model"]).arg(&dir).write_stdin("hi\n"));
        assert!(started.elapsed() < Duration::from_secs(20), "{words}");
        chat.failed_with(words);
        assert!(chat.stderr.contains("error: chat template: "), "{}", chat.stderr);
        assert!(chat.stderr.contains("tokenizer_config.json"), "{}", chat.stderr);
        let generate = ["generate", "-n", "1", "--prompt", "hi", "--model"];
        Outcome::of(still().args(generate).arg(&dir)).succeeded();
    }
}

#[test]
fn a_system_message_that_is_not_written_is_told() {
    let model = chat_dir("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}");
    let chat = ["chat", "-n", "1", "--system", "Be brief.", "--model"];
    let outcome =
        Outcome::of(still().args(chat).arg(model.path().join("student")).write_stdin("hi\n"));
    outcome.failed_with("writes nothing of what system messages say");
}
