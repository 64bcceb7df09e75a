"""Prompts from fields, and what the sandbox refuses."""

import pytest

from ia3.errors import IA3Error
from ia3.tfew.prompts.templates import Template, TemplateError

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
        ('{{ fields["Txt"] }}', r"Txt.*'text'"),
        ("{{ text.nosuch }}", "nosuch"),
    ],
)
def test_a_missing_field_is_named(source, message):
    with pytest.raises(IA3Error, match=message):
        render(source)


@pytest.mark.parametrize(
    ("source", "line"),
    [("{{ text", 1), ("{{ text | nosuchfilter }}", 1), ("{{ text }}\nand\n{{ title", 3)],
)
def test_syntax_errors_say_where(source, line):
    with pytest.raises(IA3Error, match=f"line {line}"):
        Template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ text.__class__.__mro__ }}",
        "{{ text|attr('__class__') }}",
        "{{ lipsum.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ text.format.__func__ }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ fields.update({'text': 'x'}) }}",
        "{{ answer_choices.append('x') }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% include 'secret' %}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        # What makes too much, though not for plain Jinja.
        "{{ 'a' * 10**8 }}",
        "{{ 9 ** 99999 }}",
        "{{ '%0100000000d' % 1 }}",
        "{{ 'a'.ljust(100000000) }}",
        "{{ 'a'|center(100000000) }}",
        "{{ lipsum(10) }}",
        "{% set n = namespace(x='aaaa') %}"
        "{% for i in range(25) %}{% set n.x = n.x + n.x %}{% endfor %}",
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


@pytest.mark.parametrize(
    ("source", "reads", "does_not"),
    [
        ("{{ title }}: {% if text %}{{ text }}{% endif %}", ["text", "title"], ["body"]),
        ("{{ fields['body'] }}{{ ID }}", ["body", "ID"], ["text"]),
        ("{% for text in answer_choices %}{{ text }}{% endfor %}", [], ["text"]),
        ("{% for name in fields %}{{ name }}{% endfor %}", ["text"], []),
        ("{{ fields['a'] }}{{ fields[key] }}", ["text"], []),
    ],
)
def test_reads_says_what_a_prompt_depends_on(source, reads, does_not):
    template = Template(source)
    assert all(template.reads(name) for name in reads)
    assert not any(template.reads(name) for name in does_not)


def test_half_a_surrogate_pair_of_an_escape_is_refused():
    # No tokenizer takes it.
    template = Template(r"{{ '\ud800' }} {{ text }}")
    for work in (template.render, template.parts):
        with pytest.raises(TemplateError, match="renders half a surrogate pair"):
            work(EXAMPLE, CHOICES)


def test_no_text_ends_a_prompt():
    for bars in ("|||", "\0|||\0"):
        example = {"text": f"a{bars}b"}
        assert Template("{{ text }} c").render(example, CHOICES) == f"a{bars}b c"
        assert Template("{{ text }} ||| c").parts(example, CHOICES) == [f"a{bars}b", "c"]
