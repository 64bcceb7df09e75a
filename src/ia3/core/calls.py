"""One state a call: what is active on a model does not change while a call of it runs.

`Adapters` says with `Calls.change` what is active from now on. A call reads that once, when it is
opened. What sites and copies of modules hold of it themselves (`active`) is right as long as
nothing has changed in a call; from then on they ask `seen`, until no call is open. What is deleted
or written over meanwhile is `kept` for the calls that began with it. What cannot be kept, as
weights that are merged, is changed while no call is running: see `alone`.
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..errors import StateError
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


@contextmanager
def changing() -> Iterator[None]:
    """Hold the lock for a change that Ctrl-C does not break off: it interrupts after it.

    So a handler's exception leaves the model from before or after the change. The lock is free by
    then: a handler may wait for other threads.
    """
    handler: Any = None
    put_off = _PutOff()
    try:
        with LOCK:
            handler = signal.getsignal(signal.SIGINT)
            if not callable(handler) or isinstance(handler, _PutOff) or not put_off.takes_over():
                yield
                return
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, handler)
    finally:
        if put_off.signals:
            handler(*put_off.signals[0])


class _PutOff:
    """A signal handler that only takes down what has come."""

    def __init__(self) -> None:
        self.signals: list[tuple[int, Any]] = []

    def takes_over(self) -> bool:
        """Have Ctrl-C come here, if it comes to this thread: to the first interpreter's main one.

        A program that embeds Python may have imported `threading`, which names a main thread too,
        in another.
        """
        try:
            signal.signal(signal.SIGINT, self)
        except ValueError:
            return False
        return True

    def __call__(self, number: int, frame: Any) -> None:
        self.signals.append((number, frame))


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
    """What is active at the places of a model; another one is put in its place for a change."""

    active: Mapping[Any, Any] = field(default_factory=dict)
    places: Sequence[tuple[nn.Module, Any]] = ()
    merged: frozenset[str] = frozenset()
    # (place, adapter) -> what it was there, where it is another by now, or gone.
    kept: dict[tuple[Any, str], Any] = field(default_factory=dict)


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
        # Whether calls that begin now wait for the lock.
        self._closed = False
        # What waits for calls to end, and these.
        self._later: list[tuple[set[_Call], Callable[[], None]]] = []
        _all.add(self)

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy no call is open. It may be of one layer, which is not to take the model along.
        return {**vars(Calls()), "now": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _all.add(self)

    @contextmanager
    def opened(self, model: nn.Module) -> Iterator[None]:
        """Within the context all calls of the model in this thread or task are one call."""
        before = _current()
        if before is not None and self in before.states:
            yield
            return
        call = _Call({}, before)
        with _entered(call, (self,)):
            # First: from now on no hooks are taken away.
            self._open.add(call)
            if self._closed:
                self._open.discard(call)
                with LOCK:
                    self._open.add(call)
            call.states.update(before.states if before else {})
            call.states[self] = self.now or self._found(model)
            yield

    def is_called_elsewhere(self) -> bool:
        """Whether another thread or task is in a call."""
        return not self._open <= _own()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within the context no call begins, but in this thread; the caller holds the lock."""
        before, self._closed = self._closed, True
        try:
            yield
        finally:
            self._closed = before

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Within the context no call is running but this thread's; the caller holds the lock.

        It is not waited for: who runs one may be waiting for this thread.

        Raises:
            StateError: there is one.
        """
        with self.closed():
            if self.is_called_elsewhere():
                raise StateError(
                    f"{what}: another thread or task is calling this model, and would compute with "
                    "a part of the change; do it when no call is running"
                )
            yield

    def keep(self, values: Mapping[tuple[Any, str], Any]) -> None:
        """Have calls that are open go on with these: (place, adapter) -> what it is there now.

        Call it before these are changed or removed.
        """
        self.disturbed = True
        states = {id(call.states.get(self)): call.states.get(self) for call in list(self._open)}
        for state in (*states.values(), self.now):
            if state is not None:
                for key, value in values.items():
                    state.kept.setdefault(key, value)

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
        self._do_due()
        if not self._open:
            self.disturbed = False
            for _, place in self.now.places if self.now else ():
                place.settle()

    def later(self, action: Callable[[], None]) -> None:
        """Do it when the calls that other threads are in have ended; the caller holds the lock."""
        calls = self._open - _own()
        if calls:
            self.disturbed = True
            self._later.append((calls, action))
        else:
            action()

    def _do_due(self) -> None:
        # Not when no call is open: where calls overlap without end, that is never.
        waiting, self._later = self._later, []
        for calls, action in waiting:
            if calls & self._open:
                self._later.append((calls, action))
            else:
                action()

    def leave(self, call: _Call) -> None:
        self._open.discard(call)
        # Not waited for: who holds the lock may be waiting for this call. The next change settles.
        due = self._later or (self.disturbed and not self._open)
        if due and LOCK.acquire(blocking=False):
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
                    raise StateError(f"adapter {gone[0]!r} was deleted or unloaded {SINCE}")
            if self.now is None or state.merged != self.now.merged:
                raise StateError(f"adapters were merged or unmerged {SINCE}")
            self.disturbed = True
            for module, place in state.places:
                if state.active.get(place):
                    place.hook(module)


def _current() -> _Call | None:
    # A task that was started within a call may outlive it.
    call = _CURRENT.get()
    return call if call is not None and call.is_open else None


def _own() -> set[_Call]:
    """The calls that this thread or task is in."""
    own, call = set(), _current()
    while call is not None:
        own.add(call)
        call = call.before
    return own


@contextmanager
def _entered(call: _Call, of: Iterable[Calls]) -> Iterator[None]:
    """Within the context this is the current call; afterwards it is open `of` no model."""
    before = _CURRENT.get()
    try:
        _CURRENT.set(call)
        yield
    finally:
        call.is_open = False
        _CURRENT.set(before)
        for calls in of:
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
    with _entered(call, states):
        for calls, state in states.items():
            calls.enter_again(call, state)
        yield


def seen(place: Place) -> Any:
    """What is active at a place that changed while calls were open, as this call sees it."""
    call = None if torch.compiler.is_compiling() else _current()
    state = None if call is None else call.states.get(place._calls)
    # What was put on the model since is nothing to an older call.
    return place.active if state is None else state.active.get(place)


def kept(place: Place, adapter: str) -> Any:
    """What an adapter was at a place when this call began, if it has changed since, or `None`."""
    call = None if torch.compiler.is_compiling() else _current()
    state = None if call is None else call.states.get(place._calls)
    return None if state is None else state.kept.get((place, adapter))


def _forget_threads() -> None:
    """Have only the calls open that go on in a process that was forked off."""
    own = _own()
    for calls in list(_all):
        calls._open &= own
        calls._closed = False


_all: weakref.WeakSet[Calls] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
