"""Prompts from fields: Jinja in its sandbox, on a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any

from ...errors import MissingExtraError, did_you_mean
from .sandbox import (
    ALL_FIELDS,
    Sandbox,
    TemplateError as TemplateError,
    UnknownLabelError as UnknownLabelError,
    a_budget,
)

try:
    from jinja2 import TemplateSyntaxError, UndefinedError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.meta import TrackingCodeGenerator
except ImportError as error:
    raise MissingExtraError("jinja2", "tfew", "rendering prompt templates") from error

ANSWER_CHOICES = "answer_choices"
SEPARATOR = "|||"

# Stands for the separator while a template renders. No text has half a surrogate pair, so that
# nothing in a field separates.
_RENDERED_SEPARATOR = f"\ud800{SEPARATOR}"

# A thousand tokens of code take some 30 ms to compile; text between them costs little, but one long
# token may take 200 times its length in memory.
_LONGEST_SOURCE = 300_000
_MOST_TOKENS = 20_000
# Of one task: each is compiled, and asked with. promptsource's tasks have a dozen.
MOST_TEMPLATES = 1000
# A longer one is compiled anew each time, and takes no memory meanwhile.
_LONGEST_KEPT = 2000

_environment = Sandbox()


class Template:
    """A prompt template: Jinja over the names of an example's fields.

    `{{ answer_choices }}` is the list of the words to rank, and `{{ fields["Tweet text"] }}`
    reaches a field whose name Jinja cannot write. White space at the prompt's end is dropped. As in
    promptsource, what follows `|||` is the target; white space is then dropped at both ends.

    Args:
        source: e.g. `"{{ text }}\\nIs this review positive or negative?"`.
        name: for messages; by default the source.

    Raises:
        TemplateError: the source is not Jinja, or too long.
    """

    def __init__(self, source: str, name: str | None = None) -> None:
        self.source = source
        self.name = name or source
        with self._explained():
            self._check_length()
            read = _kept if len(source) <= _LONGEST_KEPT else _read
            self._compiled, self._variables, self._reads_all = read(source)

    def reads(self, field: str) -> bool:
        """Whether what is rendered depends on an example's field."""
        return field in self._variables or self._reads_all

    def names(self, field: str) -> bool:
        """Whether it has the field's name; one that takes all of `fields` may do without."""
        return field in self._variables

    def render(self, example: Mapping[str, Any], answer_choices: Sequence[str]) -> str:
        """The prompt for one example. A target is not rendered: its fields may be missing.

        Raises:
            TemplateError: the template names a field the example lacks, reaches for Python
                internals, or takes more than its budget.
        """
        rendered = []
        with self._explained(example), a_budget():
            for text in self._compiled.generate(_context(example, answer_choices)):
                before, separator, _ = text.partition(_RENDERED_SEPARATOR)
                rendered.append(before)
                if separator:
                    break
            prompt = _whole("".join(rendered))
        return prompt.strip() if SEPARATOR in self.source else prompt.rstrip()

    def parts(self, example: Mapping[str, Any], answer_choices: Sequence[str]) -> list[str]:
        """The prompt and the target, split at the template's `|||`; raises as `render` does.

        An `UnknownLabelError` where an item is taken by a label that is below 0, blank or `None`.
        """
        with self._explained(example), a_budget():
            rendered: str = self._compiled.render(_context(example, answer_choices))
            return [_whole(part).strip() for part in rendered.split(_RENDERED_SEPARATOR)]

    def _check_length(self) -> None:
        if len(self.source) > _LONGEST_SOURCE:
            raise TemplateError(
                f"it has {len(self.source):,} characters, expected at most {_LONGEST_SOURCE:,}"
            )
        tokens = _environment.lex(self.source)
        if next(islice(tokens, _MOST_TOKENS, None), None):
            raise TemplateError(f"it has more than {_MOST_TOKENS:,} tokens of code")

    @contextmanager
    def _explained(self, example: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Errors name the template, and the example's fields where one is missing."""
        name = repr(self.name if len(self.name) <= 300 else f"{self.name[:297]}...")
        try:
            yield
        except UndefinedError as error:
            example = example or {}
            missing = sorted(self._variables - example.keys() - {ANSWER_CHOICES, ALL_FIELDS})
            lacking = f", not {', '.join(map(repr, missing))}" if missing else ""
            hint = did_you_mean(missing[0], example) if missing else ""
            raise TemplateError(
                f"template {name}: {error.message}; the example has the fields "
                f"{sorted(example)}{lacking}{hint}"
            ) from error
        except TemplateError as error:
            raise type(error)(f"template {name}: {error}") from error
        except TemplateSyntaxError as error:
            raise TemplateError(
                f"template {name}: {error.message} (line {error.lineno})"
            ) from error
        except SecurityError as error:
            raise TemplateError(f"template {name} is refused: {error}") from error
        except RecursionError as error:
            raise TemplateError(f"template {name} is nested too deep, or calls itself") from error
        except Exception as error:
            # A value of the template may be in the message.
            problem = f"{type(error).__name__}: {error}"[:1000]
            raise TemplateError(f"template {name}: {problem}") from error


def _read(source: str) -> tuple[Any, frozenset[str], bool]:
    """The compiled template, the fields that it names, and whether it may read all of them."""
    compiled = _environment.from_string(source.replace(SEPARATOR, _RENDERED_SEPARATOR))
    parsed = _environment.parse(source)
    tracking = TrackingCodeGenerator(_environment)
    tracking.optimizer = None  # it would compute constants
    tracking.visit(parsed)
    variables = tracking.undeclared_identifiers - _environment.globals.keys()
    lookups = [
        item.arg.value
        for item in parsed.find_all(nodes.Getitem)
        if getattr(item.node, "name", None) == ALL_FIELDS
        and isinstance(item.arg, nodes.Const)
        and isinstance(item.arg.value, str)
    ]
    # Any other use of `fields` may read all of them.
    uses = [name for name in parsed.find_all(nodes.Name) if name.name == ALL_FIELDS]
    return compiled, frozenset({*variables, *lookups}), len(uses) > len(lookups)


# Most of a server's classifiers have the same template.
_kept = lru_cache(256)(_read)


def _whole(rendered: str) -> str:
    try:
        rendered.encode()
    except UnicodeEncodeError as error:
        # An escape in a literal makes one, and no tokenizer takes it.
        raise TemplateError("it renders half a surrogate pair, which is no character") from error
    return rendered


def _context(example: Mapping[str, Any], answer_choices: Sequence[str]) -> dict[str, Any]:
    return {**example, ALL_FIELDS: dict(example), ANSWER_CHOICES: list(answer_choices)}
