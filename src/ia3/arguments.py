"""Arguments of public functions, checked where they come in and before anything is done.

Each function gives back the argument, or raises an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from .errors import IA3Error, InvalidTypeError, NotAFolderError, shown

T = TypeVar("T")

# What torch and numpy count with.
LARGEST = 2**63 - 1
# In bytes, on the file systems that there are; others refuse a name themselves.
LONGEST_NAME = 255
LONGEST_PATH = 4095


def instance(name: str, value: object, kind: type[T] | tuple[type[T], ...], expected: str) -> T:
    """A value of a kind, e.g. a model."""
    if not isinstance(value, kind):
        raise InvalidTypeError(f"{name} is {shown(value)}, expected {expected}")
    return value


def listed(name: str, values: Any, expected: str) -> list[Any]:
    """What a list, or another collection, has in it. A text is none."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InvalidTypeError(f"{name} is {shown(values)}, expected {expected}")
    return list(values)


def flag(name: str, value: Any) -> bool:
    """Whether a value is true. Few are neither: a tensor of several values is."""
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTypeError(f"{name} is {shown(value)}, expected True or False") from error


def whole(
    name: str, value: Any, least: int = 0, most: int = LARGEST, expected: str | None = None
) -> int:
    """A whole number in a range."""
    expected = expected or f"a whole number, at least {least}"
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InvalidTypeError(f"{name} is {shown(value)}, expected {expected}")
    if not least <= int(value) <= most:
        raise IA3Error(f"{name} is {shown(value)}, expected {expected}")
    return int(value)


def number(name: str, value: Any, expected: str) -> float:
    """A number that a float can hold; its range is the caller's to check."""
    if not isinstance(value, Real):
        raise InvalidTypeError(f"{name} is {shown(value)}, expected {expected}")
    try:
        return float(value)
    except OverflowError as error:
        raise IA3Error(f"{name} is {shown(value)}, expected {expected}") from error


def check_callable(name: str, value: object) -> None:
    """Something to call, or None for nothing."""
    if value is not None and not callable(value):
        raise InvalidTypeError(f"{name} is {shown(value)}, expected a function")


def folder_of(name: str, value: Any) -> Path:
    """The path of a folder to write into, which need not be there."""
    path = path_of(name, value)
    if path.exists() and not path.is_dir():
        raise NotAFolderError(f"{name} is {shown(str(path))}, which is not a folder")
    return path


def path_of(name: str, value: Any) -> Path:
    """The path of a file or a folder, which need not be there."""
    expected = "expected the path of a file or folder"
    if not isinstance(value, str | os.PathLike):
        raise InvalidTypeError(f"{name} is {shown(value)}, {expected}")
    path = Path(value)
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise IA3Error(f"{name} is {shown(value)}, {expected}: it is no text") from error
    if b"\0" in encoded:
        raise IA3Error(f"{name} is {shown(value)}, {expected}: it has a null byte")
    if len(encoded) > LONGEST_PATH or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
        raise IA3Error(f"{name} is {shown(value)}, {expected}: no file has so long a name")
    return path
