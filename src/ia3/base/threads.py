"""How many threads a training step is computed with: one or all, whichever is faster now.

Beside another busy process, two threads that wait for each other take 15 times as long as one. So
steps are timed. A count changes the last bits of sums, and determinism is for a given count.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import median
from threading import Lock, Thread
from typing import Self, TypeVar

import torch

from ..arguments import whole
from .processes import on_this_machine

T = TypeVar("T")

# A step that takes so many times what the last ones took has both counts timed again.
SLOWER = 3.0
LAST_STEPS = 5
# `anew` of a process that serves: what else the machine does comes and goes.
OFTEN = 30.0

_setting = Lock()


def _renew_lock() -> None:
    global _setting
    _setting = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Threads:
    """Runs steps, times some of them, and sets torch's number of threads before each.

    The first step is not compared, as it also warms up; the second one has one thread, the third
    has all. The context restores the number that was set before.

    Args:
        fixed: this number whatever the steps take, 1 or more; by default one or all, which is this
            process's share where several of one job are on the machine.
        anew: after so many seconds both are timed again: for a process that runs on while others
            come and go. By default only a step that takes much longer has that done.

    Attributes:
        count: the number of threads of the next step.

    Raises:
        InvalidTypeError: `fixed` is no whole number.
        IA3Error: it is below 1.

    Example:
        >>> with Threads(fixed=1) as threads:
        ...     threads.step(torch.get_num_threads)
        1
    """

    def __init__(self, fixed: int | None = None, *, anew: float = math.inf) -> None:
        if fixed is not None:
            fixed = whole("threads", fixed, 1, expected="at least 1")
        self._fixed = fixed
        self._anew = anew
        self._compared = time.monotonic()
        self._before = torch.get_num_threads()
        self._most = most_threads()
        self.count = fixed or 1
        # Counts of the steps that are still to be timed, and what the timed ones took.
        self._plan: deque[int] = deque([1, 1, self._most])
        self._timed: dict[int, float] = {}
        self._last: deque[float] = deque(maxlen=LAST_STEPS)

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        return self

    def __exit__(self, *error: object) -> None:
        _set_here(self._before)

    def step(self, function: Callable[[], T], size: float = 1.0) -> T:
        """Call a function that computes a step, or a part of one, of some number of tokens.

        Without any it counts as of one: empty texts need not have tokens.
        """
        if torch.get_num_threads() != self.count:
            _set_here(self.count)
        began = time.perf_counter()
        result = function()
        self.took((time.perf_counter() - began) / max(size, 1))
        return result

    def took(self, seconds: float) -> None:
        """Decide the next step's number by the seconds of this one, per token or another unit."""
        if self._fixed is not None or self._most == 1:
            return
        if self._plan:
            self._timed[self._plan.popleft()] = seconds
            if self._plan:
                self.count = self._plan[0]
                return
            self.count = min(self._timed, key=self._timed.__getitem__)
            self._last = deque([self._timed[self.count]], maxlen=LAST_STEPS)
            self._compared = time.monotonic()
        elif self._last and (seconds > SLOWER * median(self._last) or self._is_old()):
            self._plan.extend([1, self._most])
            self.count = 1
        else:
            self._last.append(seconds)

    def _is_old(self) -> bool:
        return time.monotonic() - self._compared > self._anew

    def keep(self, count: int) -> None:
        """Go on with the number that an earlier part of the run chose, if this machine has it."""
        if self._fixed is None and count in (1, self._most):
            self.count = count
            self._plan.clear()


def most_threads() -> int:
    """How many threads a process may compute with, beside the others of its job."""
    if on_this_machine() == 1:
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(torch.get_num_threads(), (cores or 1) // on_this_machine()))


def _set_here(count: int) -> None:
    """Set the number of this thread alone.

    Each thread has its own, and one that is new the last that any other was given: beside a fit,
    it would have the fit's, and keep it.
    """
    try:
        with _setting:
            of_new = _in_new_thread(torch.get_num_threads)
            torch.set_num_threads(count)
            if of_new != count:
                _in_new_thread(partial(torch.set_num_threads, of_new))
    except BaseException:  # Ctrl-C, which may come at the end of a fit
        torch.set_num_threads(count)
        raise


def _in_new_thread(function: Callable[[], T]) -> T:
    found: list[T] = []
    thread = Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]
