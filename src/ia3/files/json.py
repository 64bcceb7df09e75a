"""JSON from anywhere, as plain data that can be written again."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from ..errors import BrokenFileError, IA3Error

# Nobody writes deeper ones; code that walks the data has a stack of its own.
DEEPEST = 100
_CHECKED = {str, list, dict}


def parse_json(content: str | bytes, where: str) -> Any:
    """What JSON holds; `where` it is from begins the message.

    Python's parser takes more than the standard has: `NaN`, numbers that become infinite, and half
    of a surrogate pair. It raises four kinds of errors for what it does not take.

    Raises:
        BrokenFileError: it is not JSON, or not UTF-8, or nested deeper than 100 times.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        _check(value, DEEPEST)
        return value
    except RecursionError as error:
        raise BrokenFileError(f"{where}: nested deeper than {DEEPEST} times") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise BrokenFileError(f"{where} is not JSON: {error.msg} ({at})") from error
    except UnicodeDecodeError as error:
        raise BrokenFileError(f"{where} is not JSON: {error}") from error
    except ValueError as error:
        raise BrokenFileError(f"{where}: {error}") from error


def parse_object(content: str | bytes, where: str) -> dict[str, Any]:
    """What a JSON object holds; raises as `parse_json`, and where it is none."""
    value = parse_json(content, where)
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise BrokenFileError(f"{where}: holds {kind}, expected a JSON object")
    return value


def check_plain(value: Any, what: str) -> None:
    """Raise `IA3Error` for what JSON cannot hold, or would be refused when it is read again."""
    if value is None or (isinstance(value, str) and value.isascii()):
        return
    try:
        json.dumps(value, allow_nan=False)
        _check(value, DEEPEST)
    except RecursionError as error:
        raise IA3Error(f"{what} is nested deeper than {DEEPEST} times") from error
    except (TypeError, ValueError) as error:
        raise IA3Error(f"{what} cannot be written as JSON: {error}") from error


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON: write null, or a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is larger than any floating-point number")
    return value


def _check(value: Any, depth: int) -> None:
    # Most of what there is are numbers, which are passed over without a call.
    kind = type(value)
    if kind is str:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError("half a surrogate pair, which is no character") from error
    elif kind is list or kind is dict:
        if not depth:
            raise RecursionError
        if kind is dict:
            _check([*value], depth)
            value = value.values()
        for item in value:
            if type(item) in _CHECKED:
                _check(item, depth - 1)
