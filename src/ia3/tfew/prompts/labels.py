"""Texts and labels as a user gives them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import IA3Error, shown

Text = str | Mapping[str, Any]
Label = str | int | bool


def readable(label: Label) -> str:
    """A label's name as words: `card_arrival` and `cardArrival` are "card arrival"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", str(label))
    if words != str(label):
        words = words.lower()
    return " ".join(words.replace("_", " ").split()) or str(label)


def are_words(labels: Sequence[Label]) -> bool:
    """Whether labels say what they mean: not where any is a number or a truth value."""
    return not any(type(label) is bool or _is_number(label) for label in labels)


def _is_number(label: Label) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def check_labels(labels: Sequence[Any], called: Callable[[int], str]) -> None:
    """Raise `IA3Error` where these cannot be classes, as the first one that cannot is `called`.

    Labels are of one kind: numpy would make strings of numbers beside strings, and True equals 1.
    It would also make floating-point numbers of integers that 64 bits do not hold, and drop a NUL
    at a text's end.
    """
    for index, label in enumerate(labels):
        what = f"{called(index)} is {shown(label)}"
        if type(label) not in (str, int, bool):
            kind = type(label).__name__
            raise IA3Error(f"{what} ({kind}), expected a string, an integer or a boolean")
        if type(label) is not type(labels[0]):
            first = f"{called(0)} is {shown(labels[0])}"
            raise IA3Error(f"{what}, but {first}: expected labels of one kind")
        if isinstance(label, str):
            check_text(label, called(index))
            if "\0" in label:
                raise IA3Error(f"{what}, which has a NUL: numpy would drop one at the end")
        elif not -(2**63) <= label < 2**63:
            raise IA3Error(f"{what}, expected an integer of 64 bits, -2**63 to 2**63 - 1")


def check_text(text: str, called: str) -> None:
    """Raise `IA3Error` for half of a surrogate pair: no file and no tokenizer takes it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise IA3Error(
            f"{called} is {shown(text)}: character {error.start} is half of a surrogate pair, "
            "which stands for nothing; decode the text with errors='replace'"
        ) from error
