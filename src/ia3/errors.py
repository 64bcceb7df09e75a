"""What this package raises: one base class, and a kind for each thing that a caller may do next.

A kind derives also from what PEFT, scikit-learn or Python raise there, so that code written for
them catches it. A disk that is full or may not be written stays an `OSError`.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

# Names that a message may suggest.
LONGEST_COMPARED = 100
MOST_COMPARED = 1000


class IA3Error(ValueError):
    """Bad input: the message names the value, what was expected and the likely fix."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle would make it anew of its message, which some kinds make of other arguments.
        reduced: Any = super().__reduce__()
        return (_pickled, (type(self), reduced[1]), *reduced[2:])


def _pickled(kind: type[IA3Error], args: tuple[Any, ...]) -> IA3Error:
    return kind.__new__(kind, *args)


class BrokenFileError(IA3Error):
    """A file's content is not what it has to be: cut short, damaged, malformed or refused."""


class MissingFileError(IA3Error, FileNotFoundError):
    """A file or folder is not there."""


class NotAFolderError(IA3Error, NotADirectoryError):
    """A file is where a folder was to be written."""


class UnknownNameError(IA3Error, KeyError):
    """No adapter, row, task or kind of adapter has this name."""

    # A KeyError would show its message in quotes.
    __str__ = Exception.__str__


class InvalidTypeError(IA3Error, TypeError):
    """An argument is of another type than expected, or there is no such argument."""


class StateError(IA3Error, RuntimeError):
    """The call makes sense, but not now: adapters are merged, a route is on, ..."""


class MismatchError(IA3Error, RuntimeError):
    """Tensors do not fit the model: their names or shapes are others."""


class NoMatchingPeftModuleError(IA3Error):
    """An entry of a config matches no module of the model."""


class MissingExtraError(IA3Error, ImportError):
    """An optional dependency is absent: the message says how to install it.

    It comes with an extra, or is a package that `install` installs.
    """

    def __init__(
        self, package: str, extra: str, purpose: str, *, install: str | None = None
    ) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: "
            + (install or f"pip install 'ia3[{extra}]'")
        )


def shown(value: object, longest: int = 200) -> str:
    """A value for a message, whatever it is: it may be long, hold itself or be nested without end.

    Python refuses to write a number of 5,000 digits.
    """
    try:
        text = _SHORT.repr(value)
    except Exception:  # of any class, with a `__repr__` of its own
        if isinstance(value, int):
            return f"an integer of {value.bit_length()} bits"
        return f"a {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]}..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 20


def counted(count: int, one: str, several: str | None = None) -> str:
    """A number of things: "1 text", "2 texts", "1,000 classes"."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`"; did you mean 'wo'?"` for the nearest known name, or an empty string."""
    # Comparing takes the product of two lengths: names from files may be long, and many.
    asked = name if isinstance(name, str) else shown(name)
    if len(asked) > LONGEST_COMPARED:
        return ""
    short = [each for each in islice(known, MOST_COMPARED) if len(each) <= LONGEST_COMPARED]
    close = difflib.get_close_matches(asked, short, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Within the context, a missing file's error and an `IA3Error` begin with where they are."""
    try:
        yield
    except IA3Error as error:
        error.args = (f"{where}: {error}",)  # it stays of its kind
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{where}: {error}") from error


def warn_caller(
    message: str,
    between: Sequence[str] = (),
    category: type[Warning] = UserWarning,
    *,
    once: bool = False,
) -> None:
    """Give a warning at the line that led into this package, and the packages `between`.

    With `once`, a line that called those packages is warned once, however often they come here.
    """
    own = __name__.partition(".")[0]
    frame, level, passed = sys._getframe(), 1, False
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in (own, "contextlib", *between):
            break
        passed = passed or package in between
        frame, level = frame.f_back, level + 1
    if once and passed:
        # joblib has Python forget what it has shown already.
        call = message, id(frame), frame.f_lasti
        if call == getattr(_last, "call", None):
            return
        _last.call = call
    warnings.warn(message, category, stacklevel=level)


_last = threading.local()


def warn_ignored(names: Iterable[str], known: Collection[str]) -> None:
    """Warn of each argument that is not `known`.

    PEFT takes any and passes over what it does not know, so that they are no error; but one of them
    may be a slip of the pen.
    """
    for name in sorted(set(names).difference(known)):
        hint = did_you_mean(name, known)
        warn_caller(f"argument {name!r} means nothing for an adapter and is ignored{hint}")


def check_methods(methods: Sequence[str], known: Sequence[str]) -> None:
    """Raise `IA3Error` where there are no methods, or one is unknown."""
    if not methods:
        raise IA3Error(f"there are no methods: expected some of {', '.join(known)}")
    for method in methods:
        if method not in known:
            raise IA3Error(
                f"no method {method!r}: expected some of {', '.join(known)}"
                f"{did_you_mean(method, known)}"
            )
