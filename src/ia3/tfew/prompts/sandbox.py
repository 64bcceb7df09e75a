"""Jinja's sandbox with a budget: what a template of unknown origin may do, and how much of it.

Every value that a template makes goes through a gate of the environment, which weighs what goes in,
refuses what would become too large, and charges what comes out. What is known of filters and
methods by their names only makes them cheaper: one that is not known takes as much as the worst.
"""

from __future__ import annotations

import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set, Sized, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from fractions import Fraction
from math import prod
from numbers import Integral, Number, Rational
from types import BuiltinMethodType, MethodType
from typing import Any

from ...errors import IA3Error, MissingExtraError

try:
    from jinja2 import StrictUndefined, Undefined, nodes, pass_context
    from jinja2.compiler import CodeGenerator
    from jinja2.exceptions import SecurityError
    from jinja2.filters import do_indent, do_int, do_round
    from jinja2.runtime import BlockReference, Context, LoopContext, Macro
    from jinja2.sandbox import (
        ImmutableSandboxedEnvironment,
        SandboxedEscapeFormatter,
        SandboxedFormatter,
    )
    from jinja2.utils import Cycler, Joiner, Namespace
    from markupsafe import Markup, escape
except ImportError as error:
    raise MissingExtraError("jinja2", "tfew", "rendering prompt templates") from error

ALL_FIELDS = "fields"

# What a rendering may take. A step is about 50 ns of time or 5 bytes of memory, whichever is more,
# so that the worst template ends after a second or two and some 100 MB. A document of 100 kB takes
# 100,000 steps each time it is printed or changed, a turn of a loop over 500 choices some 1,000.
BUDGET = 20_000_000

# What the parts of a rendering take, in steps, as measured.
_NODE = 4  # a node of the syntax tree
_TURN = 20  # of a loop
_LOOKUP = 30  # an item or an attribute
_OPERATOR = 40
_CALL = 100  # a filter, a test, a method or a macro
_ITEM = 16  # a place in a list; twice that in a mapping
_OTHER = 1000  # a value of a type that is not known, as text or to compare

# Reading is this much faster than making: characters at a time, items at a time.
_CHARACTERS_READ = 64
_ITEMS_READ = 2

# No text grows more than this by a change of each character: an emoji is 12 in a URL.
_GROWTH = 12

# Values nested deeper could overflow the stack of what takes them apart.
_DEEPEST = 100

# Beyond it, many whole numbers may have the same hash, which makes dictionaries slow.
_LARGE_NUMBER = 2**60
_LARGE_NUMBER_TAKES = 1000


class TemplateError(IA3Error):
    """A template is not Jinja, does not fit the example, is refused, or exceeds its budget."""


class UnknownLabelError(TemplateError):
    """A template takes an item by the label of an example that has none."""


class _FromTheEnd(int):
    """A number with the minus that a template wrote: its author counts from the end."""


class _Blank(int):
    """The number 0 that a blank text becomes."""


# -- the budget ------------------------------------------------------------------------------------


class _Budget:
    """The steps that are left to a rendering."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = BUDGET

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise SecurityError(f"it takes more than {BUDGET:,} steps (a character is one)")

    def check(self, size: int) -> None:
        """Raise where a value of this size could not be paid for."""
        if size > self.left:
            raise SecurityError(f"a value could become larger than its {BUDGET:,} steps allow")

    def weigh(self, value: Any, depth: int = 0) -> int:
        """A value's size, with all that it holds as often as it would be printed.

        Raises as soon as it is more than what is left, so that weighing takes no longer than that.
        """
        kind = type(value)
        if kind is str:
            return len(value)
        if value is None or kind is bool or kind is float:
            return 1
        if kind is int:
            return _digits(value)
        if isinstance(value, str | bytes | bytearray):
            return len(value)
        if isinstance(value, Rational):
            return _digits(int(value.numerator)) + _digits(int(value.denominator)) - 1
        if isinstance(value, Undefined | Number):
            return _ITEM
        if isinstance(value, range):
            return len(value) * (_ITEM + max(_digits(value.start), _digits(value.stop)))
        if depth > _DEEPEST:
            raise SecurityError(f"a value is nested more than {_DEEPEST} levels deep")
        if isinstance(value, Namespace):  # it hides its attributes, but its text shows them
            value = object.__getattribute__(value, "__dict__")
        total = _ITEM
        if isinstance(value, Mapping):
            for key, item in value.items():
                total += 2 * _ITEM + self.weigh(key, depth + 1) + self.weigh(item, depth + 1)
                if total > self.left:
                    break
        elif isinstance(value, Sequence | Set | ValuesView):
            for item in value:
                # Texts and small numbers, which are most, without a call.
                if type(item) is str:
                    total += _ITEM + len(item)
                elif type(item) is int and -_LARGE_NUMBER < item < _LARGE_NUMBER:
                    total += _ITEM + 1
                else:
                    total += _ITEM + self.weigh(item, depth + 1)
                if total > self.left:
                    break
        else:
            size = getattr(value, "nbytes", None)  # as arrays have it
            total = _OTHER + (size if isinstance(size, int) else 0)
        self.check(total)
        return total

    def read(self, value: Any) -> int:
        """What reading a value takes, e.g. to compare it."""
        if isinstance(value, str):
            return len(value) // _CHARACTERS_READ
        return self.weigh(value) // _ITEMS_READ

    def listed(self, iterator: Iterator[Any]) -> list[Any]:
        """The items of an iterator, each paid for when it comes."""
        items = []
        for item in iterator:
            self.spend(_ITEM + self.weigh(item))
            items.append(item)
        return items

    def result(self, value: Any) -> Any:
        """What a call returned, paid for; an iterator as a list, as its items come at a price."""
        if type(value) is str:
            self.spend(len(value))
        elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.listed(value)
        else:
            self.spend(self.weigh(value))
        return value


def _digits(number: int) -> int:
    if -_LARGE_NUMBER < number < _LARGE_NUMBER:
        return 1
    bits = number.bit_length()
    # A product, or the number as text, takes the square of its digits.
    return _LARGE_NUMBER_TAKES + bits * bits // 64


_budget: ContextVar[_Budget] = ContextVar("_budget")


@contextmanager
def a_budget() -> Iterator[None]:
    """Within the context, what is rendered in this thread has one budget."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


# -- what calls take -------------------------------------------------------------------------------

# A rule says from the arguments of a filter, a test or a method (whose object comes first) how many
# steps it takes and how large its result may be at most. None: the result is no new value, and
# counts nothing.
_Rule = Callable[[_Budget, Sequence[Any]], tuple[int, int | None]]


def _fixed(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    return 0, None


def _reading(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    return sum(map(budget.read, values)), None


def _searching(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    # Text in text takes the product where both repeat themselves.
    texts = [len(value) + 1 for value in values if isinstance(value, str)]
    others = [budget.read(value) for value in values if not isinstance(value, str)]
    return prod(texts) // _CHARACTERS_READ + sum(others), None


def _linear(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    size = sum(map(budget.weigh, values))
    # One text may be a list of attributes, whose parts are kept.
    parts = sum(_ITEM * len(value) for value in values[1:] if isinstance(value, str))
    return size + parts, _GROWTH * size


def _dating(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    """A date's methods: `strftime` may pad."""
    steps, size = _linear(budget, values)
    texts = [value for value in values if isinstance(value, str)]
    return steps, (size or 0) + sum(map(_widths_in, texts))


def _splitting(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    steps, _ = _searching(budget, values)
    return steps, _GROWTH * budget.weigh(values[0])


def _growing(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    """Each part of the first becomes as large as the largest of the others."""
    first, *others = map(budget.weigh, values)
    largest = max([*others, *map(abs, _numbers(values[1:]))], default=0)
    return first + sum(others), _GROWTH * first + (1 + first) * (1 + largest)


def _by_words(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    """Within a word they take the square."""
    steps, size = _growing(budget, values)
    longest = max(map(len, str(values[0]).split()), default=0)
    return steps * (longest + 10) * (1 + sum(map(budget.weigh, values[1:]))), size


def _by_tags(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    """Each tag is cut out of the whole text."""
    steps, size = _linear(budget, values)
    return steps + steps * str(values[0]).count("<") // 500, size


def _summing(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    """A sum of lists copies what it has for each."""
    steps, size = _linear(budget, values)
    count = len(values[0]) if isinstance(values[0], Sized) else 1
    return steps + steps * count // 500, size


def _json(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    steps, _ = _linear(budget, values)
    indent = sum(map(budget.weigh, values[1:])) + sum(map(abs, _numbers(values[1:])))
    return steps, steps * (_GROWTH + indent * _DEEPEST)


def _rounding(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    """Ten to the power of the digits, whose product takes their square."""
    return sum(map(budget.weigh, values)) + sum(n * n for n in _numbers(values[1:])), None


def _coding(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    usual = all(value in _ENCODINGS for value in values[1:])
    return _linear(budget, values) if usual else _unknown(budget, values)


# Others can take the square of the text, or load modules.
_ENCODINGS = ("utf-8", "utf8", "ascii", "latin-1", "strict", "ignore", "replace")


def _formatting(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    """`%` with text on its left."""
    text = values[0] if isinstance(values[0], str) else ""
    filled = values[1:]
    if len(filled) == 1 and isinstance(filled[0], tuple):
        filled = filled[0]
    size = sum(map(budget.weigh, filled))
    star = max(map(abs, _numbers(filled)), default=0)
    # Any number may be a width, and what has a key may come again and again.
    grows = len(text) + _widths_in(text) + star * text.count("*")
    return len(text) + size, grows + _GROWTH * size * (1 + text.count("%("))


def _widths_in(text: str) -> int:
    """The sum of all numbers in a text."""
    return sum(min(int(digits[:20]), BUDGET) for digits in re.findall(r"\d+", text))


def _unknown(budget: _Budget, values: Sequence[Any]) -> tuple[int, int | None]:
    """At worst the square of all combinations."""
    sizes = [*map(budget.weigh, values), *map(abs, _numbers(values))]
    steps = prod(1 + size for size in sizes) ** 2
    return steps, steps


def _numbers(values: Sequence[Any]) -> list[int]:
    return [int(value.numerator) for value in values if isinstance(value, Rational)]


_RULES: dict[str, _Rule] = {
    name: rule
    for rule, names in {
        _fixed: "default d defined undefined none boolean false true integer float string mapping "
        "number sequence iterable callable sameas escaped length first last random odd even "
        "divisibleby",
        _reading: "eq equalto == ne != lt lessthan < le <= gt greaterthan > ge >= startswith "
        "endswith get items keys values filter test",
        _searching: "in find index rfind rindex count",
        _splitting: "split rsplit partition rpartition splitlines strip lstrip rstrip trim",
        _linear: "abs attr capitalize casefold choice copy current cycle cycler dict dictsort "
        "difference e escape filesizeformat float forceescape fromkeys groupby int intersection "
        "isalnum isalpha isascii isdecimal isdigit isdisjoint islower isnumeric isspace issubset "
        "issuperset istitle isupper item joiner list lower maketrans map max min most_frequent "
        "namespace next range reject rejectattr removeprefix removesuffix reset reverse safe "
        "select selectattr sort string swapcase symmetric_difference title tolist truncate union "
        "unique upper urlencode wordcount xmlattr zip changed "
        "as_integer_ratio bit_count bit_length conjugate hex is_integer",
        _growing: "batch center expandtabs indent join ljust replace rjust slice translate zfill",
        _by_words: "urlize wordwrap",
        _by_tags: "striptags",
        _summing: "sum",
        _json: "tojson",
        _rounding: "round",
        _coding: "encode decode",
        _formatting: "format",
    }.items()
    for name in names.split()
}

# Whose methods a template may call: what those of others do, and what it takes, is not known.
_DATES = (datetime, date, time, timedelta, tzinfo)
_CALLED = (
    *(str, bytes, list, tuple, dict, set, frozenset, int, float, complex, Decimal, Fraction),
    *_DATES,
    *(Mapping, LoopContext, Cycler),
)
_OF_ARRAYS = ("item", "tolist")
# Code of the template, which pays for itself, or raises.
_RUN = (Undefined, Macro, LoopContext, BlockReference, Joiner)


def _paid(rule: _Rule, values: Sequence[Any], run: Callable[[], Any]) -> Any:
    """What a call returns, after it was paid for."""
    budget = _budget.get()
    steps, size = rule(budget, values)
    budget.spend(_CALL + _ITEM * len(values) + steps)
    budget.check(size or 0)
    value = run()
    return value if size is None and not isinstance(value, Iterator) else budget.result(value)


def _gated(name: str, function: Any) -> Callable[..., Any]:
    rule = _RULES.get(name, _unknown)

    @pass_context
    def gated(context: Context, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        return _paid(
            rule,
            [value, *args, *kwargs.values()],
            lambda: context.call(function, value, *args, **kwargs),
        )

    return gated


_FORMATS = ("format", "format_map")


class _Format:
    """`str.format` or `str.format_map` of a text, each field on the budget."""

    def __init__(self, environment: Sandbox, text: str, name: str) -> None:
        formatter = _EscapeFormatter if isinstance(text, Markup) else _Formatter
        extra = {"escape": text.escape} if isinstance(text, Markup) else {}
        self._formatter = formatter(environment, **extra)
        self._text, self._takes_mapping = text, name == "format_map"

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._takes_mapping:
            (kwargs,), args = args, ()
        return type(self._text)(self._formatter.vformat(self._text, args, kwargs))


class _Formatter(SandboxedFormatter):
    def convert_field(self, value: Any, conversion: Any) -> Any:
        budget = _budget.get()
        budget.spend(_CALL)
        budget.check(_GROWTH * budget.weigh(value))
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = _budget.get()
        budget.check(_widths_in(format_spec))
        text = super().format_field(value, format_spec)
        budget.spend(len(text) + len(format_spec))
        return text


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


# -- the environment -------------------------------------------------------------------------------


class _Generator(CodeGenerator):
    """Writes the gates of the environment into a template's code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gates: dict[nodes.Node, str] = {}

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        gates = self._gates.get(node, "")
        if (
            isinstance(node, nodes.List | nodes.Dict)
            or (isinstance(node, nodes.Tuple) and node.ctx == "load")
            or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
        ):
            gates += "environment.held("
        if gates:
            self.write(gates)
        super().visit(node, *args, **kwargs)
        if gates:
            self.write(")" * gates.count("("))

    def blockvisit(self, body: Any, frame: Any) -> None:
        self.writeline(f"environment.spend({_NODE + sum(map(self._size, body))})")
        super().blockvisit(body, frame)

    def visit_For(self, node: nodes.For, frame: Any) -> None:  # noqa: N802
        self._gates[node.iter] = "environment.iterated("
        if node.test is not None:
            self._gates[node.test] = f"environment.tested({_NODE + self._size(node.test)}, "
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:  # noqa: N802
        self._gates.update(dict.fromkeys(node.nodes, "environment.text("))
        super().visit_Concat(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:  # noqa: N802
        # `a < b < c`: b is computed once, and c only where a < b.
        left = ""
        self.write("(")
        for place, operand in enumerate(node.ops, start=1):
            self.write(f"environment.compare({operand.op!r}, ")
            self.write(left) if left else self.visit(node.expr, frame)
            left = self.temporary_identifier() if place < len(node.ops) else ""
            self.write(f", ({left} := " if left else ", (")
            self.visit(operand.expr, frame)
            self.write(")) and " if left else "))")
        self.write(")")

    def derive_context(self, frame: Any) -> str:
        names = len(frame.symbols.dump_stores())
        return f"environment.derived({_ITEM * names}, {super().derive_context(frame)})"

    def _size(self, node: nodes.Node) -> int:
        """What running a node takes, without its values."""
        text = len(node.data) if isinstance(node, nodes.TemplateData) else 0
        # A body pays when it is run, but for that of `autoescape`, which is no body of its own.
        apart = () if isinstance(node, nodes.EvalContextModifier) else ("body", "else_")
        return _NODE + text + sum(map(self._size, node.iter_child_nodes(exclude=apart)))


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "gt", "lt")},
    "gteq": operator.ge,
    "lteq": operator.le,
    "in": lambda item, items: item in items,
    "notin": lambda item, items: item not in items,
}


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of all templates; what renders one is within `a_budget`."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    intercepted_unops = frozenset(ImmutableSandboxedEnvironment.default_unop_table)

    def __init__(self) -> None:
        # Not optimised: the compiler would compute constants without a budget.
        super().__init__(
            undefined=StrictUndefined, autoescape=False, optimized=False, finalize=_shown
        )
        del self.globals["lipsum"]
        # What promptsource adds to Jinja.
        self.filters["choice"] = _choice
        self.filters["most_frequent"] = _most_frequent
        self.filters["int"] = _int
        self.globals["zip"] = zip
        # These take other types than they are made for: `'%9d' is odd` is a format.
        self.filters["indent"] = _indent
        self.filters["round"] = _round
        self.tests["odd"] = lambda value: _number(value) % 2 == 1
        self.tests["even"] = lambda value: _number(value) % 2 == 0
        self.tests["divisibleby"] = lambda value, num: _number(value) % num == 0
        for table in (self.filters, self.tests):
            table.update({name: _gated(name, function) for name, function in table.items()})

    # What the code of a template calls.

    def spend(self, steps: int) -> None:
        _budget.get().spend(steps)

    def held(self, value: Any) -> Any:
        """A new list or part of one, which holds what was there before; or a part of a text."""
        budget = _budget.get()
        if isinstance(value, str):
            budget.spend(len(value))
        else:
            budget.spend(budget.read(value))
            budget.spend(2 * _ITEM * len(value) if isinstance(value, Sized) else _OTHER)
        return value

    def iterated(self, value: Any) -> Any:
        """What a loop goes through, all its turns paid for."""
        budget = _budget.get()
        if not isinstance(value, Sized):
            value = budget.listed(iter(value))
        budget.spend(_TURN * len(value))
        return value

    def tested(self, steps: int, value: Any) -> Any:
        """The test of a loop's turn."""
        self.spend(steps)
        return value

    def text(self, value: Any) -> str:
        budget = _budget.get()
        if not isinstance(value, str):
            weight = budget.weigh(value)
            budget.spend(weight)
            budget.check(_GROWTH * weight)
        text = value if isinstance(value, str) else str(value)
        budget.spend(_OPERATOR + len(text))
        return text

    def compare(self, name: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        rule = _searching if "in" in name else _reading
        budget.spend(_OPERATOR + rule(budget, (left, right))[0])
        return _COMPARISONS[name](left, right)

    def derived(self, steps: int, context: Context) -> Context:
        """A block's own context, which is a copy with the names of where it stands."""
        _budget.get().spend(_CALL + steps + _ITEM * len(context.parent))
        return context

    # Jinja's own hooks.

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        if isinstance(function, _RUN):  # code of the template, which pays for itself
            budget.spend(_CALL + _ITEM * (len(args) + len(kwargs)))
            return budget.result(super().call(context, function, *args, **kwargs))
        hidden = ("_loop_vars", "_block_vars")
        values = [*args, *(kwargs[key] for key in kwargs if key not in hidden)]
        rule = self._rule(function, values)
        run = super().call
        return _paid(rule, values, lambda: run(context, function, *args, **kwargs))

    def _rule(self, function: Any, values: list[Any]) -> _Rule:
        """What a function or method takes; a method's object is put before the other values."""
        if isinstance(function, _Format):
            return _linear
        for name, known in self.globals.items():
            if function is known:
                return _RULES.get(name, _unknown)
        if isinstance(function, BuiltinMethodType | MethodType):
            owner, name = function.__self__, function.__name__
            if owner is None or owner is dict:  # str.maketrans and dict.fromkeys
                return _RULES.get(name, _unknown)
            values.insert(0, owner)
            for kind in _CALLED:
                if isinstance(owner, kind) and hasattr(kind, name):
                    return _dating if kind in _DATES else _RULES.get(name, _unknown)
            if name in _OF_ARRAYS:
                return _RULES[name]
        what = getattr(function, "__qualname__", type(function).__qualname__)
        raise SecurityError(f"what a call of {what} takes is not known: give its result as a field")

    def wrap_str_format(self, value: Any) -> _Format | None:
        if isinstance(value, BuiltinMethodType | MethodType) and isinstance(value.__self__, str):
            name = value.__name__
            return _Format(self, value.__self__, name) if name in _FORMATS else None
        return None

    def getattr(self, obj: Any, attribute: str) -> Any:
        _budget.get().spend(_LOOKUP)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        budget = _budget.get()
        budget.spend(_LOOKUP)
        if not isinstance(argument, str | int):  # it is hashed, or printed if it is not there
            budget.spend(budget.weigh(argument))
        # Data sets write -1, nothing or a blank for a label that is not known. Python would take
        # the last item, or the first one, for the answer.
        unknown = argument is None or isinstance(argument, _Blank)
        if isinstance(argument, Integral) and not isinstance(argument, _FromTheEnd):
            unknown = unknown or argument < 0
        if unknown and isinstance(obj, list | tuple | str):
            raise UnknownLabelError(f"the item {argument!r} is asked for, as of an unknown label")
        return super().getitem(obj, argument)

    def call_unop(self, context: Context, operator: str, arg: Any) -> Any:
        _budget.get().spend(_OPERATOR)
        result = super().call_unop(context, operator, arg)
        return _FromTheEnd(result) if type(result) is int and operator == "-" else result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.spend(_OPERATOR)
        sizes = budget.weigh(left), budget.weigh(right)
        if operator in ("+", "-"):
            budget.check(sum(sizes))
        elif operator == "%" and isinstance(left, str):
            steps, size = _formatting(budget, (left, right))
            budget.spend(steps)
            budget.check(size or 0)
        elif not (isinstance(left, int | float) and isinstance(right, int | float)):
            budget.check(prod((*sizes, *(1 + abs(n) for n in _numbers((left, right))))))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            budget.check((left.bit_length() * abs(right)) ** 2 // 64)
        result = super().call_binop(context, operator, left, right)
        return self.held(result) if isinstance(result, list | tuple) else budget.result(result)


# -- what promptsource adds, and what else takes the place of Jinja's own --------------------------


@pass_context
def _shown(context: Context, value: Any) -> str:
    """What is printed, as text."""
    text: str = context.environment.text(value)  # type: ignore[attr-defined]
    if context.eval_ctx.autoescape:
        text = escape(text)
        _budget.get().spend(len(text))
    return text


@pass_context
def _choice(context: Context, items: Sequence[Any]) -> Any:
    """One of the items, for one example always the same, so that prompt and target agree."""
    # By a field's beginning: its end may be cut to fit the model.
    fields = {
        name: value[:8] if isinstance(value, str) else value
        for name, value in context[ALL_FIELDS].items()
    }
    budget = _budget.get()
    budget.spend(2 * budget.weigh(fields))
    return random.Random(repr(sorted(fields.items()))).choice(items)


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    blank = value is None or (isinstance(value, str) and not value.strip())
    number: int = do_int(value, default, base)
    return _Blank(number) if blank else number


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    counts = Counter(items)
    most = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == most]


def _indent(s: Any, *args: Any, **kwargs: Any) -> str:
    # It adds to what it is given, in place where that is a list.
    return do_indent(s if isinstance(s, str) else str(s), *args, **kwargs)


def _round(value: Any, *args: Any, **kwargs: Any) -> Any:
    return do_round(_number(value), *args, **kwargs)


def _number(value: Any) -> Any:
    if isinstance(value, Undefined | Number):
        return value
    raise TypeError(f"{type(value).__name__} is no number")
