"""Texts and labels as callers give them, in lists, arrays and tables, as plain Python values."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import IA3Error, InvalidTypeError, counted, shown, warn_caller
from ..files.labelled_data import cut
from ..tfew.prompts.labels import Label, check_labels, check_text
from ..tfew.prompts.templates import Template

# The field of a text that is a string.
TEXT = "text"
# What a field may be besides text, lists and mappings.
_DATES = (datetime.date, datetime.time, datetime.timedelta, np.datetime64, np.timedelta64)
_NUMBERS = (int, float, Decimal, Fraction, np.integer, np.floating, np.bool_)
# What may be the labels of one text.
_SEVERAL = (list, tuple, set, frozenset, np.ndarray)
# Nobody nests a field's lists deeper, and one that holds itself has no end.
_DEEPEST = 10


def examples_of(texts: Any) -> list[Mapping[str, Any]]:
    """Every text as a mapping from field names to values, `[examples]`.

    Raises:
        InvalidTypeError: they are no list, or a text is neither a string nor a mapping.
        IA3Error: one is half of a surrogate pair; the message names the row.
    """
    return [example_of(text, f"text {row}") for row, text in enumerate(rows_of(texts))]


def example_of(text: Any, called: str) -> Mapping[str, Any]:
    """One text as `examples_of` has it; messages call it so."""
    if isinstance(text, str):
        check_text(text, called)
        return {TEXT: str(text)}
    if isinstance(text, Mapping):
        return text
    raise InvalidTypeError(
        f"{called} is {shown(text)} ({type(text).__name__}), expected a string or a mapping from "
        "field names to values"
    )


def rows_of(texts: Any) -> list[Any]:
    """The texts as a list of what was given; a row of a table is a mapping."""
    if hasattr(texts, "to_dict") and hasattr(texts, "columns"):
        texts = texts.to_dict("records")
    return _listed("texts", texts)


def key_of(example: Mapping[str, Any]) -> str:
    """The same for the same text, whatever the order of its fields."""
    return repr(sorted(map(repr, example.items())))


def texts_to_label(texts: Any) -> list[Mapping[str, Any]]:
    """As `examples_of`, but one text alone counts as a list of it."""
    return examples_of([texts] if isinstance(texts, str) else texts)


def cut_texts(examples: Sequence[Mapping[str, Any]], max_words: int) -> list[Mapping[str, Any]]:
    """The examples, each field cut to so many words, with one warning of all that are longer."""
    found: list[Mapping[str, Any]] = []
    longer = 0
    for example in examples:
        short = {
            name: cut(value, max_words)
            for name, value in example.items()
            if isinstance(value, str) and len(value) > max_words
        }
        is_cut = any(len(short[name]) < len(example[name]) for name in short)
        longer += is_cut
        found.append({**example, **short} if is_cut else example)
    if longer:
        warn_caller(
            f"{longer:,} of {counted(len(found), 'text')} {'has' if longer == 1 else 'have'} more "
            f"than {counted(max_words, 'word')}: the words after these are not read; a larger "
            "max_words has more read, and takes longer"
        )
    return found


def with_field(
    examples: Sequence[Mapping[str, Any]], fields: Sequence[str]
) -> list[Mapping[str, Any]]:
    """The examples as a classifier of these fields reads them: a string is its only field."""
    if len(fields) != 1 or fields[0] == TEXT:
        return list(examples)
    return [{fields[0]: e[TEXT]} if e.keys() == {TEXT} else e for e in examples]


def check_fields(
    examples: Sequence[Mapping[str, Any]],
    fields: Sequence[str],
    templates: Sequence[Template],
    rows: Sequence[int] | None = None,
    called: Callable[[int], str] = "text {}".format,
) -> None:
    """Raise `IA3Error` for what a template would write as it was not meant, naming the row.

    A field is text, a finite number, a date, or lists and mappings of these. None would be written
    as "None", and not a number as "nan". What no template reads may be anything, or missing.
    Messages count the examples, or name these `rows`; they are `called` so.
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
                    f"{called(row)} has no field {name!r}: it has {shown(list(example))}, expected "
                    f"{shown(list(fields))}"
                )
        for name, value in example.items():
            if read[name]:
                _check_field(value, f"{called(row)}: the field {name!r}", _DEEPEST)


def labels_of(labels: Any, choices: Iterable[Any] = ()) -> tuple[list[Label], list[Label]]:
    """The labels of rows, and those of `choices`, as plain strings, integers or booleans.

    A number that is whole counts as an integer, and a member of an enumeration as its value.

    Raises:
        IA3Error: a label is none of these, blank, of another kind than the first one, or has more
            than 64 bits; the message names the row.
    """
    of_rows = list(map(_plain, _listed("labels", _column(labels))))
    of_choices = list(map(_plain, choices))
    count = len(of_rows)

    def called(index: int) -> str:
        return f"label {index}" if index < count else f"label {index - count} of choices"

    for index, label in enumerate(of_rows):
        if isinstance(label, _SEVERAL):
            raise InvalidTypeError(
                f"label {index} is {shown(label)}, expected one label; for several labels a text, "
                "give multilabel=True"
            )
        if isinstance(label, float):
            raise IA3Error(
                f"label {index} is {shown(label)} (float), expected a string, an integer or a "
                "boolean: continuous numbers are no classes"
            )
    _check_labels([*of_rows, *of_choices], called)
    return of_rows, of_choices


def label_lists_of(labels: Any) -> list[list[Label]]:
    """The labels of each row, of which there may be any number; otherwise as `labels_of`.

    Raises:
        InvalidTypeError: a row is no list of labels.
        IA3Error: as of `labels_of`, or a row has a label twice.
    """
    if len(getattr(labels, "shape", ())) == 2:
        raise InvalidTypeError(
            f"labels is an array {list(labels.shape)}, expected a list of labels for each text: of "
            "zeros and ones, scikit-learn's MultiLabelBinarizer makes it by inverse_transform"
        )
    rows: list[list[Label]] = []
    for row, given in enumerate(_listed("labels", labels)):
        if not isinstance(given, _SEVERAL):
            raise InvalidTypeError(
                f"the labels of text {row} are {shown(given)}, expected a list, such as ['a', 'b'] "
                "or []"
            )
        rows.append(list(map(_plain, given)))
    places = [(row, label) for row, own in enumerate(rows) for label in own]
    _check_labels([label for _, label in places], lambda i: f"a label of text {places[i][0]}")
    for row, own in enumerate(rows):
        if len({*own}) < len(own):
            twice = next(label for label in own if own.count(label) > 1)
            raise IA3Error(f"text {row} has the label {twice!r} twice: give each label once")
    return rows


def _check_labels(labels: Sequence[Any], called: Callable[[int], str]) -> None:
    check_labels(labels, called)
    for index, label in enumerate(labels):
        if isinstance(label, str) and not label.strip():
            raise IA3Error(
                f"{called(index)} is {label!r}: leave out what has no label, or give it a name"
            )


def _column(labels: Any) -> Any:
    """What an array or a table of one column has in it."""
    if labels is None:
        # As scikit-learn has it, which looks for these words.
        raise InvalidTypeError(
            "labels is None: a classifier requires y to be passed, but the target y is None"
        )
    shape: tuple[int, ...] = getattr(labels, "shape", ())
    if len(shape) < 2:
        return labels
    if len(shape) > 2 or shape[1] != 1:
        raise InvalidTypeError(
            f"labels are {list(shape)}, expected one for each text; for several labels a text, "
            "give multilabel=True and lists of labels"
        )
    from sklearn.exceptions import DataConversionWarning

    message = (
        "A column-vector y was passed when a 1d array was expected: give y of shape [examples]"
    )
    warn_caller(message, category=DataConversionWarning)
    return labels[next(iter(labels.columns))] if hasattr(labels, "columns") else labels.reshape(-1)


def _listed(name: str, given: Any) -> list[Any]:
    # A set has another order in every process, and bytes are a sequence of integers.
    if isinstance(given, set | frozenset):
        kind = type(given).__name__
        raise InvalidTypeError(f"{name} is one {kind}, which has no order: give a list of {name}")
    if isinstance(given, str | bytes | bytearray | Mapping):
        kind = type(given).__name__
        raise InvalidTypeError(f"{name} is one {kind}, expected a list of {name}")
    try:
        # Of Arrow, whose rows are no mappings, and whose items are no texts.
        if hasattr(given, "to_pylist"):
            return list(given.to_pylist())
        if hasattr(given, "__array__") and not isinstance(given, Iterable):
            given = np.asarray(given)
        return list(given)
    except TypeError as error:
        what = f"{name} is {shown(given)} ({type(given).__name__})"
        raise InvalidTypeError(f"{what}, expected a list of {name}") from error


def _plain(label: Any) -> Any:
    """A label of numpy, torch or an enumeration as Python's; what is none stays as it is."""
    if isinstance(label, Enum):
        label = label.value
    numbers = (np.bool_, np.integer, np.floating)
    if isinstance(label, numbers) or (isinstance(label, Tensor) and not label.dim()):
        label = label.item()
    if isinstance(label, str):
        return str.__str__(label)
    if isinstance(label, bool):
        return label
    # A column of integers with a gap becomes one of floats, and stays so where the gap is closed.
    if isinstance(label, float) and label.is_integer():
        return int(label)
    return int.__int__(label) if isinstance(label, int) else label


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
