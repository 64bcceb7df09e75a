"""Locks between processes, on a file or a folder itself; they end with the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Descriptors of folders that this process holds.
_HELD: set[int] = set()


def _leave_to_the_parent() -> None:
    """A forked process holds nothing: it may live on when the one that does is killed."""
    while _HELD:
        os.close(_HELD.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_to_the_parent)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool | None]:
    """Hold a folder's lock within the context, where that can be: as `held`.

    Raises:
        FileNotFoundError: the folder is not there, or not any more when the lock is had.
    """
    descriptor = None
    with suppress(PermissionError):
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    if descriptor is None:
        yield None
        return
    _HELD.add(descriptor)
    try:
        with held(descriptor, wait=wait) as is_held:
            if is_held and not os.path.samestat(os.fstat(descriptor), folder.stat()):
                raise FileNotFoundError(f"{folder} is another folder now")
            yield is_held
    finally:
        if descriptor in _HELD:
            _HELD.remove(descriptor)
            os.close(descriptor)


@contextmanager
def held(descriptor: int, *, wait: bool = True) -> Iterator[bool | None]:
    """Hold the lock of an open file or folder within the context, and say whether.

    False where another holds it; `None` where there are no locks, as a network's file system may
    have none: writers are then not told apart, and nothing is known to be a dead one's.
    """
    if fcntl is None:
        yield None
        return
    process = os.getpid()
    is_held: bool | None = None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        is_held = True
    except BlockingIOError:
        is_held = False
    except OSError:
        pass
    try:
        yield is_held
    finally:
        # Not only closed: a process that was forked meanwhile may have the file too.
        if is_held and os.getpid() == process:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
