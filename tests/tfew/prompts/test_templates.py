"""Prompts from fields, and what the sandbox refuses."""

import pytest

from ia3.errors import IA3Error
from ia3.tfew.prompts.templates import Template

EXAMPLE = {"text": "Where is my parcel?", "title": "Delivery"}
CHOICES = ["refund", "delivery"]


def render(source, example=EXAMPLE, choices=CHOICES):
    return Template(source).render(example, choices)


def test_fields_stand_where_they_are_named():
    assert render("{{ title }}: {{ text }}\nQueue:") == "Delivery: Where is my parcel?\nQueue:"


def test_field_with_a_name_that_jinja_cannot_write():
    assert render('{{ fields["Tweet text"] }} =>', {"Tweet text": "so late!"}) == "so late! =>"


def test_answer_choices_are_at_hand():
    source = "{{ text }}\nOne of: {{ answer_choices | join(', ') }}."
    assert render(source) == "Where is my parcel?\nOne of: refund, delivery."


def test_loops_and_conditions():
    source = "{% for c in answer_choices %}{{ loop.index }}. {{ c }}\n{% endfor %}{{ text }}"
    assert render(source) == "1. refund\n2. delivery\nWhere is my parcel?"
    source = "{% if title %}{{ title | upper }}{% else %}none{% endif %}"
    assert render(source) == "DELIVERY"


def test_the_prompt_ends_where_the_answer_begins():
    assert render("{{ text }}\nQueue: \n\n") == "Where is my parcel?\nQueue:"


def test_values_are_not_templates_and_not_escaped():
    text = "{{ title }} <b>&amp;</b> {% raw %}"
    assert render("{{ text }}", {"text": text, "title": "no"}) == text


def test_values_of_other_types():
    assert render("{{ stars + 1 }} {{ open }}", {"stars": 4, "open": True}) == "5 True"


def test_missing_field_is_named_with_its_near_miss():
    with pytest.raises(IA3Error) as caught:
        render("{{ txt }}\nQueue:")
    message = str(caught.value)
    assert "'txt'" in message
    assert "did you mean 'text'?" in message
    assert "'title'" in message  # what the example does have


def test_missing_field_without_a_near_miss():
    with pytest.raises(IA3Error, match="'zebra'") as caught:
        render("{{ zebra }}")
    assert "did you mean" not in str(caught.value)


def test_missing_field_in_fields_is_named():
    with pytest.raises(IA3Error, match=r"Tweet txt.*Tweet text"):
        render('{{ fields["Tweet txt"] }}', {"Tweet text": "x"})


def test_missing_attribute_of_a_field():
    with pytest.raises(IA3Error, match="nosuch"):
        render("{{ text.nosuch }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ text",
        "{% for c in answer_choices %}{{ c }}",
        "{{ text | nosuchfilter }}",
        "{% nosuchtag %}",
        "{{ 1 + }}",
        "}}{{ %}",
    ],
)
def test_syntax_errors_say_where(source):
    with pytest.raises(IA3Error, match=r"line 1"):
        Template(source)


def test_syntax_error_on_a_later_line():
    with pytest.raises(IA3Error, match=r"line 3"):
        Template("{{ text }}\nand\n{{ title")


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


@pytest.mark.parametrize(
    "source",
    [
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
def test_what_would_take_the_machines_memory_is_refused(source: str) -> None:
    with pytest.raises(IA3Error):
        Template(source).render({"text": "x"}, ["a", "b"])
