//! Hostile templates end, soon and with an error of the template.

use std::time::{Duration, Instant, SystemTime};

use serde_json::{Map, json};
use still_jinja::{Error, ErrorKind, Rendered, Template};

fn render(source: &str) -> Result<Rendered, Error> {
    let mut variables = Map::new();
    variables.insert("messages".into(), json!([{ "role": "user", "content": "hi" }]));
    Template::parse(source)?.render(&variables, SystemTime::UNIX_EPOCH)
}

/// Renders on a thread with hardly a stack, as a caller may have.
fn refused(source: &str) -> Error {
    let started = Instant::now();
    let owned = source.to_owned();
    let thread = std::thread::Builder::new().stack_size(128 << 10);
    let result = thread.spawn(move || render(&owned)).unwrap().join().unwrap();
    let took = started.elapsed();
    let shown: String = source.chars().take(80).collect();
    assert!(took < Duration::from_secs(10), "{shown}: {took:?}");
    match result {
        Ok(rendered) => panic!("{shown}: rendered {} bytes", rendered.text.len()),
        Err(error) => {
            assert!(error.to_string().len() < 400, "{shown}: {error}");
            error
        }
    }
}

#[test]
fn deep_nesting_is_refused_before_it_is_followed() {
    let many = 25_000;
    let around = |open: &str, inner: &str, close: &str| {
        format!("{{{{ {}{inner}{} }}}}", open.repeat(many), close.repeat(many))
    };
    let nested = |open: &str, close: &str| format!("{}{}", open.repeat(many), close.repeat(many));
    for source in [
        around("-", "1", ""),
        around("+", "1", ""),
        around("- ", "1", ""),
        around("not ", "1", ""),
        around("(", "1", ")"),
        around("[", "", "]"),
        around("{1:", "1", "}"),
        around("a[", "1", "]"),
        around("f(", "1", ")"),
        around("(1,", "1", ")"),
        around("1 if ", "1", ""),
        around("1 if 1 else ", "1", ""),
        around("x|f(", "1", ")"),
        around("x is f(", "1", ")"),
        around("x is f [", "1", "]"),
        nested("{% if 1 %}", "{% endif %}"),
        nested("{% for x in y %}", "{% endfor %}"),
        nested("{% macro f() %}", "{% endmacro %}"),
        nested("{% set x %}", "{% endset %}"),
        nested("{% filter upper %}", "{% endfilter %}"),
        nested("{% call f() %}", "{% endcall %}"),
        nested("{% generation %}", "{% endgeneration %}"),
        nested("{% with %}", "{% endwith %}"),
        format!("{{% set {}a{} = 1 %}}", "(".repeat(many), ")".repeat(many)),
        // Without an end, too.
        "{% if 1 %}".repeat(many),
        format!("{{{{ {}", "(".repeat(many)),
    ] {
        let error = refused(&source);
        assert!(matches!(error.kind, ErrorKind::Limit | ErrorKind::Syntax), "{error:?}");
        assert!(error.line.is_some(), "{error:?}");
    }
}

#[test]
fn long_chains_nest_nothing() {
    let many = 20_000;
    let sum = format!("{{{{ 1{} }}}}", " + 1".repeat(many));
    assert_eq!(render(&sum).unwrap().text, (many + 1).to_string());
    for chain in [" ~ 1", " or 1", " and 1", " < 2", " | string", " * 1", " == 1", "|upper"] {
        render(&format!("{{{{ 1{} }}}}", chain.repeat(many))).unwrap();
    }
    render(&format!("{{{{ x{} }}}}", "['a']".repeat(2))).unwrap_err();
    let branches = "{% elif 0 %}".repeat(many);
    render(&format!("{{% if 0 %}}{branches}{{% endif %}}")).unwrap();
    render(&format!("{{{{ 'a'{} }}}}", " 'a'".repeat(many))).unwrap();
}

#[test]
fn what_takes_or_writes_without_end_is_ended() {
    for source in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ 'a' * 99999999999999999999 }}",
        "{{ [0] * 1000000000 }}",
        "{{ [[0] * 100000] * 100000 }}",
        "{{ range(1000000000000000) }}",
        "{% for i in range(99999) %}{% for j in range(999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}",
        "{% set ns = namespace(x={}) %}{% for i in range(90000) %}{% set ns.x = {'a': ns.x} %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('a', 'aaaaaaaaaaaa') %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | tojson %}{% endfor %}",
        "{% set ns = namespace(x=1) %}{% for i in range(150) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=1) %}{% for i in range(150) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x=1, y=1) %}{% for i in range(150) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
        "{% set ns = namespace(x=1, y=1) %}{% for i in range(150) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x < ns.y }}",
        "{% set ns = namespace(x=(1,)) %}{% for i in range(150) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1}[ns.x] }}{{ {ns.x: 1} | tojson }}",
        "{{ 'x'.center(100000000000) }}",
        "{{ 'x'.zfill(100000000000) }}",
        "{{ 'x' | center(100000000000) }}",
        "{{ 'x' | indent(100000000000, true) }}",
        "{{ ('x\n' * 1000) | indent('y' * 1000000) }}",
        "{{ '%1000000000s' % 'x' }}",
        "{{ '%.1000000000f' % 1 }}",
        "{{ '%*d' % (1000000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:.1000000000f}'.format(1) }}",
        "{{ '\t\t\t'.expandtabs(1000000000000) * 100000 }}",
        "{{ (('a,' * 100000).split(',') | join('b' * 10000)) }}",
        "{{ ('x' * 1000) .join('y' * 1000000) }}",
        "{{ [1] | batch(1000000000000, 'x') | list }}",
        "{{ [1] | slice(1000000000000) | list }}",
        "{{ range(99999) | map('string') | map('center', 99999) | list }}",
        "{{ 'a' | map('map', 'map', 'map', 'map', 'map', 'map', 'map', 'map', 'map', 'map', 'map', 'map', 'map', 'map', 'map', 'map', 'map') | list }}",
        "{{ [1] | tojson(indent='x' * 100000000) }}",
        "{{ strftime_now('%Y' * 100000) }}",
        "{{ strftime_now('%1000000000Y') }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 2 ** 100000000000 }}",
        "{{ 170141183460469231731687303715884105727 + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{% call f() %}{% endcall %}{% endmacro %}{{ f() }}",
        "{% macro f() %}{% for x in [1] %}{% if 1 %}{% filter upper %}{{ -(-(-(f() | int))) }}{% endfilter %}{% endif %}{% endfor %}{% endmacro %}{{ f() }}",
        "{% set l = [1] %}{% for x in l recursive %}{{ loop(l) }}{% endfor %}",
        "{% set ns = namespace() %}{% for i in range(99999) %}{% for j in range(99) %}{% macro m() %}{% endmacro %}{% set ns.m = m %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99) %}{% set x = namespace(a=1, b=2, c=3) %}{% endfor %}{% endfor %}",
        "{% set d = namespace() %}{% for i in range(99999) %}{% set x = dict(d, a=1) %}{% endfor %}",
        "{{ dict(range(99999) | map('string') | map('list')) }}{{ range(99999) | map('string') | unique | list | unique | list }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% from 'x' import y %}",
        "{% extends 'x' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
    ] {
        refused(source);
    }
}

#[test]
fn a_chain_of_objects_is_let_go_without_a_stack() {
    // Each loop remembers the one before in what `changed` compared last; namespaces hold each other in a row and a ring.
    for source in [
        "{% set ns = namespace(p=0) %}{% for i in range(50000) %}{% for j in [1] %}{{ loop.changed(ns.p) }}{% set ns.p = loop %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(p=0) %}{% for i in range(50000) %}{% set ns.p = namespace(q=ns.p) %}{% endfor %}",
        "{% set ns = namespace(p=0) %}{% set ns.p = ns %}{{ ns.p.p.p is defined }}{{ ns }}",
        "{% set ns = namespace(p=0) %}{% for i in range(50000) %}{% macro m() %}{{ ns.p }}{% endmacro %}{% set ns.p = m %}{% endfor %}",
        "{% set ns = namespace(p=0) %}{% for i in range(50000) %}{% set ns.p = cycler(ns.p, 1) %}{% endfor %}",
    ] {
        render(source).unwrap();
    }
}

#[test]
fn a_source_has_a_longest_length() {
    let error = refused(&"x".repeat(still_jinja::MAX_SOURCE_BYTES + 1));
    assert_eq!(error.kind, ErrorKind::Limit);
    assert_eq!(render(&"x".repeat(still_jinja::MAX_SOURCE_BYTES)).unwrap().text.len(), 1 << 20);
}

#[test]
fn long_conversations_are_no_hostile_templates() {
    let content = "word ".repeat(2000);
    let roles = ["user", "assistant"];
    let message = |n: usize| json!({ "role": (roles[n % 2]), "content": content });
    let mut variables = Map::new();
    variables.insert("messages".into(), (0..1000).map(message).collect());
    let source = "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text ~ (m.content | trim) %}\
                  {% if messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list | length %}\
                  {{ m.role + ': ' + m.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}{% endfor %}";
    let started = Instant::now();
    let template = Template::parse(source).unwrap();
    let rendered = template.render(&variables, SystemTime::UNIX_EPOCH).unwrap();
    assert!(rendered.text.len() > 9_000_000, "{}", rendered.text.len());
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn what_a_template_raises_is_its_own_words_and_other_errors_have_a_line() {
    let raised = render("\n\n{{ raise_exception('roles must alternate') }}").unwrap_err();
    assert_eq!(
        (raised.kind, raised.to_string()),
        (ErrorKind::Raised, "roles must alternate".into())
    );
    let undefined = render("a\n{% if 1 %}\n{{ x.y }}{% endif %}").unwrap_err();
    assert_eq!(undefined.to_string(), "line 3: 'x' is undefined");
    assert_eq!(undefined.kind, ErrorKind::Undefined);
    let syntax = render("a\n{{ 1 + }}").unwrap_err();
    assert_eq!((syntax.kind, syntax.line), (ErrorKind::Syntax, Some(2)));
}

#[test]
fn generated_text_is_told() {
    let source = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}!{% endgeneration %}\n{% endfor %}";
    let rendered = render(source).unwrap();
    assert_eq!(rendered.text, "<user>hi!");
    assert_eq!(rendered.generated.as_deref(), Some(std::slice::from_ref(&(6..9))));
    assert_eq!(render("x").unwrap().generated, None);
    let taken_up = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x }}";
    assert_eq!(render(taken_up).unwrap(), Rendered { text: "a".into(), generated: None });
}
