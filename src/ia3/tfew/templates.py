"""Prompts from fields: Jinja in its sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import IA3Error, MissingExtraError, did_you_mean

try:
    from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError, meta
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    raise MissingExtraError("jinja2", "tfew", "rendering prompt templates") from error

ANSWER_CHOICES = "answer_choices"
ALL_FIELDS = "fields"

# A prompt's largest part that arithmetic may make: templates come with adapters from anywhere, and
# `'a' * 10**10` would take the machine's memory.
_LARGEST = 100_000


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > _LARGEST:
            raise SecurityError(f"{operator!r} makes too much")
        return super().call_binop(context, operator, left, right)


_environment = _Environment(undefined=StrictUndefined, autoescape=False)


class Template:
    """A prompt template: Jinja over the names of an example's fields.

    `{{ answer_choices }}` is the list of the words to rank, and `{{ fields["Tweet text"] }}`
    reaches a field whose name Jinja cannot write. The prompt ends where the answer begins: white
    space at its end is dropped.

    Args:
        source: e.g. `"{{ text }}\\nIs this review positive or negative?"`.

    Raises:
        IA3Error: the source is not Jinja.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._compiled = _compile(source)
            variables = meta.find_undeclared_variables(_environment.parse(source))
        except TemplateSyntaxError as error:
            raise IA3Error(f"template {source!r}: {error.message} (line {error.lineno})") from error
        self._variables = frozenset(variables - _environment.globals.keys())

    def reads(self, field: str) -> bool:
        """Whether the prompt depends on an example's field."""
        return field in self._variables or ALL_FIELDS in self._variables

    def render(self, example: Mapping[str, Any], answer_choices: Sequence[str]) -> str:
        """The prompt for one example.

        Raises:
            IA3Error: the template names a field the example lacks, or reaches for Python internals.
        """
        try:
            rendered: str = self._compiled.render(
                {ALL_FIELDS: dict(example), ANSWER_CHOICES: list(answer_choices), **example}
            )
            return rendered.rstrip()
        except UndefinedError as error:
            missing = sorted(self._variables - example.keys() - {ANSWER_CHOICES, ALL_FIELDS})
            hint = did_you_mean(missing[0], example) if missing else ""
            raise IA3Error(
                f"template {self.source!r}: {error.message}; the example has the fields "
                f"{sorted(example)}{hint}"
            ) from error
        except SecurityError as error:
            raise IA3Error(f"template {self.source!r} is refused: {error}") from error
        except (
            ArithmeticError,
            TypeError,
            ValueError,
            LookupError,
            RecursionError,
            MemoryError,
        ) as error:
            raise IA3Error(f"template {self.source!r}: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=1024)
def _compile(source: str) -> Any:
    return _environment.from_string(source)
