"""What exceeds a rendering's budget is refused, what is honest renders as in plain Jinja."""

import datetime
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from jinja2 import Environment, StrictUndefined
from jinja2.filters import FILTERS
from jinja2.tests import TESTS
from support.random_templates import random_template

from ia3.errors import IA3Error
from ia3.tfew.prompts.sandbox import BUDGET
from ia3.tfew.prompts.templates import Template, TemplateError, UnknownLabelError

EXAMPLE = {
    "text": "Where is my <parcel>? See www.example.org\n\n- it was sent on 2020-01-02\tby post",
    "title": "Delivery",
    "n": 3,
    "stars": 2.5,
    "tags": ["late", "Parcel", "late"],
    "table": {"b": 1, "a": [2, 3]},
    "people": [{"name": "Ann", "age": 31}, {"name": "bob", "age": 27}, {"name": "Cy", "age": 31}],
}
CHOICES = ["refund", "delivery"]


def render(source, example=EXAMPLE, choices=CHOICES):
    return Template(source, "greedy").render(example, choices)


def shared(start):
    """Twenty times a value that holds the one before twice: small in memory, large as text."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(20) %}}"
        "{% set both = namespace(a=0, b=0) %}{% set both.a = ns.x %}{% set both.b = ns.x %}"
        "{% set ns.x = both %}{% endfor %}"
    )


# All of it is some times more than the budget, and still small enough for plain Jinja.
TOO_LARGE = [
    # Padding, by whatever name.
    "{{ title.center(10**7) }}",
    "{{ title.ljust(10**7) }}{{ title.rjust(10**7, '-') }}",
    "{{ title.zfill(10**7) }}",
    "{{ '\\t'.expandtabs(10**7) }}",
    "{{ title|center(10**7) }}",
    "{{ text|indent(10**7) }}",
    "{{ tags|map('center', 10**7)|join }}",
    "{{ '\\t'|attr('expandtabs')(10**7) }}",
    "{{ tags|batch(10**7, 'x')|list }}",
    "{{ tags|slice(10**6)|list }}",
    "{{ table|tojson(indent=10**7) }}",
    "{{ text|wordwrap(1, wrapstring='x' * 1000000) }}",
    "{{ n.to_bytes(10**7, 'big') }}",
    # Widths within text.
    "{{ '{:100000000}'.format(n) }}",
    "{{ '{:>{}}'.format(n, 10**8) }}",
    "{{ '{n:.{w}f}'.format_map({'n': stars, 'w': 10**8}) }}",
    "{{ '{0[0]:100000000}'.format(tags) }}",
    "{{ ('{0}' * 30000).format(text * 100) }}",
    "{{ ('{:>999}' * 30000).format(*range(30000)) }}",
    "{{ '%100000000d' % n }}",
    "{{ '%.100000000f' % stars }}",
    "{{ '%-*d' % (10**8, n) }}",
    "{{ '%(a(b))100000000d' % {'a(b)': n} }}",
    "{{ ('%(text)s' * 300000) % fields }}",
    "{{ '%100000000d'|format(n) }}",
    # Products.
    "{{ 'a' * 10**8 }}",
    "{{ [1] * 10**7 }}",
    "{{ ([text] * 1000)|join(text * 100) }}",
    "{{ (text * 1000).join(text * 100) }}",
    "{{ (title * 10000).replace('e', text * 100) }}",
    "{{ (title * 10000)|replace('e', text * 100) }}",
    "{{ (title * 1000).translate({101: text * 1000}) }}",
    "{{ 1.5|round(10**5, 'ceil') }}",
    "{{ 9 ** 99999 }}{{ 2 ** 2 ** 20 }}",
    "{% set ns = namespace(x=7) %}{% for i in range(16) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}"
    "{% for i in range(25) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}"
    "{% for i in range(25) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}"
    "{% for i in range(25) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}",
    "{% set ns = namespace(x=1) %}"
    "{% for i in range(25) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}",
    "{% macro m(x) %}{{ m(x ~ x) if x|length < 10**8 }}{% endmacro %}{{ m('aa') }}",
    # What hides how large it is.
    *(
        shared(1) + use
        for use in (
            *("{{ ns.x }}", "{{ ns.x ~ '' }}", "{{ '%s' % ns.x }}", "{{ '{}'.format(ns.x) }}"),
            *("{{ ns.x|string }}", "{{ tags|map(ns.x)|list }}", "{{ [ns.x] }}"),
            *("{{ tags.index(ns.x) }}", "{{ tags|join(ns.x) }}", "{{ tags|sum(attribute=ns.x) }}"),
        )
    ),
    "{% set ns = namespace() %}{% set ns.x = ns %}{{ {}[ns] }}",
]  # fmt: skip

TOO_LONG = [
    "{% for i in range(1500) %}{% for i in range(1500) %}{% endfor %}{% endfor %}",
    "{% for i in range(1500) %}{% for i in range(1500) if i is odd %}{% endfor %}{% endfor %}",
    "{% for i in range(1500) %}{% for i in range(1500) %}{{ loop.index }}{% endfor %}{% endfor %}",
    f"{{% for i in range(10000) %}}{'words ' * 1000}{{% endfor %}}",
    f"{{% for i in range(5000) %}}{'{% set a = n %}' * 1000}{{% endfor %}}",
    "{% for i in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 20 }}{% endfor %}",
    "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(18) }}",
    "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    "{% for i in range(1000) %}{% for i in range(100) %}{% call m() %}x{% endcall %}"
    "{% endfor %}{% endfor %}",
    "{% block b %}{% for i in range(1500) %}{{ self.c() }}{% endfor %}{% endblock %}"
    "{% block c %}{% for i in range(1500) %}{% endfor %}{% endblock %}",
    f"{{% for i in range(3000) %}}{{% block b scoped %}}{{% endblock %}}{{% endfor %}}"
    f"{''.join(f'{{% set a{i} = 1 %}}' for i in range(1000))}",
    "{% for i in range(500) %}{{ (text * 1000)|wordcount }}{% endfor %}",
    "{% for i in range(500) %}{{ text * 1000 == text * 1000 }}{% endfor %}",
    "{% set x = ' ' ~ text * 1000 %}{% for i in range(1000) %}{% set y = x.strip() %}{% endfor %}",
    "{% set x = ' ' ~ text * 1000 %}{% for i in range(1000) %}{% set y = x|trim %}{% endfor %}",
    "{% set x = range(3000)|list %}{% for i in x %}{{ -1 in x }}{% endfor %}",
    "{% set x = range(3000)|list %}{% for i in x %}{{ x.index(2999) }}{% endfor %}",
    "{% set x = range(3000)|list %}{% for i in x %}{% set y = x[1:] %}{% endfor %}",
    "{{ ([[1]] * 20000)|sum(start=[])|length }}",
    "{{ tags|sort(attribute=',' * 900000) }}",
    # What could take the square of its input, here on input that does not.
    "{{ range(0, 100000 * 2**61, 2**61 + 1)|unique|list|length }}",
    "{{ ('2305843009213693953 ' * 30000).split()|map('int')|unique|list|length }}",
    "{{ ('word' * 50000)|urlize }}",
    "{{ ('word' * 50000)|wordwrap }}",
    "{{ ('1 < 2 ' * 100000)|striptags }}",
    "{{ (title * 100000).rfind('x' * 50000) }}",
    "{{ ('a.' * 10000).encode('idna') }}",
]  # fmt: skip


@pytest.mark.parametrize("source", [*TOO_LARGE, *TOO_LONG])
def test_what_takes_more_than_the_budget_is_refused_with_the_templates_name(source):
    refused = rf"^template 'greedy' is refused: .*({BUDGET:,} steps|levels deep)"
    with pytest.raises(TemplateError, match=refused):
        render(source)


@pytest.mark.parametrize(
    "source", ["{{ '%9d' is odd }}", "{{ '%9d' is divisibleby(2) }}", "{{ 'x'|round(9, 'ceil') }}"]
)
def test_text_is_no_number(source):
    with pytest.raises(TemplateError, match="str is no number"):
        render(source)


def test_at_compile_time_nothing_is_computed():
    for source in (
        "{{ 'a'|center(10**8) }}",
        "{% autoescape 'a'.center(10**8) %}{% endautoescape %}",
    ):
        template = Template(f"{{% if n > 9 %}}{source}{{% endif %}}")
        assert template.render(EXAMPLE, CHOICES) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{ text }}",
        "{{ text|trim|lower|replace('parcel', 'letter')|title }} {{ text[:50000] }}",
        "{{ text|indent(4) }}",
        "{{ text|wordwrap(60) }}",
        "{{ text|urlize }}{{ text|striptags }}{{ text|tojson }}",
        "{{ '{}: {}'.format(title, text) }}{{ '%s: %s' % (title, text) }}",
        "{% for x in text.split() %}{% if x|length > 4 %}{{ x|upper }} {% endif %}{% endfor %}",
        "{% for x in answer_choices %}{% if x in text %}{{ x }}, {% endif %}{% endfor %}",
        "{% for x in answer_choices %}{{ loop.index }}. {{ x|capitalize }}\n{% endfor %}",
        "{% set ns = namespace(found=[]) %}{% for choice in answer_choices %}"
        "{% set ns.found = ns.found + [choice] %}{% endfor %}{{ ns.found|join(', ') }}",
        "{% for a in answer_choices %}{% for b in answer_choices %}{{ a if a == b }}{% endfor %}"
        "{% endfor %}",
    ],
)  # fmt: skip
def test_documents_of_100_kb_and_hundreds_of_choices_render_as_in_plain_jinja(source):
    example = {**EXAMPLE, "text": ("The parcel is late, and I want a refund. " * 2500)[:100_000]}
    choices = [f"choice {i}" for i in range(300)]
    plain = Environment(undefined=StrictUndefined).from_string(source)
    expected = plain.render(example, fields=example, answer_choices=choices)
    assert render(source, example, choices) == expected.rstrip()


# Every filter and test that Jinja has, as one uses it.
FILTERED = {
    "abs": "(-3)|abs",
    "attr": "n|attr('real')",
    "batch": "tags|batch(2, '-')|list",
    "center": "title|center(20)",
    "default": "title|default('-') ~ missing|default('-', true)",
    "dictsort": "table|dictsort(by='key')",
    "filesizeformat": "123456|filesizeformat",
    "format": "'%-9s|%5.1f'|format(title, stars) ~ title|format",
    "groupby": "people|groupby('age')",
    "indent": "text|indent(2, first=true)",
    "int": "'7'|int + '1f'|int(base=16)",
    "items": "table|items|list",
    "join": "people|join(', ', attribute='name')",
    "map": "people|map(attribute='name')|map('upper')|list",
    "max": "tags|max ~ people|max(attribute='age')",
    "min": "tags|min",
    "random": "[7]|random",
    "reject": "[0, 1, 2]|reject('odd')|list",
    "rejectattr": "people|rejectattr('age', 'gt', 30)|list",
    "replace": "text|replace('parcel', 'letter', 1)",
    "reverse": "tags|reverse|list ~ title|reverse",
    "round": "2.567|round(2) ~ 2.5|round(0, 'floor') ~ 1234567|round",
    "select": "[0, 1, 2]|select|list",
    "selectattr": "people|selectattr('age', 'eq', 31)|map(attribute='name')|list",
    "slice": "tags|slice(2)|list",
    "sort": "people|sort(attribute='age,name')|map(attribute='name')|list",
    "sum": "people|sum(attribute='age') ~ [[1], [2]]|sum(start=[])",
    "tojson": "table|tojson ~ table|tojson(indent=2)",
    "trim": "text|trim('tW')",
    "truncate": "text|truncate(12)",
    "unique": "tags|unique|list",
    "urlize": "text|urlize(12, rel='x')",
    "wordwrap": "text|wordwrap(9)",
    "xmlattr": "{'class': title}|xmlattr",
    **dict.fromkeys(("count", "length"), "tags|length"),
    **dict.fromkeys(("first", "last", "list"), "tags|first ~ tags|last ~ title|list"),
}
TESTED = {
    "divisibleby": "n is divisibleby(3)",
    "filter": "'upper' is filter",
    "in": "'late' is in(tags)",
    "sameas": "n is sameas(n)",
    "test": "'odd' is test",
    **{name: f"n is {name}(2)" for name in ("eq", "equalto", "ne", "gt", "greaterthan", "ge")},
    **{name: f"n is {name}(2)" for name in ("lt", "lessthan", "le")},
}  # fmt: skip
METHODS = [
    *("title.center(20, '-')", "title.ljust(12) ~ '|'", "title.zfill(12)", "'a\\tb'.expandtabs(4)"),
    *("text.split()", "text.rsplit(' ', 1)", "text.partition('is')", "text.splitlines()"),
    *("text.find('is')", "text.rfind('is')", "text.count('e')", "text.startswith(('Wh', 'x'))"),
    *("' - '.join(tags)", "title.translate({68: 'd'})", "title.encode('utf-8').decode()"),
    *("'{} {title!r:>12}'.format(tags, title=title)", "'{a:.1f}'.format_map({'a': stars})"),
    *("'%s has %05.2f and %d%%' % (title, stars, n)", "'%(title)s' % {'title': title}"),
    *("tags.index('late')", "tags.count('late')", "table.get('b', 0)", "table.items()"),
    *("table.keys()|list", "table.values()", "(5).bit_length()", "2 ** 10", "7 // 2 - 3 / 4 % 2"),
    *("1 < n < 4", "1 < n < 2 < 1 / 0", "n not in [1, 2]", "not n", "text[3:9]", "tags[::-1]"),
    *("[text, title][1]", "{'a': [1, (2, none)]}", "tags + [1]", "tags * 2", "(1, 2) + (3,)"),
    *("range(3)|list", "zip(tags, range(3))|list", "dict(a=1)", "cycler('a', 'b').next()"),
    *("joiner(', ')()", "namespace(a=1).a", "title ~ n ~ tags ~ none", "'x' if n else 'y'"),
]  # fmt: skip


@pytest.mark.parametrize(
    "expression",
    [
        *(FILTERED.get(name, f"title|{name}") for name in FILTERS),
        *(TESTED.get(name, f"n is {name}") for name in TESTS if name.isalpha()),
        *METHODS,
    ],
)
def test_filters_tests_methods_and_operators_render_as_in_plain_jinja(expression):
    plain = Environment(undefined=StrictUndefined)
    plain.globals["zip"] = zip
    source = f"[{{{{ {expression} }}}}]"
    try:
        expected = plain.from_string(source).render(EXAMPLE)
    except Exception as error:
        with pytest.raises(TemplateError, match=type(error).__name__):
            render(source)
    else:
        assert render(source) == expected


STATEMENTS = [
    "{% macro m(x, y=2) %}{{ x }}-{{ y }}{{ varargs }}{{ caller() if caller is defined }}"
    "{% endmacro %}{{ m(1, 2, 3) }}{% call m(n) %}called{% endcall %}",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{{ loop.depth }}"
    "{% endfor %}",
    "{% for p in people if p.age > 30 %}{{ loop.index }}/{{ loop.length }} {{ p.name }}"
    "{{ ', ' if not loop.last }}{% else %}none{% endfor %}",
    "{% for k, v in table.items() %}{{ loop.cycle('a', 'b') }}{{ k }}{{ loop.changed(v) }}"
    "{% endfor %}",
    "{% set x %}{{ title }}!{% endset %}{{ x }}{% filter upper %}{{ x }}{% endfilter %}",
    "{% with a = 1, b = n %}{{ a + b }}{% endwith %}"
    "{% block b scoped %}{{ n }}{% endblock %}{{ self.b() }}",
    "{% autoescape true %}{{ text }}{{ '<' ~ title }}{{ '<b>'|safe }}{% endautoescape %}{{ '<' }}",
    "{% if n > 2 and title %}yes{% elif n %}no{% endif %}{% raw %}{{ x }}{% endraw %}",
]  # fmt: skip


@pytest.mark.parametrize("source", STATEMENTS)
def test_statements_render_as_in_plain_jinja(source):
    plain = Environment(undefined=StrictUndefined).from_string(source)
    assert render(source) == plain.render(EXAMPLE)


def test_fields_of_any_type_render():
    example = {
        "date": datetime.datetime(2020, 1, 2, 3, 4),
        "price": Decimal("1.50"),
        "part": Fraction(1, 3),
        "label": np.int64(1),
        "score": np.float32(0.5),
        "pixels": np.arange(6).reshape(2, 3),
        "id": 10**30,
        "raw": b"bytes",
        "rows": {"a", "b"},
        "made": (i for i in range(3)),
    }
    source = (
        "{{ date }} {{ date.strftime('%d.%m.%Y') }} {{ '{:%Y}'.format(date) }} {{ date.year }}|"
        "{{ price }} {{ price * 2 }}|{{ part }}|{{ answer_choices[label] }} {{ label + 1 }}|"
        "{{ score }} {{ score.item() }}|{{ pixels.tolist() }} {{ pixels[1] }}|"
        "{{ id }} {{ id + 1 }}|"
        "{{ raw }}|{{ rows|sort|join }}|{{ made|list }}"
    )
    assert render(source, example).split("|") == [
        "2020-01-02 03:04:00 02.01.2020 2020 2020",
        "1.50 3.00",
        "1/3",
        "delivery 2",
        "0.5 0.5",
        "[[0, 1, 2], [3, 4, 5]] [3 4 5]",
        f"{10**30} {10**30 + 1}",
        "b'bytes'",
        "ab",
        "[0, 1, 2]",
    ]


class Account:
    """A value of the user's own."""

    def __init__(self):
        self.owner, self.calls = "Ann", 0

    def close(self):
        self.calls += 1

    def __str__(self):
        return "account"


def test_methods_of_types_that_are_not_known_are_not_called():
    account = Account()
    assert render("{{ account }} of {{ account.owner }}", {"account": account}) == "account of Ann"
    for source in (
        "{{ account.close() }}",
        "{{ account|attr('close')() }}",
        "{% set f = account.close %}{{ f() }}",
        "{{ close() }}",
    ):
        with pytest.raises(TemplateError, match=r"close takes is not known: give its result"):
            render(source, {"account": account, "close": account.close})
    assert account.calls == 0


def test_large_arrays_and_dates_that_pad_are_refused():
    example = {"pixels": np.zeros(10_000_000), "date": datetime.date(2020, 1, 2)}
    for source in (
        "{{ pixels }}",
        "{{ pixels.tolist() }}",
        "{{ date.strftime('%999Y' * 30000) }}",
    ):
        with pytest.raises(TemplateError, match="is refused: a value could become larger"):
            render(source, example)


def test_a_filter_does_not_change_the_example():
    assert render("{{ tags|indent }}") == str(EXAMPLE["tags"])
    assert EXAMPLE["tags"] == ["late", "Parcel", "late"]


def test_each_rendering_has_its_own_budget_in_every_thread():
    # Each takes more than half of a budget.
    source = f"{{% for i in range({BUDGET // 2 // 10_000}) %}}{'x' * 10_000}{{% endfor %}}"
    template = Template(source)
    with ThreadPoolExecutor(4) as pool:
        sizes = set(pool.map(lambda _: len(template.render(EXAMPLE, CHOICES)), range(8)))
    assert sizes == {BUDGET // 2 // 10_000 * 10_000}


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
        "{{ " + "[" * 150 + "]" * 150 + " }}",
        "{% if n %}" * 200 + "{% endif %}" * 200,
        "{% for i in tags %}" * 30 + "{% endfor %}" * 30,
        "{{ n" + " + n" * 5_000 + " }}",
        "{{ " + "not " * 5_000 + "n }}",
        "{{ m(a=1, a=2) }}",
        "{{ " + "9" * 5_000 + " }}",
        "{{ n }}" * 10_000,
        "{% macro m() %}{% endmacro %}" * 5_000,
        "a" * 400_000,
        "{{ text",
        "{{ {{'a': 1}: 1} }}",
    ],
)
def test_a_source_that_cannot_be_compiled_is_an_error_that_names_the_template(source):
    with pytest.raises(TemplateError, match=r"^template 'greedy'") as caught:
        Template(source, "greedy").render(EXAMPLE, CHOICES)
    assert len(str(caught.value)) < 2_000


def test_a_long_text_around_a_few_fields_is_a_template():
    text = "Demonstration { % # }\n" * 10_000
    assert render(text + "{{ title }}") == text + "Delivery"


def test_an_unknown_label_is_a_kind_of_template_error_and_that_of_ia3_error():
    assert issubclass(UnknownLabelError, TemplateError)
    assert issubclass(TemplateError, IA3Error)
    with pytest.raises(UnknownLabelError, match=r"^template 'greedy': the item -1"):
        Template("{{ answer_choices[label] }}", "greedy").parts({"label": -1}, CHOICES)


# -- at random -------------------------------------------------------------------------------------

_RENDER = """
import json, resource, sys
from ia3.tfew.prompts.templates import Template, TemplateError

size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 250_000_000, resource.RLIM_INFINITY))
sources, example = json.load(sys.stdin)
for source in sources:
    try:
        Template(source, "random").parts(example, ["yes", "no"])
        print("rendered")
    except TemplateError as error:
        print("memory" if "MemoryError" in str(error) else "raised")
    except BaseException as error:
        print(repr(error), source)
"""


@pytest.mark.slow
def test_random_templates_render_or_raise_in_little_memory():
    random = Random(0)
    sources = [random_template(random, depth=2 + i % 3) for i in range(60)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RENDER],
        input=json.dumps([sources, EXAMPLE]),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(sources)
    assert set(lines) == {"rendered", "raised"}
