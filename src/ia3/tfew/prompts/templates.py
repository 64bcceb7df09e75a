"""Prompts from fields: Jinja in its sandbox."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from ...errors import IA3Error, MissingExtraError, did_you_mean

try:
    from jinja2 import (
        StrictUndefined,
        TemplateSyntaxError,
        UndefinedError,
        meta,
        nodes,
        pass_context,
    )
    from jinja2.exceptions import SecurityError
    from jinja2.filters import do_int
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    raise MissingExtraError("jinja2", "tfew", "rendering prompt templates") from error

ANSWER_CHOICES = "answer_choices"
ALL_FIELDS = "fields"
SEPARATOR = "|||"

# Stands for the separator while a template renders, so that three bars in a field separate nothing.
_RENDERED_SEPARATOR = f"\0{SEPARATOR}\0"

# Templates come with adapters from anywhere, and `'a' * 10**10` would take the machine's memory.
# The environment bounds the plain ways to make something that large, or leaves them out.
_LARGEST = 100_000
_PADDING_METHODS = ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill")
_PADDING_FILTERS = ("center", "format", "indent", "wordwrap")


class UnknownLabelError(IA3Error):
    """A template takes an item by the label of an example that has none."""


class _FromTheEnd(int):
    """A number with the minus that a template wrote: its author counts from the end."""


class _Blank(int):
    """The number 0 that a blank text becomes."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%", "+"))
    intercepted_unops = frozenset("-")

    def __init__(self) -> None:
        # Not optimised: the compiler would compute constants without the bounds.
        super().__init__(undefined=StrictUndefined, autoescape=False, optimized=False)
        del self.globals["lipsum"]
        for name in _PADDING_FILTERS:
            del self.filters[name]
        # What promptsource adds to Jinja.
        self.filters["choice"] = _choice
        self.filters["most_frequent"] = _most_frequent
        self.filters["int"] = _int
        self.globals["zip"] = zip

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        pads = isinstance(obj, str) and attr in _PADDING_METHODS
        return not pads and super().is_safe_attribute(obj, attr, value)

    def call_unop(self, context: Any, operator: str, arg: Any) -> Any:
        result = super().call_unop(context, operator, arg)
        return _FromTheEnd(result) if type(result) is int else result

    def getitem(self, obj: Any, argument: Any) -> Any:
        # Data sets write -1, nothing or a blank for a label that is not known. Python would take
        # the last item, or the first one, for the answer.
        unknown = argument is None or isinstance(argument, _Blank)
        if isinstance(argument, Integral) and not isinstance(argument, _FromTheEnd):
            unknown = unknown or argument < 0
        if unknown and isinstance(obj, list | tuple | str):
            raise UnknownLabelError(f"the item {argument!r} is asked for, as of an unknown label")
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
        text = isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple)
        if (
            operator == "**"
            or (operator == "%" and text)
            or (operator == "*" and sizes[0] * sizes[1] > _LARGEST)
            or (operator == "+" and text and sum(sizes) > _LARGEST)
        ):
            raise SecurityError(f"{operator!r} could make too much")
        return super().call_binop(context, operator, left, right)


@pass_context
def _choice(context: Context, items: Sequence[Any]) -> Any:
    """One of the items, for one example always the same, so that prompt and target agree."""
    # By a field's beginning: its end may be cut to fit the model.
    fields = {
        name: value[:8] if isinstance(value, str) else value
        for name, value in context[ALL_FIELDS].items()
    }
    return random.Random(repr(sorted(fields.items()))).choice(items)


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    blank = value is None or (isinstance(value, str) and not value.strip())
    number: int = do_int(value, default, base)
    return _Blank(number) if blank else number


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]


_environment = _Environment()


class Template:
    """A prompt template: Jinja over the names of an example's fields.

    `{{ answer_choices }}` is the list of the words to rank, and `{{ fields["Tweet text"] }}`
    reaches a field whose name Jinja cannot write. White space at the prompt's end is dropped. As in
    promptsource, what follows `|||` is the target; white space is then dropped at both ends.

    Args:
        source: e.g. `"{{ text }}\\nIs this review positive or negative?"`.
        name: for messages; by default the source.

    Raises:
        IA3Error: the source is not Jinja.
    """

    def __init__(self, source: str, name: str | None = None) -> None:
        self.source = source
        self.name = name or source
        try:
            rendering = source.replace(SEPARATOR, _RENDERED_SEPARATOR)
            self._compiled = _environment.from_string(rendering)
            parsed = _environment.parse(source)
        except TemplateSyntaxError as error:
            raise IA3Error(
                f"template {self.name!r}: {error.message} (line {error.lineno})"
            ) from error
        except RecursionError as error:
            raise IA3Error(f"template {self.name[:80]!r}... is nested too deep") from error
        variables = meta.find_undeclared_variables(parsed) - _environment.globals.keys()
        lookups = [
            item.arg.value
            for item in parsed.find_all(nodes.Getitem)
            if getattr(item.node, "name", None) == ALL_FIELDS
            and isinstance(item.arg, nodes.Const)
            and isinstance(item.arg.value, str)
        ]
        self._variables = {*variables, *lookups}
        # Any other use of `fields` may read all of them.
        uses = [name for name in parsed.find_all(nodes.Name) if name.name == ALL_FIELDS]
        self._reads_all = len(uses) > len(lookups)

    def reads(self, field: str) -> bool:
        """Whether what is rendered depends on an example's field."""
        return field in self._variables or self._reads_all

    def render(self, example: Mapping[str, Any], answer_choices: Sequence[str]) -> str:
        """The prompt for one example. A target is not rendered: its fields may be missing.

        Raises:
            IA3Error: the template names a field the example lacks, or reaches for Python internals.
        """
        prompt = ""
        with self._explained(example):
            for text in self._compiled.generate(_context(example, answer_choices)):
                before, separator, _ = text.partition(_RENDERED_SEPARATOR)
                prompt += before
                if separator:
                    break
        return prompt.strip() if SEPARATOR in self.source else prompt.rstrip()

    def parts(self, example: Mapping[str, Any], answer_choices: Sequence[str]) -> list[str]:
        """The prompt and the target, split at the template's `|||`; raises as `render` does.

        An `UnknownLabelError` where an item is taken by a label that is below 0, blank or `None`.
        """
        with self._explained(example):
            rendered: str = self._compiled.render(_context(example, answer_choices))
        return [part.strip() for part in rendered.split(_RENDERED_SEPARATOR)]

    @contextmanager
    def _explained(self, example: Mapping[str, Any]) -> Iterator[None]:
        try:
            yield
        except UndefinedError as error:
            missing = sorted(self._variables - example.keys() - {ANSWER_CHOICES, ALL_FIELDS})
            lacking = f", not {', '.join(map(repr, missing))}" if missing else ""
            hint = did_you_mean(missing[0], example) if missing else ""
            raise IA3Error(
                f"template {self.name!r}: {error.message}; the example has the fields "
                f"{sorted(example)}{lacking}{hint}"
            ) from error
        except UnknownLabelError as error:
            raise UnknownLabelError(f"template {self.name!r}: {error}") from error
        except SecurityError as error:
            raise IA3Error(f"template {self.name!r} is refused: {error}") from error
        except Exception as error:
            raise IA3Error(f"template {self.name!r}: {type(error).__name__}: {error}") from error


def _context(example: Mapping[str, Any], answer_choices: Sequence[str]) -> dict[str, Any]:
    return {**example, ALL_FIELDS: dict(example), ANSWER_CHOICES: list(answer_choices)}
