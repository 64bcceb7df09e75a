"""Texts and labels as callers give them, in lists, arrays and tables, as plain Python values."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import IA3Error, InvalidTypeError, shown
from ..tfew.prompts.labels import Label, check_labels, check_text
from ..tfew.prompts.templates import Template

# The field of a text that is a string.
TEXT = "text"
# What a field may be besides text, lists and mappings.
_DATES = (datetime.date, datetime.time, datetime.timedelta, np.datetime64, np.timedelta64)
_NUMBERS = (int, float, Decimal, Fraction, np.integer, np.floating, np.bool_)
# Nobody nests a field's lists deeper, and one that holds itself has no end.
_DEEPEST = 10


def examples_of(texts: Any) -> list[Mapping[str, Any]]:
    """Every text as a mapping from field names to values, `[examples]`.

    Raises:
        IA3Error: there are none, a text is neither a string nor a mapping, or is half of a
            surrogate pair; the message names the row.
    """
    if hasattr(texts, "to_dict") and hasattr(texts, "columns"):
        texts = texts.to_dict("records")
    examples: list[Mapping[str, Any]] = []
    for row, text in enumerate(_listed("texts", texts)):
        if isinstance(text, str):
            check_text(text, f"text {row}")
            examples.append({TEXT: str(text)})
        elif isinstance(text, Mapping):
            examples.append(text)
        else:
            raise InvalidTypeError(
                f"text {row} is {shown(text)} ({type(text).__name__}), expected a string or a "
                "mapping from field names to values"
            )
    if not examples:
        raise IA3Error("there are no texts: expected at least one")
    return examples


def check_fields(
    examples: Sequence[Mapping[str, Any]],
    fields: Sequence[str],
    templates: Sequence[Template],
    rows: Sequence[int] | None = None,
) -> None:
    """Raise `IA3Error` for what a template would write as it was not meant, naming the row.

    A field is text, a finite number, a date, or lists and mappings of these. None would be written
    as "None", and not a number as "nan". What no template reads may be anything, or missing.
    Messages count the examples, or name these `rows`.
    """
    for name in fields:
        if not isinstance(name, str):
            kind = type(name).__name__
            raise InvalidTypeError(f"a field's name is {name!r} ({kind}), expected a string")
        check_text(name, "a field's name")
    names = {name for example in examples for name in example}
    read = {name: any(template.reads(name) for template in templates) for name in names}
    for row, example in zip(rows or range(len(examples)), examples, strict=True):
        for name in fields:
            if name not in example and any(template.reads(name) for template in templates):
                raise IA3Error(
                    f"text {row} has no field {name!r}: it has {shown(list(example))}, expected "
                    f"{shown(list(fields))}"
                )
        for name, value in example.items():
            if read[name]:
                _check_field(value, f"text {row}: the field {name!r}", _DEEPEST)


def labels_of(labels: Any, choices: Iterable[Any] = ()) -> tuple[list[Label], list[Label]]:
    """The labels of rows, and those of `choices`, as plain strings, integers or booleans.

    Raises:
        IA3Error: a label is none of these, blank, of another kind than the first one, or has more
            than 64 bits; the message names the row.
    """
    of_rows = list(map(_plain, _listed("labels", labels)))
    of_choices = list(map(_plain, choices))
    count = len(of_rows)

    def called(index: int) -> str:
        return f"label {index}" if index < count else f"label {index - count} of choices"

    both = [*of_rows, *of_choices]
    check_labels(both, called)
    for index, label in enumerate(both):
        if isinstance(label, str) and not label.strip():
            raise IA3Error(
                f"{called(index)} is {label!r}: leave out what has no label, or give it a name"
            )
    return of_rows, of_choices


def _listed(name: str, given: Any) -> list[Any]:
    # Bytes are a sequence of integers, and a set has another order in every process.
    if isinstance(given, str | bytes | bytearray | Mapping | set | frozenset):
        kind = type(given).__name__
        raise InvalidTypeError(f"{name} is one {kind}, expected a list of {name}")
    try:
        # Of Arrow, whose rows are no mappings, and whose items are no texts.
        return list(given.to_pylist() if hasattr(given, "to_pylist") else given)
    except TypeError as error:
        what = f"{name} is {shown(given)} ({type(given).__name__})"
        raise InvalidTypeError(f"{what}, expected a list of {name}") from error


def _plain(label: Any) -> Any:
    """A label of numpy or torch, or of an enumeration, as Python's."""
    if isinstance(label, str):
        return str.__str__(label)
    if isinstance(label, np.bool_ | np.integer) or (isinstance(label, Tensor) and not label.dim()):
        return label.item()
    return label if isinstance(label, bool) or not isinstance(label, int) else int.__int__(label)


def _check_field(value: Any, called: str, depth: int) -> None:
    if isinstance(value, str):
        check_text(value, called)
    elif isinstance(value, Mapping):
        for key, item in _within(value.items(), called, depth):
            _check_field(key, called, depth - 1)
            _check_field(item, called, depth - 1)
    elif isinstance(value, list | tuple | np.ndarray):
        for item in _within(value, called, depth):
            _check_field(item, called, depth - 1)
    elif not _is_number_or_date(value):
        kind = type(value).__name__
        raise IA3Error(
            f"{called} is {shown(value)} ({kind}), expected a text, a finite number or a date; "
            "write '' for what is missing, or leave the row out"
        )


def _within(items: Iterable[Any], called: str, depth: int) -> Iterable[Any]:
    if not depth:
        raise IA3Error(f"{called} is nested deeper than {_DEEPEST} times")
    return items


def _is_number_or_date(value: Any) -> bool:
    if isinstance(value, Decimal):
        return value.is_finite()
    if isinstance(value, _DATES):
        # Not a time, of numpy and of pandas, is no equal of itself.
        return bool(value == value)
    if isinstance(value, float | np.floating):
        return math.isfinite(value)
    return isinstance(value, _NUMBERS)
