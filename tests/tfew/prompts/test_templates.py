"""Prompts from fields, and what the sandbox refuses."""

import pytest

from ia3.errors import IA3Error
from ia3.tfew.prompts.templates import Template

EXAMPLE = {"text": "Where is my parcel?", "title": "Delivery"}
CHOICES = ["refund", "delivery"]


def render(source, example=EXAMPLE, choices=CHOICES):
    return Template(source).render(example, choices)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ title }}: {{ text }}\nQueue: \n\n", "Delivery: Where is my parcel?\nQueue:"),
        ('{{ fields["Tweet text"] }} =>', "so late! =>"),
        ("One of: {{ answer_choices | join(', ') }}.", "One of: refund, delivery."),
        ("{% for c in answer_choices %}{{ loop.index }}{{ c }} {% endfor %}", "1refund 2delivery"),
        ("{% if title %}{{ title | upper }}{% else %}none{% endif %}", "DELIVERY"),
        # A value is not a template, and is not escaped.
        ("{{ markup }}", "{{ title }} <b>&amp;</b> {% raw %}"),
        ("{{ stars + 1 }} {{ open }}", "5 True"),
    ],
)
def test_what_a_template_renders(source, expected):
    more = {"Tweet text": "so late!", "markup": "{{ title }} <b>&amp;</b> {% raw %}"}
    assert render(source, {**EXAMPLE, **more, "stars": 4, "open": True}) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        # With what the example does have.
        ("{{ txt }}\nQueue:", r"'txt'.*'title'.*; did you mean 'text'\?"),
        ("{{ zebra }}", r"'zebra' is undefined.*not 'zebra'$"),
        ('{{ fields["Txt"] }}', r"Txt.*'text'"),
        ("{{ text.nosuch }}", "nosuch"),
    ],
)
def test_a_missing_field_is_named(source, message):
    with pytest.raises(IA3Error, match=message):
        render(source)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("{{ text", 1),
        ("{% for c in answer_choices %}{{ c }}", 1),
        ("{{ text | nosuchfilter }}", 1),
        ("{% nosuchtag %}", 1),
        ("{{ 1 + }}", 1),
        ("}}{{ %}", 1),
        ("{{ text }}\nand\n{{ title", 3),
    ],
)
def test_syntax_errors_say_where(source, line):
    with pytest.raises(IA3Error, match=f"line {line}"):
        Template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ text.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ text|attr('__class__') }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ lipsum.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ lipsum['__globals__'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__.os }}",
        "{{ namespace.__init__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ text.format.__func__ }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ '{0.__class__.__mro__}'.format_map({'0': text}) }}",
        "{{ fields.update({'text': 'x'}) }}",
        "{{ answer_choices.append('x') }}",
        "{{ answer_choices.clear() }}",
        "{% set x = answer_choices.pop() %}{{ x }}",
        "{{ range(1000000000) | list }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% include 'secret' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends 'base' %}",
        "{{ 1 / 0 }}",
        "{{ text + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        # What would take the machine's memory.
        "{{ 'a' * 10**9 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 9 ** 99999999 }}",
        "{{ '%01000000000d' % 1 }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a'|center(1000000000) }}",
        "{{ lipsum(1000000) }}",
        "{% set n = namespace(x='aaaa') %}"
        "{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    ],
)
def test_the_sandbox_refuses(source):
    with pytest.raises(IA3Error):
        render(source)


def test_a_template_cannot_change_the_example_or_the_choices():
    example, choices = {"text": "a", "tags": ["b"]}, ["c"]
    for source in ("{{ fields.clear() }}", "{{ tags.append(1) }}", "{{ answer_choices.sort() }}"):
        with pytest.raises(IA3Error):
            render(source, example, choices)
    assert example == {"text": "a", "tags": ["b"]}
    assert choices == ["c"]


def test_reads_says_what_a_prompt_depends_on():
    template = Template("{{ title }}: {% if text %}{{ text }}{% endif %}")
    assert template.reads("text")
    assert template.reads("title")
    assert not template.reads("body")
    assert Template("{{ fields['body'] }}").reads("body")
    assert not Template("{% for text in answer_choices %}{{ text }}{% endfor %}").reads("text")
