"""Disks that are full, and folders that may not be written."""

from __future__ import annotations

import os
import resource
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.kills import result_of

NOBODY = 65534


@contextmanager
def full_disk(limit: int = 1000) -> Iterator[None]:
    """No file of this process may grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def readable_folder() -> Iterator[Path]:
    """A temporary folder that all users may read; pytest's are their owner's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def refused_where_read_only(folder: Path, work: Callable[[], Any]) -> OSError | ValueError:
    """What the work raises in a child that may read all in a folder, and write nothing."""

    def as_nobody() -> OSError | ValueError | None:
        # Nothing is forbidden to root.
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            work()
        except (OSError, ValueError) as error:
            return error
        return None

    paths = [folder, *folder.rglob("*")]
    modes = [stat.S_IMODE(path.stat().st_mode) for path in paths]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        error = result_of(as_nobody)
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)
    assert error is not None, "it was not refused"
    return error
