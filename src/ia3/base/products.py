"""Float32 products by oneDNN where they are as exact as torch's own, and more than twice as fast.

By default torch takes float32 products to MKL, which leaves out AVX-512 on processors that are not
Intel's. oneDNN is asked for by a precision setting of torch that allows bfloat16: processors with
AMX make use of that, others compute in float32 all the same. A product tried out tells which.

Both settings here are the process's: other threads' products may be rounded otherwise meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Condition, Lock, local
from typing import Any

import torch

# The error of a float32 product that both sum otherwise is 1e-6, that of bfloat16 1e-3.
TOLERANCE = 1e-5
UNSET = "none"
# In seconds: a thread holds a setting for one pass through a model.
LONGEST_WAIT = 60.0

_matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@contextmanager
def fast_products() -> Iterator[None]:
    """Within the context, float32 products on the CPU are oneDNN's, where these are exact.

    What was set in `torch.backends.mkldnn.matmul.fp32_precision` before stays.
    """
    with _precision.held():
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within the context, attention on the CPU is plain products, not torch's fused kernel.

    For short rows, oneDNN's products take half the time, the backward pass included. Each layer
    keeps its weights `[rows, heads, length, length]` for that.
    """
    with _fused_attention.held():
        yield


@contextmanager
def steady_attention() -> Iterator[None]:
    """Within the context, no other thread changes how attention is computed.

    For what is computed again in a backward pass, which has to be computed as the first time. It is
    torch's fused kernel, whose memory does not grow with the square of the length.
    """
    with _fused_attention.steady():
        yield


class _Held:
    """A setting that is another one while any thread is in its context."""

    def __init__(
        self, read: Callable[[], Any], write: Callable[[Any], None], usual: Any, held: Any
    ) -> None:
        self._read, self._write, self._usual, self._held = read, write, usual, held
        self._inside = self._steady = 0
        self._own = local()  # how often this thread is inside
        self._changed = Condition(Lock())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the setting, unless something else than usual was set before."""
        with self._changed:
            usual = self._inside > 0 or self._read() == self._usual
            applies = usual and not self._steady
            if applies:
                self._count(1)
                self._write(self._held)
        try:
            yield
        finally:
            if applies:
                with self._changed:
                    self._count(-1)
                    # What a callback or another thread has set meanwhile stays.
                    if self._inside == 0 and self._read() == self._held:
                        self._write(self._usual)
                    self._changed.notify_all()

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Have no other thread hold the setting: wait until they leave, and let none enter."""
        with self._changed:
            self._steady += 1
            own = getattr(self._own, "inside", 0)
            self._changed.wait_for(lambda: self._inside <= own, LONGEST_WAIT)
        try:
            yield
        finally:
            with self._changed:
                # Where a process was forked off meanwhile, it is 0 there already.
                self._steady = max(0, self._steady - 1)

    def _count(self, change: int) -> None:
        self._inside += change
        self._own.inside = getattr(self._own, "inside", 0) + change

    def forget_threads(self) -> None:
        """Hold it for this thread alone, in a process that was forked off."""
        self._changed = Condition(Lock())
        self._inside, self._steady = getattr(self._own, "inside", 0), 0
        if self._inside == 0 and self._read() == self._held:
            self._write(self._usual)


def _set_precision(value: str) -> None:
    if value == UNSET or _is_exact():
        _matmul.fp32_precision = value


_precision = _Held(lambda: _matmul.fp32_precision, _set_precision, UNSET, "bf16")
_fused_attention = _Held(
    torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, True, False
)

if hasattr(os, "register_at_fork"):
    for _each in (_precision, _fused_attention):
        os.register_at_fork(after_in_child=_each.forget_threads)


@cache
def _is_exact() -> bool:
    """Whether oneDNN's products are of float32 on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    _matmul.fp32_precision = "bf16"
    try:
        return error_of_products() <= TOLERANCE
    finally:
        _matmul.fp32_precision = UNSET


def error_of_products() -> float:
    """How far a product is off now, relative to its largest value.

    It is of random signs: where sums nearly cancel out, float32's own rounding is as large as that.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    options: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    left, right = torch.randn(2, 64, 64, **options)
    expected = left.double() @ right.double()
    return float((left @ right - expected).abs().max() / expected.abs().max())
