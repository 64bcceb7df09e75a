"""Templates made at random from all that Jinja has, with large numbers and loops in loops."""

from __future__ import annotations

import re
from random import Random

from jinja2.filters import FILTERS
from jinja2.tests import TESTS


def _methods(*kinds: type) -> list[str]:
    names = {name for kind in kinds for name in dir(kind) if not name.startswith("_")}
    return [f"{name}(<arguments>)" for name in sorted(names)]


# What stands in angle brackets is replaced by one of the ways to write it.
GRAMMAR = {
    "template": [
        "{% set ns = namespace(t=text, n=n, l=tags) %}{% set x = n %}"
        "{% macro m(x, y=2) %}<statement>{% endmacro %}{% block b %}{{ n }}{% endblock %}"
        "<statement><statement><statement>"
    ],
    "statement": [
        "{{ <any> }}",
        "{{ <text> }}",
        "{% set x = <any> %}<statement>",
        "{% set ns.t = <text> %}<statement>",
        "{% set ns.l = <list> %}<statement>",
        "{% for x in <list> %}<statement>{% endfor %}",
        "{% for x in <list> if <any> %}<statement>{% else %}<statement>{% endfor %}",
        "{% for x in <list> recursive %}{{ loop(<list>) if loop.depth < <size> }}{% endfor %}",
        "{% for x in range(<size>) %}<statement><statement>{% endfor %}",
        "{% for i in range(24) %}{% set ns.t = ns.t ~ <text> %}{% endfor %}<statement>",
        "{% for i in range(24) %}{% set ns.l = [ns.l, <any>, ns.l] %}{% endfor %}<statement>",
        "{% for i in range(24) %}{% set ns.n = ns.n * <number> %}{% endfor %}<statement>",
        "{% if <any> %}<statement>{% else %}<statement>{% endif %}",
        "{% set x %}<statement>{% endset %}<statement>",
        "{% set ns.t %}<statement>{% endset %}<statement>",
        "{% filter <text filter> %}<statement>{% endfilter %}",
        "{% call m(<any>) %}<statement>{% endcall %}",
        "{% with x = <any> %}<statement>{% endwith %}",
        "{% autoescape <any> %}<statement>{% endautoescape %}",
    ],
    "any": [
        *("x", "none", "<text>", "<text>", "<number>", "<list>", "<list>", "<mapping>"),
        *("(<any> <operator> <any>)", "(<any> == <any>)", "(<any> in <list>)", "(not <any>)"),
        *("(<number> < <number> < <number>)", "(<text> in <text>)", "(<any> is <test>)"),
        *("(<any>)|<filter>", "(<list>)|<filter>", "(<any> if <any> else <any>)", "(<any>)[<any>]"),
        *("<mapping>.<mapping method>", "(<list>).<list method>", "(<number>).<number method>"),
        *("cycler(<arguments>).next()", "joiner(<text>)()", "x.<attribute>"),
        "(loop.<attribute> if loop is defined else n)",
    ],
    "text": [
        *("text", "ns.t", "'a'", "' '", "''", "'b c-d '", "'<i>'", "'\\n'", "'\\t'", "'😀'", "')'"),
        *("'%s'", "'%9d'", "'%*d'", "'%(text)s'", "'{}'", "'{0:>{1}}'", "'{0!r}'", "'utf-8'"),
        *("(<text> * <size>)", "(<text> ~ <any>)", "(<text> + <text>)", "(<text> % <any>)"),
        *("(<text> % (<any>, <any>))", "'%<size>d'", "'{:<size>}'", "(<text>)[<number>:<number>]"),
        *("(<text>)|<text filter>", "(<text>)|<text filter>", "(<text>).<text method>"),
        *("(<text>).format(<arguments>)", "(<list>)|join(<text>)", "m(<any>)"),
        "(caller() if caller is defined else x)",
        *("(<any>)|<filter>|string", "self.b()"),
    ],
    "number": [
        *("n", "ns.n", "0", "1", "2", "7", "<size>", "(-<number>)", "1.5", "1e300", "10**30"),
        *("(<number> <operator> <number>)", "(<list>)|length", "(<text>)|int"),
        "(loop.index if loop is defined else n)",
        *("(<list>)|sum", "(<number>)|round(<number>, 'ceil')", "(<list>)[<number>]"),
    ],
    "list": [
        *("tags", "answer_choices", "ns.l", "[]", "[<any>, <any>]", "(<any>, <any>)", "[<text>]"),
        *("(<list> + <list>)", "(<list> * <size>)", "(<list>)[<number>:]", "range(<size>)"),
        *("range(<number>, <number>, <number>)", "zip(<list>, <list>)", "(<text>).split()"),
        *("(<list>)|<filter>|list", "(<text>)|list", "(<mapping>)|dictsort", "(<list>)|<map>|list"),
    ],
    "mapping": [
        *("table", "fields", "{}", "{<any>: <any>, <text>: <any>}", "dict(a=<any>, text=<any>)"),
        *("dict(zip(<list>, <list>))", "namespace(a=<any>)"),
    ],
    "map": [
        *("map('<filter name>', <arguments>)", "map(attribute=<text>)", "map(attribute='0.0')"),
        *("select('<test>')", "rejectattr(<text>, '<test>', <arguments>)", "select"),
    ],
    "size": ["2", "3", "60", "255", "1000", "30000", "100000", "10**7", "50000000"],
    "operator": ["+", "-", "*", "/", "//", "%", "**", "~", "and", "or", "<", "!=", "not in"],
    "arguments": ["", "", "<any>", "<text>", "<number>", "<text>, <text>", "<number>, <any>"],
    "attribute": ["index", "last", "length", "revindex", "cycle", "nextitem", "real", "a", "items"],
    "filter name": [*FILTERS, "choice", "most_frequent"],
    "filter": ["<filter name>(<arguments>)", "<filter name>", "<filter name>(attribute=<any>)"],
    "text filter": [
        *("upper", "title", "e", "urlencode", "urlize", "striptags", "wordwrap(<size>)", "tojson"),
        *("center(<size>)", "indent(<size>)", "replace(<text>, <text>)", "format(<arguments>)"),
        *("trim(<text>)", "wordcount", "pprint", "truncate(<size>)", "string", "safe", "reverse"),
        *("urlize(<size>, rel=<text>)", "wordwrap(<size>, wrapstring=<text>)", "<filter>"),
    ],
    "test": sorted(name for name in TESTS if name.isalpha()),
    "text method": _methods(str),
    "list method": _methods(list, tuple, range, set),
    "mapping method": _methods(dict),
    "number method": _methods(int, float),
}  # fmt: skip
_NAME = re.compile(r"<([a-z ]+)>")


def random_template(random: Random, depth: int = 6) -> str:
    """One template; deeper ones are longer."""
    return _written("template", random, depth)


def _written(name: str, random: Random, depth: int) -> str:
    ways = GRAMMAR[name]
    if depth <= 0:
        fewest = min(len(_NAME.findall(way)) for way in ways)
        ways = [way for way in ways if len(_NAME.findall(way)) == fewest]
    return _NAME.sub(
        lambda part: _written(part[1], random, depth - 1) if part[1] in GRAMMAR else part[0],
        random.choice(ways),
    )
