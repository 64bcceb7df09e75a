"""One state a call: what is active on a model does not change while a call of it runs.

`Adapters` says with `Calls.change` what is active from now on. A call reads that once, when it is
opened. What sites and copies of modules hold of it themselves (`active`) is right as long as
nothing has changed in a call; from then on they ask `seen`, until no call is open.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..errors import IA3Error
from .names import ATTRIBUTE

SINCE = (
    "since the call whose activations a checkpoint computes again: change that after the backward "
    "pass"
)

# Held while hooks or what they read are changed.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    # Else a process that is forked while another thread holds it would wait for that thread.
    os.register_at_fork(
        before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release
    )


@runtime_checkable
class Place(Protocol):
    """A site, or the copies of a module: what is active there differs from adapter to adapter."""

    active: Any
    _calls: Calls

    def hook(self, module: nn.Module) -> None:
        """Have what is active in any call applied to the module that this is on."""

    def settle(self) -> None:
        """Take off what `hook` has put on, if nothing is active now."""


@dataclass(frozen=True, eq=False)
class State:
    """What is active at the places of a model; never changed, but another one put in its place."""

    active: Mapping[Any, Any] = field(default_factory=dict)
    places: Sequence[tuple[nn.Module, Any]] = ()
    merged: frozenset[str] = frozenset()


@dataclass(eq=False)
class _Call:
    """What a thread or task is calling: the states of one model or several."""

    states: dict[Calls, State]
    before: _Call | None
    is_open: bool = True


_CURRENT: ContextVar[_Call | None] = ContextVar("ia3_calls", default=None)


class Calls:
    """The calls of one model: those that are open, and what the next one will see."""

    def __init__(self) -> None:
        # `None` in a copy, whose places are still to be found.
        self.now: State | None = State()
        # Whether places may hold something else than an open call has read.
        self.disturbed = False
        # Adding and discarding are atomic, so that calls wait for no lock.
        self._open: set[_Call] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy no call is open. It may be of one layer, which is not to take the model along.
        return {**vars(Calls()), "now": None}

    @contextmanager
    def opened(self, model: nn.Module) -> Iterator[None]:
        """Within the context all calls of the model in this thread or task are one call."""
        before = _current()
        if before is not None and self in before.states:
            yield
            return
        call = _Call({}, before)
        # First: from now on no hooks are taken away.
        self._open.add(call)
        call.states.update(before.states if before else {})
        call.states[self] = self.now or self._found(model)
        with _entered(call):
            yield

    def _found(self, model: nn.Module) -> State:
        with LOCK:
            if self.now is None:
                on = [(module, module._modules.get(ATTRIBUTE)) for module in model.modules()]
                places: list[tuple[nn.Module, Any]] = [
                    (module, place) for module, place in on if isinstance(place, Place)
                ]
                merged = {name for _, place in places for name in getattr(place, "merged", ())}
                active = {place: place.active for _, place in places if place.active}
                self.now = State(active, places, frozenset(merged))
            return self.now

    def change(self, state: State) -> None:
        """Have calls see another state: those to come, and those this is called in."""
        self.now = state
        call = _current()
        while call is not None:
            if self in call.states:
                call.states[self] = state
            call = call.before

    def settle(self) -> None:
        """Have the places hold nothing but what is active, unless a call is open."""
        if not self._open:
            self.disturbed = False
            for _, place in self.now.places if self.now else ():
                place.settle()

    def leave(self, call: _Call) -> None:
        self._open.discard(call)
        # Not waited for: who holds the lock may be waiting for this call. The next change settles.
        if self.disturbed and not self._open and LOCK.acquire(blocking=False):
            try:
                self.settle()
            finally:
                LOCK.release()

    def enter_again(self, call: _Call, state: State) -> None:
        """Open a call that sees what another one saw."""
        self._open.add(call)
        if state is self.now:
            return
        with LOCK:
            here = {place for _, place in self.now.places} if self.now else set()
            for place, active in state.active.items():
                names = (active,) if isinstance(active, str) else active
                gone = [name for name in names if place not in here or name not in place]
                if gone:
                    raise IA3Error(f"adapter {gone[0]!r} was deleted or unloaded {SINCE}")
            if self.now is None or state.merged != self.now.merged:
                raise IA3Error(f"adapters were merged or unmerged {SINCE}")
            self.disturbed = True
            for module, place in state.places:
                if state.active.get(place):
                    place.hook(module)


def _current() -> _Call | None:
    # A task that was started within a call may outlive it.
    call = _CURRENT.get()
    return call if call is not None and call.is_open else None


@contextmanager
def _entered(call: _Call) -> Iterator[None]:
    before = _CURRENT.get()
    _CURRENT.set(call)
    try:
        yield
    finally:
        call.is_open = False
        _CURRENT.set(before)
        for calls in call.states:
            calls.leave(call)


def states_now() -> Mapping[Calls, State]:
    """What the open calls of this thread or task see."""
    call = _current()
    return {} if call is None else dict(call.states)


@contextmanager
def seeing(states: Mapping[Calls, State]) -> Iterator[None]:
    """Within the context calls see these states, whatever is active by now."""
    if not states:
        yield
        return
    before = _current()
    call = _Call({**(before.states if before else {}), **states}, before)
    try:
        for calls, state in states.items():
            calls.enter_again(call, state)
    except BaseException:
        for calls in states:
            calls.leave(call)
        raise
    with _entered(call):
        yield


def seen(place: Place) -> Any:
    """What is active at a place that changed while calls were open, as this call sees it."""
    call = None if torch.compiler.is_compiling() else _current()
    state = None if call is None else call.states.get(place._calls)
    # What was put on the model since is nothing to an older call.
    return place.active if state is None else state.active.get(place)
