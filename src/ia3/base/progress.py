"""What long work is being done, told to whoever shows it.

What loads a model or reads texts does not know whether there is a terminal. The command line says
once what is to show it; without that, nothing is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

# From what is done, and how many parts it has, if that is known, to what counts those done since.
Show = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]

_show: ContextVar[Show | None] = ContextVar("show", default=None)


@contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Have this show the work that is done in this thread meanwhile."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)


@contextmanager
def working(what: str, parts: int | None = None) -> Iterator[Callable[[int], None]]:
    """Say that work begins which may take seconds; yields what is told how many parts are done."""
    show = _show.get()
    if show is None:
        yield lambda done: None
        return
    with show(what, parts) as count:
        yield count
