"""Prompts from fields: Jinja in its sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import IA3Error, MissingExtraError, did_you_mean

try:
    from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    raise MissingExtraError("jinja2", "tfew", "rendering prompt templates") from error

ANSWER_CHOICES = "answer_choices"
ALL_FIELDS = "fields"

# Templates come with adapters from anywhere, and `'a' * 10**10` would take the machine's memory.
# The plain ways to make something that large are bounded or left out.
_LARGEST = 100_000
_PADDING_METHODS = frozenset(
    ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill")
)
_PADDING_FILTERS = ("center", "format", "indent", "wordwrap")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self) -> None:
        # Not optimised: constants would be folded when a template is compiled, past the bounds.
        super().__init__(undefined=StrictUndefined, autoescape=False, optimized=False)
        del self.globals["lipsum"]
        for name in _PADDING_FILTERS:
            del self.filters[name]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        pads = isinstance(obj, str) and attr in _PADDING_METHODS
        return not pads and super().is_safe_attribute(obj, attr, value)

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


_environment = _Environment()


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
        except RecursionError as error:
            raise IA3Error(f"template {source[:80]!r}... is nested too deep") from error
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
                {**example, ALL_FIELDS: dict(example), ANSWER_CHOICES: list(answer_choices)}
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
            AttributeError,
            TemplateError,
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
