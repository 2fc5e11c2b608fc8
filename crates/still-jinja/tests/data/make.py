#!/usr/bin/env python3
"""Writes python.json: small templates and what transformers' environment makes of them (or that it refuses them).

pip install transformers jinja2; python3 make.py
"""
import json
import os

from transformers.utils.chat_template_utils import _compile_jinja_template

HERE = os.path.dirname(os.path.abspath(__file__))
VARIABLES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello <b> & 'c' \"d\" é 日本 😀\n two"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1, "b": [1.0, None, True], "c": "x"}}}]},
    ],
    "s": "  Hello World, hello  ",
    "w": "straße ÀÉ ﬁx o'neil-x 3d",
    "n": 7, "f": 2.5, "big": 10**17, "neg": -7, "yes": True, "none_": None,
    "xs": [3, 1, 2], "names": ["b", "A", "c", "a"], "empty": [], "d": {"b": 1, "a": [1, 2], "items": 5, "_x": 6},
    "rows": [{"k": "x", "v": 1}, {"k": "y", "v": 2}, {"k": "X", "v": 3}, {"k": "x"}],
    "floats": [1.0, 0.1, 1e16, 1e15, 1e-5, 0.0001, 123456789.125, 1e300, -0.0, 3.0e-10],
    "tools": None, "add_generation_prompt": True, "bos_token": "<s>",
}

# Expressions; each becomes {{ … }}.
EXPRESSIONS = """
true|none|xs|d|rows|floats|[1, 'a', none, "it's", 'q"', "b\\\\s\\n\\t\\x01é\\u200b"]|(1,)|()|(1, 2)|{}|[]|{'a': (1, [2])}
1.0|1e5|1e16|1e22|1.5e-7|0.1 + 0.2|3 / 2|4 / 2|7 // 2|-7 // 2|7 % 3|-7 % 3|7 % -3|7.5 % 2|-7.5 // 2|2 ** 3|2 ** -1|2 ** 0.5|1_000 + 0x1F + 0b11 + 0o17
-n|+n|-f|- -n|-n ** 2|2 ** 3 ** 2|not yes|not not yes|1 < 2 < 3|1 < 3 < 2|1 == 1.0|true == 1|'a' < 'b'|[1, 2] < [1, 3]|1 != 2 == true
'a' in 'abc'|'z' not in 'abc'|1 in xs|'a' in d|'k' in rows[0]|none in [none]|'' in ''|1 in (1, 2)|'x' in rows[0].values()|2 in range(3)
n if yes|n if not yes|n if not yes else 'no'|'a' if 0 else 'b' if 0 else 'c'|yes and n|0 or 'x'|'' or none|none and 1|empty or 'e'
'a' ~ 1 ~ none ~ true ~ 1.0 ~ xs|'a' * 3|3 * 'ab'|[1] * 2|'a' + 'b'|[1] + [2]|(1,) + (2,)|'a' 'b'|'x' * 0|'x' * -1
s.strip()|s.lstrip()|s.rstrip()|s.strip(' Ho')|s.upper()|s.lower()|s.title()|s.capitalize()|s.swapcase()|s.strip().split(' ')|s.split()|s.split('l')|s.split('l', 1)|s.rsplit('l', 1)|s.split(none, 1)|s.rsplit(none, 1)|s.split(' ', maxsplit=2)|'a,b,,c'.split(',')|''.split()|''.split(',')|'  '.split(' ')
s.replace('l', 'L')|s.replace('l', 'L', 1)|s.replace('', '-')|s.replace('hello', '')|'aaa'.replace('a', 'b', 2)|''.replace('', 'x')|'ab'.replace('', '-', 2)
s.find('o')|s.find('zz')|s.rfind('o')|s.index('o')|s.count('l')|s.count('')|s.find('o', 8)|s.find('l', 3, 5)|s.count('l', 5)|s.find('')|'é日本x'.find('x')|'abc'.find('', 5)|'abc'.find('', 3)
s.startswith('  H')|s.startswith(('x', '  '))|s.endswith('  ')|s.endswith(('a', 'b'))|s.startswith('H', 2)|s.startswith('', 99)|'abc'.startswith('')|'abc'.endswith('bc', 1)
'abc'.removeprefix('a')|'abc'.removesuffix('c')|'abc'.removeprefix('x')|'a-b-c'.partition('-')|'a-b-c'.rpartition('-')|'abc'.partition('-')|'abc'.rpartition('-')
'-'.join(['a', 'b'])|'-'.join('abc')|', '.join(d)|'a\\nb\\r\\nc'.splitlines()|'a\\nb\\n'.splitlines(true)|'a\\x0bb\\u2028c'.splitlines()|'x'.center(5)|'x'.center(6, '*')|'ab'.center(5, '*')|'ab'.center(7, '*')|'x'.ljust(3) ~ '|'|'x'.rjust(3)|'7'.zfill(3)|'-7'.zfill(4)|'a\\tb'.expandtabs(4)
w.upper()|w.title()|w.capitalize()|w.casefold()|w.swapcase()|w.lower()|w | title|w | capitalize|'ǆx'.title()|'they\\'re bill\\'s'.title()|"they're bill's" | title
'12'.isdigit()|'1²'.isdigit()|'1²'.isdecimal()|'Ⅷ'.isnumeric()|'½'.isnumeric()|'½'.isdigit()|'abc'.isalpha()|'ab1'.isalnum()|' \\t'.isspace()|''.isspace()|'Abc'.istitle()|'ABC1'.isupper()|'abc1'.islower()|'1'.isupper()|'a_1'.isidentifier()|'1a'.isidentifier()|'é'.isascii()|'\\n'.isprintable()
'{} {}'.format(1, 'a')|'{0}{1}{0}'.format('x', 'y')|'{a}'.format(a=none)|'{:>5}|{:<5}|{:^5}'.format(1, 'a', 'b')|'{:05d}'.format(42)|'{:+.2f}'.format(3.14159)|'{:,}'.format(1234567)|'{:x} {:#x} {:b}'.format(255, 255, 5)|'{:.3}'.format('abcdef')|'{:e}'.format(12345.678)|'{:g}'.format(0.00001234)|'{:%}'.format(0.25)|'{0.a}{0[b]}'.format(d)|'{!r}'.format('a')|'{{}}'.format()|'{:{w}}'.format('a', w=4)|'{:.2f}'.format(2)|'{:d}'.format(true)|'{}'.format(true)|'{:*^9}'.format('mid')|'{:_}'.format(1234567)|'{:.10}'.format(1.0)|'{:10.3}'.format(3.14159)
'%s' % 'a'|'%s and %s' % (1, none)|'%d' % 3.7|'%05d' % 42|'%.2f' % 2.5|'%5s|' % 'a'|'%-5s|' % 'a'|'%x' % 255|'%e' % 12345.678|'%g' % 0.0001|'%g' % 1e10|'%(a)s' % {'a': 1}|'%r' % 'a'|'%%' % ()|'%c' % 'a'|'%+d' % 3|'%s' % xs|'%s' % (xs,)|'%i' % true|'%.3s' % 'abcdef'
xs[0]|xs[-1]|xs[5]|xs['a']|xs[1:]|xs[:-1]|xs[::-1]|xs[::2]|xs[5:]|xs[-2:]|xs[2:0:-1]|'hello'[1:3]|'hello'[::-1]|'hello'[-3:]|'hello'[10:]|'héllo'[1]|'hello'[9]|(1, 2, 3)[1:]|xs.0|rows[0].k|rows[0]['k']|d.a[1]|d['a'][-1]|d.zz|d['zz']|d['items']|d._x|range(5)[1]|range(10)[2:5]|xs[true]
d.items()|d.keys()|d.values()|d | items | list|d.get('a')|d.get('zz')|d.get('zz', 'x')|d.items() | list|d.keys() | list|d | list|d | length|d.items is defined|d.items is callable|d.copy()|dict(a=1, b=2)|dict([('a', 1)])|dict(d, z=1)|{'a': 1, 'a': 2}|{1: 'a', 1.0: 'b', true: 'c'}|dict.fromkeys(['a', 'b'], 0)
xs.count(1)|xs.index(2)|names.index('c')|(1, 1).count(1)|range(3)|range(1, 7, 2) | list|range(5, 0, -2) | list|range(0) | list|range(3) | length
xs | length|s | length|'日本' | length|empty | length|undefined_ | length|rows | count|none_ | length|n | length
xs | first|xs | last|empty | first|empty | last|'abc' | first|'abc' | last|d | first|xs | join|xs | join(', ')|rows | join('-', attribute='k')|'abc' | join('.')|[1, none, true] | join(',')|undefined_ | join|rows | map(attribute='k') | join(',')|rows | map(attribute='v') | list|rows | map(attribute='v', default=0) | list|names | map('upper') | list|names | map('replace', 'a', 'z') | list|xs | map('string') | list|[[1, 2], [3]] | map('first') | list|[[1,2],[3]] | map('join', '-') | join(' ')
rows | selectattr('k', 'equalto', 'x') | list|rows | selectattr('k', '==', 'x') | map(attribute='v') | list|rows | rejectattr('k', 'eq', 'x') | list|rows | selectattr('v') | list | length|rows | selectattr('v', 'defined') | list | length|rows | rejectattr('v', 'defined') | list|xs | select('>', 1) | list|xs | reject('odd') | list|xs | select | list|[0, 1, '', 'a'] | select | list|rows | selectattr('k', 'in', ['y', 'X']) | list|xs | select('odd') | first
xs | sort|names | sort|names | sort(case_sensitive=true)|xs | sort(reverse=true)|rows[:3] | sort(attribute='k') | map(attribute='v') | list|rows[:3] | sort(attribute='k,v', reverse=true) | map(attribute='v') | list|d | dictsort|{'b': 1, 'A': 2} | dictsort(true)|{'b': 1, 'A': 2} | dictsort(by='value', reverse=true)|names | unique | list|rows | map(attribute='k') | unique | list|xs | max|xs | min|names | max|rows[:3] | max(attribute='v')|empty | max|xs | sum|rows[:3] | sum(attribute='v')|xs | sum(start=10)|floats[:2] | sum|xs | reverse | list|'abc' | reverse
rows[:3] | groupby('k')|rows[:3] | groupby('k') | map('first') | list|xs | batch(2) | list|xs | batch(2, 'x') | list|xs | slice(2) | list|[1,2,3,4,5] | slice(3, 'x') | list
n | string|none_ | string|xs | string|undefined_ | string|'12' | int|'12.7' | int|'x' | int|'x' | int(5)|' 0x1f ' | int(base=16)|'0b11' | int(0, 2)|2.9 | int|-2.9 | int|true | int|none_ | int|'1e3' | int|'1_000' | int|'2.5' | float|'x' | float|'inf' | float|n | float|'1e400' | float|'nan' | float|none_ | float(1.5)
2.5 | round|3.5 | round|-2.5 | round|2.675 | round(2)|1234.5678 | round(2)|7 | round|1234 | round(-2)|1250 | round(-2)|42.55 | round(1, 'floor')|42.51 | round(1, 'ceil')|-3 | abs|-2.5 | abs|2.5 | round | int
s | upper|s | lower|s | trim|s | trim('  H')|s | title|s | capitalize|s | replace('l', 'L')|s | replace('l', 'L', 1)|n | replace(7, 8)|'x' | center(5) ~ '|'|s | wordcount|"a-b_c d'e" | wordcount|'<b>x</b> y  z' | striptags|'a b/c?&é' | urlencode|{'a': 'b c', 'd/': 1} | urlencode|'%s-%s' | format('a', 1)|'%(x)s' | format(x=2)|'<&>"\\'' | e|'<a>' | escape|'<a>' | safe|('<a>' | safe) + '<b>'|'<b>' + ('<a>' | safe)|('a' | safe) ~ '<b>'|('<a>' | safe) * 2|('<a> %s' | safe) % '<b>'|('<a> %s' | safe) | format('<b>')|('<a>{}' | safe).format('<b>')|('<a>' | safe).replace('a', '<b>')|('<A>' | safe) | lower + '<'|('<a>' | safe | trim) + '<'|('<a>' | safe | title) + '<'|['<a>' | safe]|('<a>' | safe) is escaped|('<a>' | safe) is string|('<a>' | safe) == '<a>'|'a' in ('<a>' | safe)|('<a>' | safe) | length|('<a>' | safe) | tojson|('<a>' | e | e)|('<a>' | e | forceescape)|('<a>' | safe)[1:] + '<'|('<a>,<' | safe).split(',')|(xs | tojson | safe) + '</x>'|{'<a>' | safe: 1}['<a>']|d[('a' | safe)]|('a' | safe).startswith('a')|'<' + ('a' | safe | string)
'a\\nb\\n\\nc' | indent|'a\\nb' | indent(2, true)|'a\\n\\nb' | indent(2, blank=true)|'a\\nb' | indent('> ')|'a\\n' | indent|'' | indent|'foo bar baz qux' | truncate(9)|'foo bar baz qux' | truncate(9, true)|'foo bar baz qux' | truncate(11)|'foo bar baz qux' | truncate(11, false, '...', 0)|s | truncate
d | tojson|rows | tojson|floats | tojson|messages | tojson|messages[1].content | tojson|d | tojson(indent=2)|{'a': {}, 'b': [], 'c': [1, {'x': 2}]} | tojson(indent=4)|d | tojson(separators=(',', ':'))|{'b': 1, 'a': 2} | tojson(sort_keys=true)|'é😀' | tojson(ensure_ascii=true)|(1, 2) | tojson|{1: 2, none: 3, true: 4, 1.5: 5} | tojson|'\\u2028</script>' | tojson|none | tojson|true | tojson|1e16 | tojson|{'a': 1} | tojson(indent=2, separators=(',', ':'))|d.items() | list | tojson|'\\x00\\x1f\\x7f\\b\\f' | tojson|d | tojson(indent='--')|d | tojson(true)
undefined_ | tojson|d.items() | tojson|{'a': undefined_} | tojson|range(2) | tojson|rows | selectattr('k') | tojson
undefined_|undefined_.x|undefined_['x']|undefined_ + 1|undefined_ ~ 'a'|d.zz.y|none_.x|none_.x.y|n.foo|s.foo|undefined_ == undefined_|undefined_ is none|undefined_ or 'x'|undefined_ | default('d')|none_ | default('d')|none_ | default('d', true)|'' | d('x', boolean=true)|undefined_ | d|undefined_ in xs|1 in undefined_|undefined_()|-undefined_|undefined_ < 1|undefined_ | upper|undefined_ | list|undefined_ | first|undefined_ | int|undefined_ | float|undefined_ | items | list|undefined_ | trim|[undefined_]|undefined_ and 1|not undefined_|undefined_ is iterable|undefined_[1:]|'a' + undefined_|'a' in undefined_|undefined_ | abs|undefined_ | sort|undefined_ | max|undefined_ | select | list|undefined_ | unique | list|undefined_ | reverse | list|undefined_ * 2|undefined_ % 2|'%s' % undefined_
yes is boolean|n is boolean|n is integer|yes is integer|f is float|n is number|yes is number|s is string|d is mapping|xs is sequence|s is sequence|d is sequence|d.items() is sequence|undefined_ is sequence|n is sequence|xs is iterable|n is iterable|none_ is none|none_ is not none|n is defined|undefined_ is defined|undefined_ is undefined|n is odd|n is even|n is divisibleby 7|n is divisibleby(2)|s is lower|'ABC' is upper|'ab' is lower|none_ is sameas none|n is sameas 7|xs is sameas xs|'a' is in 'abc'|n is in [7]|n is eq 7|n is ne 7|n is gt 3|n is ge 7|n is lt 3|n is le 7|n is greaterthan 3|n is lessthan 9|n is equalto 7|namespace is callable|s is callable|s.strip is callable|'upper' is filter|'nope' is filter|'odd' is test|s is escaped|yes is true|yes is false|1 is true|n is not defined|n is not divisibleby 2|messages is iterable and messages is not string and messages is not mapping|n is nosuch
[1, [2, [3]]]|[none, true, 1.5, 'x']|{'a': none, 1: true}|{'k': [1, {'z': 'q'}]} | string|("a", 'b"', 'c\\'d', 'e\\'f"')|'\\u00e9\\x41\\101\\U0001F600'|'\\q'|'a\\
b'|"\\""|'\\N'
s.zz()|n()|none_()|xs.append(4)|d.update({})|d.pop('a')|d.__class__|s.__class__.__mro__|''.__class__ is defined|d.clear|xs.sort()|s.encode|namespace.__init__
namespace(a=1).a|namespace({'a': 2}).a|namespace().zz|namespace(_a=1)|cycler('a', 'b').next()|joiner(',')() ~ 'x'|namespace(a=1)['a']|raise_exception('no')|range(100001)|range(1, 2, 0)|range('a')|range(2.0)
1 / 0|1 // 0|1 % 0|1 + 'a'|'a' - 'b'|'a' * 'b'|none + 1|[] + ''|1 < 'a'|none < 1|[1] < 'a'|1 in 2|1 in 'a'|[] in {}|{[]: 1}|d[[]]|d[none]|xs[none]|'a'.split('')|'a'.join([1])|''.index('x')|'%d' % 'a'|'%s' % (1, 2)|'%s %s' % 1|'{}'.format()|'{'.format()|'{:d}'.format('a')|xs | join(1)|xs | nosuch|1 | abs(2)|n | sort|n | list|none_ | list|none_ | join|d | selectattr|none_ | items|n | first|none_ | map('upper') | list|rows | map | list|xs | map('nosuch') | list|rows | sort(attribute='zz')|['a', 1] | sort|[{}, {}] | unique | list|none_ | indent|n | indent|'a' | round|'a' | abs|'%z' % 1|'a' | format(1)
big|big * big|-big|9007199254740993|1e400|n.real|'a' < 1|xs == [3, 1, 2]|xs == (3, 1, 2)|d == d|{'a': 1} == {'a': 1.0}|'a' == none|none == none|[1] == [true]|'1' == 1
messages[0]['role']|messages[-1].tool_calls[0].function.arguments | tojson|messages[-1].tool_calls[0]['function']['arguments'].items() | list|messages[1:] | length|(messages | last).role|(messages | map(attribute='role') | list)[-1]|messages | map(attribute='content') | select | list | length|messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first
"a" if true else raise_exception("x")|(1 if false).x|(xs | sort)[0]|xs | sort | first + 1|-xs | first|(-3) | abs|-3 | abs|2 * 3 | string|'a' ~ 'b' | upper|not xs is none|xs is none == false|1 if xs else 2, 3|'x' is string and 'y' or 'z'|d.a | length > 1|xs[0] + 1 | float
""".strip("\n")

TEMPLATES = r'''
{% for x in xs %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.depth }};{% endfor %}
{% for x in empty %}{{ x }}{% else %}none{% endfor %}
{% for x in xs if x > 1 %}{{ loop.index }}/{{ loop.length }}:{{ x }} {% else %}no{% endfor %}
{% for x in xs if x > 10 %}{{ x }}{% else %}no{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}
{% for k, v in d | dictsort %}{{ k }}={{ v }};{% endfor %}
{% for k in d %}{{ k }};{% endfor %}
{% for c in 'abc' %}{{ c }}.{% endfor %}
{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}
{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}
{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}
{% for x in 1, 2, 3 %}{{ x }}{% endfor %}
{% for x in undefined_ %}{{ x }}{% else %}e{% endfor %}
{% for x in none_ %}{{ x }}{% endfor %}
{% for x in n %}{{ x }}{% endfor %}
{% for x in xs %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% if x == 2 %}{% break %}{% endif %}{% endfor %}
{% for x in xs %}{% for y in xs %}{% if y == 1 %}{% break %}{% endif %}{{ x }}{{ y }} {% endfor %}{% endfor %}
{% set x = 1 %}{% for y in xs %}{% set x = y %}{{ x }}{% endfor %}{{ x }}
{% set x = 1 %}{% for y in xs %}{{ x }}{% set x = x + y %}{{ x }};{% endfor %}{{ x }}
{% set ns = namespace(c=0, l=[]) %}{% for y in xs %}{% set ns.c = ns.c + y %}{% set ns.l = ns.l + [y] %}{% endfor %}{{ ns.c }}{{ ns.l }}
{% set ns.x = 1 %}
{% set ns = 1 %}{% set ns.x = 1 %}
{% set ns = namespace() %}{% set ns._x = 1 %}
{% if n == 7 %}a{% elif n == 8 %}b{% else %}c{% endif %}
{% if empty %}a{% elif none_ %}b{% elif undefined_ %}c{% else %}d{% endif %}
{% if yes %}{% set z = 5 %}{% endif %}{{ z }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}
{% set a, b = xs %}{{ a }}
{% set x %}hello {{ n }}{% endset %}[{{ x }}]
{% set x | upper | trim %}  hello {{ n }}{% endset %}[{{ x }}]
{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a }}
{% with %}{% set q = 1 %}{{ q }}{% endwith %}{{ q }}
{% with n = 1, m = n %}{{ n }}{{ m }}{% endwith %}
{% macro f(a, b='x', c=a) %}[{{ a }}{{ b }}{{ c }}]{% endmacro %}{{ f(1) }}{{ f(1, 2) }}{{ f(1, c=3) }}{{ f(b=2, a=1) }}
{% macro f(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, 3, k=4) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(b=2) }}
{% macro f(a) %}[{{ a }}]{% endmacro %}{{ f() }}
{% macro f(a) %}{{ a.x }}{% endmacro %}{{ f() }}
{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}
{% macro f() %}{{ q }}{% endmacro %}{% set q = 1 %}{{ f() }}{% set q = 2 %}{{ f() }}
{% macro f() %}{% set q = 9 %}{{ q }}{% endmacro %}{{ f() }}{{ q }}
{% for x in xs %}{{ f(x) }}{% endfor %}{% macro f(x) %}({{ x }}){% endmacro %}
{% macro f(x) %}({{ x }}){% endmacro %}{% for x in xs %}{{ f(x) }}{% endfor %}{{ f('a') | upper }}{{ f('a') ~ 'b' }}{{ f.name }}
{% macro outer() %}<{{ caller() }}>{% endmacro %}{% call outer() %}in {{ n }}{% endcall %}
{% macro outer() %}<{{ caller(1, 2) }}>{% endmacro %}{% call(a, b) outer() %}{{ a }}{{ b }}{% endcall %}
{% macro outer() %}<{{ caller() }}>{% endmacro %}{{ outer() }}
{% macro f(m) %}{{ m.content }}{{ loop }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}
{% filter upper %}abc {{ n }}{% endfilter %}
{% filter replace('a', 'b') | upper %}abc{% endfilter %}
{% for m in messages %}{% generation %}{{ m.role }}{% set zz = 1 %}{% endgeneration %}{{ zz }}{% endfor %}
{%- generation -%} x {%- endgeneration -%}
{% raw %}{{ not }} {% this %}{% endraw %}!
{%- raw -%}  {{ x }}  {%- endraw -%}  !
{# comment #}a{#- b -#}  c  {# d #}
  {% if yes %}
    a
  {% endif %}
  b
  {%+ if yes %}
a{% endif +%}
b
a  {{- n -}}  b {{ n }} c
 {%- if yes -%} x {%- endif -%} y
{% if yes %}

x{% endif %}
	{% set x = 1 %}	
{{ x }}
{{ '{{' }}{{ '%}' }}{{ "}}" }}
{% for a in [[1, [2, [3]]], [4]] recursive %}{% if a is iterable %}<{{ loop(a) }}>{% else %}{{ a }}{{ loop.depth }}{% endif %}{% endfor %}
{% for x in xs %}{{ loop.cycle('a', 'b') }}{{ loop.changed(x > 1) }}{% endfor %}
{% for x in xs %}{{ loop(xs) }}{% endfor %}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.reset() }}{{ c.current }}
{% set j = joiner('|') %}{% for x in xs %}{{ j() }}{{ x }}{% endfor %}
{% block a %}x{{ n }}{% endblock %}
{% set q = 3 %}{% block a %}{{ q }}{% set q = 4 %}{% endblock a %}{{ q }}
{% print n, s %}
{% autoescape false %}<{{ s }}>{% endautoescape %}
{% include 'x' %}
{% import 'x' as y %}
{% extends 'x' %}
{% do 1 %}
{% break %}
{{ 1 +}}
{% if %}{% endif %}
{% for x xs %}{% endfor %}
{% if yes %}
{{ (1, 2 }}
{{ 'a }}
{# x
{% raw %}x
{% endif %}
{% set x = %}
{{ a b }}
{{ }}
{{ $ }}
{{ x.1.a }}{{ [[1, 2]].0.1 }}
{{ 1.5.real }}
{% if 'x' in messages[0].content or 'Be' in messages[0]['content'] %}y{% endif %}
{% set loop_messages = messages[1:] %}{% for message in loop_messages %}{{ message['role'] }}{% if loop.last and add_generation_prompt %}!{% endif %}{% endfor %}
{% set m = messages %}{% if m[0]['role'] == 'system' %}{% set sys = m[0]['content'] %}{% set m = m[1:] %}{% else %}{% set sys = '' %}{% endif %}{{ sys }}{{ m | length }}
{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls is not none %}{% for t in m.tool_calls %}{% set t = t.function %}{{ t.name }}({% for k, v in t.arguments.items() %}{{ k }}={{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}){% endfor %}{% endif %}{% endfor %}
{% if tools is not none %}T{% endif %}{% if tools %}U{% endif %}{% if not tools is defined %}V{% endif %}{% if tools is none %}W{% endif %}
{% set x = 5 %}{% macro f() %}{{ x }}{% for i in [1] %}{{ x }}{{ i }}{% endfor %}{% endmacro %}{% for x in [7] %}{{ f() }}{% endfor %}
{% for i in range(3) %}{% set v = namespace(a=i) %}{{ v.a }}{% endfor %}
{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
{% for m in messages %}{% set content = m.content if m.content is string else '' %}{{ content | trim | length }}{% endfor %}
{% set d2 = dict(d, **{'q': 1}) %}{{ d2 }}
{% macro f(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ f(*[1, 2]) }}{{ f(**{'a': 3, 'b': 4}) }}
{% for x in xs | sort %}{{ x }}{% endfor %}{% for x in xs | reverse %}{{ x }}{% endfor %}{% for g in rows[:3] | groupby('k') %}{{ g[0] }}{{ g[1] | length }}{% endfor %}
{% set gen = rows | selectattr('k', 'eq', 'x') %}{{ gen | list | length }}{{ gen | list | length }}{% if gen %}t{% endif %}
{% set gen = empty | select %}{% if gen %}t{% endif %}{{ gen | length }}
{{ (rows | selectattr('k')) | last }}
{{ (xs | reverse) | first }}{{ (xs | map('string')) | join }}
{% for x in xs %}{% set loop = 1 %}{{ loop }}{% endfor %}
{% set true = 1 %}
{{ strftime_now('') }}{{ strftime_now('%%') }}{{ strftime_now('x') }}
{% if (messages | length) % 2 == 1 %}odd{% endif %}{{ (n - 1) // 2 * 2 }}
{{ "%s" | format("a") }}{{ "a\tb\\n" }}
{% set x = "a" %}{% set x = x + "b" %}{% set x = x ~ 1 %}{{ x }}
{% for line in "a\nb\n".split("\n") %}[{{ line }}]{% endfor %}
'''.strip("\n").split("\n")
# Templates of several lines.
MORE = [
    "a\n\n", "a\r\nb\rc\n", "\n\na", "{% if yes %}\n  {% if yes %}\nx{% endif %}\n{% endif %}\n{{ n }}\n",
    "{%- for m in messages %}\n    {{- m.role }}\n    {%- if not loop.last %}, {% endif %}\n{%- endfor %}\n",
    "  {# c #}\n x\n{#- y #}\nz", "{% set x %}\n  a\n{% endset %}\n[{{ x }}]", "{% raw %}\n a {{ b }}\n{% endraw %}\n c",
    "{% for x in xs -%}\n  {{ x }}\n{%- endfor +%}\n end", "a{% if yes +%}\nb{% endif %}\nc", "  {%+ if yes %}a{% endif %}",
    "\t {{ n }}\n\t {% if yes %}\n\t b\n\t {% endif %}", "x {% if yes %} y {% endif %} z", "{{ n }}\n\n{{ n }}\n",
    "{{ 'a'\n 'b' }}", "{{\n n\n}}", "{% if\n yes\n%}a{% endif %}", "{#\n#}\n{#\n-#}\n\nb", "{{ n -}}\n\n x", "a\n {{- n }}",
]


def case(name, template):
    out = {"name": name, "template": template, "variables": VARIABLES}
    try:
        out["expected"] = _compile_jinja_template(template).render(**VARIABLES)
        if " at 0x" in out["expected"] or "<generator" in out["expected"]:
            return None  # an address
    except Exception as error:
        out["expected"], out["error"] = None, f"{type(error).__name__}: {error}"[:200]
    return out


def split(line):
    """Expressions are separated by bars without spaces around them, filters have spaces."""
    parts, current, quote, depth = [], "", None, 0
    for i, c in enumerate(line):
        if quote:
            quote = None if c == quote and line[i - 1] != "\\" else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        if c == "|" and not quote and not depth and not (line[i - 1] == " " and line[i + 1 : i + 2] == " "):
            parts.append(current)
            current = ""
        else:
            current += c
    return parts + [current]


def main():
    cases = []
    for line in EXPRESSIONS.replace("\\\n", "\\\\n").split("\n"):
        cases += [case("expression", "{{ " + part + " }}") for part in split(line.replace("\\\\", "\\"))]
    cases += [case("template", template) for template in TEMPLATES + MORE]
    cases = [c for c in cases if c]
    shared = {"variables": VARIABLES, "cases": [{k: v for k, v in c.items() if k not in ("variables", "name")} for c in cases]}
    json.dump(shared, open(os.path.join(HERE, "python.json"), "w"), ensure_ascii=False, indent=1)
    print(len(cases), "cases;", sum(c["expected"] is None for c in cases), "refused")


main()
