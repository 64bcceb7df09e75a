"""Work of forked children, which have everything loaded, and are killed at any moment."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

# Calls that may change a file; a process is killed before one of them, so in every gap between two.
CHANGING = {
    *("open", "write", "writelines", "truncate", "ftruncate", "flush", "close", "__exit__"),
    *("fsync", "rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir"),
    "flock",
}
MODULES = {"posix", "fcntl", "_io", "io"}

Work = Callable[[], Any]


def result_of(work: Work) -> Any:
    """What the work returns in a child; an `AssertionError` with its traceback where it raises."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            said = pickle.dumps((True, work()))
        except BaseException:
            said = pickle.dumps((False, traceback.format_exc()))
        with open(writing, "wb") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    done, result = pickle.loads(said)
    assert done, result
    return result


def started(work: Work) -> int:
    """The process id of a child that does the work; `ended` tells how it went."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """0 where a child did its work, 1 where that raised, -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def calls_of(work: Work) -> int:
    """How many calls that may change a file the work makes."""

    def count() -> int:
        counter = _Counter(None)
        sys.setprofile(counter)
        try:
            work()
        finally:
            sys.setprofile(None)
        return counter.calls

    calls: int = result_of(count)
    return calls


def killed_before(call: int, work: Work) -> bool:
    """Do the work in a child that is killed before the call of this number, counted from 1.

    Returns:
        Whether it was killed; else it had done its work before.
    """

    def die() -> None:
        sys.setprofile(_Counter(call))
        work()
        sys.setprofile(None)

    return _was_killed(started(die))


def moments(work: Work) -> Iterator[int]:
    """Kill work before each of its calls, one after the other; the caller looks at what is left."""
    for call in itertools.count(1):
        if not killed_before(call, work):
            return
        yield call


def killed_after(seconds: float, work: Work) -> bool:
    """Do the work in a child that is killed after so much time; returns as `killed_before`."""
    reading, writing = os.pipe()

    def begin() -> None:
        os.write(writing, b"!")
        work()

    pid = started(begin)
    try:
        os.read(reading, 1)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    finally:
        os.close(reading)
        os.close(writing)
    return _was_killed(pid)


def _was_killed(pid: int) -> bool:
    code = ended(pid)
    assert code in (0, -signal.SIGKILL), f"the work failed with code {code} before it was killed"
    return code != 0


class _Counter:
    """As a profiler: counts calls, and ends the process before the one of this number."""

    def __init__(self, last: int | None) -> None:
        self.calls = 0
        self.last = last

    def __call__(self, frame: object, event: str, called: Any) -> None:
        if event != "c_call" or getattr(called, "__name__", None) not in CHANGING:
            return
        own = getattr(called, "__self__", None)
        if getattr(called, "__module__", None) in MODULES or isinstance(own, io.IOBase):
            self.calls += 1
            if self.calls == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
