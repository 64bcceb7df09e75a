"""Which adapter each row of a batch is rescaled by, for the length of a call.

A route belongs to the thread or task that entered it. It says for each site of a model what to
multiply by; the sites' hooks ask for it. What is computed again in a backward pass is computed
under the route it was first computed under.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from ..errors import IA3Error, StateError
from .activations import Activation
from .calls import LOCK as LOCK, Calls, State, changing as changing, seeing, states_now
from .patch import patch

# The name of the base model among adapters' names.
BASE = "__base__"
GENERATES = "what generates with several beams or sequences goes through IA3Model.generate"

Names = Sequence[str] | Sequence[Sequence[str]]


class Place(Hashable, Protocol):
    """What a route asks of a site."""

    activation: Activation


class Host(Protocol):
    """The model that a route is of; `open` and `close` are called as it is entered and left.

    `frame` is the same for both, and `close` may come without `open`.

    `open` raises `IA3Error` where the model cannot be routed as it is now.
    """

    model: nn.Module

    def open(self, route: Route, frame: object) -> None: ...
    def close(self, frame: object) -> None: ...
    def owns(self, site: Any) -> bool: ...


@dataclass(eq=False)
class Route:
    """What the sites of a model multiply by, for each row or token of a batch.

    `sites` are all of the model's, with the names of their modules. `values` gives those at a site,
    `[n, dim]` or what can be viewed so, or `None`: of n adapters, in every pass, so that gradients
    reach them; with `gathered`, of the n rows. `index`, int64, says which of the n: `[rows]`, or
    `[batch, seq]` for tokens. One row of the batch may have become `repeats` of an activation.
    """

    host: Host
    sites: Mapping[Any, str]
    values: Callable[[Any], Tensor | None]
    index: Tensor
    gathered: bool = False
    repeats: Collection[int] = (1,)
    # The lengths of the rows of its calls, with their past tokens.
    _lengths: set[int] = field(default_factory=set, init=False)
    _factors: dict[Hashable, Tensor] = field(default_factory=dict, init=False)

    def repeated(self, repeats: Collection[int]) -> Route:
        """The same for a call that repeats each row."""
        return replace(self, repeats=repeats)

    @property
    def by_token(self) -> bool:
        """Whether tokens are routed, not rows."""
        return self.index.dim() == 2

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise `IA3Error` where a call of the model has other rows or tokens than were named."""
        main = getattr(self.host.model, "main_input_name", "input_ids")
        first = (*args[:1], *map(kwargs.get, (main, "inputs", "input_ids", "inputs_embeds")))
        values = (*first, *args[1:], *kwargs.values())
        tensors = [value for value in values if isinstance(value, Tensor) and value.dim() > 0]
        if not tensors:
            return
        expected, shape = list(self.index.shape), list(tensors[0].shape)
        rows, *tokens = expected
        if shape[0] not in {rows * k for k in self.repeats} or (tokens and shape[1:2] != tokens):
            kind = "tokens" if tokens else "rows"
            several = "" if tokens or shape[0] % rows else f"; {GENERATES}"
            raise IA3Error(
                f"adapter_names for {expected} {kind}, but the input is {shape}: expected one name "
                f"each{several}"
            )
        self._lengths.update(t.shape[1] for t in tensors if t.dim() > 1 and t.shape[0] == shape[0])

    def factor(self, site: Place, activation: Tensor) -> Tensor | None:
        """What to multiply an activation by, shaped for `rescale`; `None` for nothing."""
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            raise StateError(
                "a routed model is being traced: the graph would keep this call's adapters; "
                "leave the route first"
            )
        key = (site, activation.size(0), activation.dim(), activation.device)
        if key in self._factors:
            return self._factors[key]
        values = self.values(site)
        if values is None:
            return None
        values = values.to(activation.device)
        if not self.gathered:
            values = values.index_select(0, self.index.to(values.device).flatten())
        factor = self._shaped(site, values, activation)
        if self.gathered:
            self._factors[key] = factor
        return factor

    def _shaped(self, site: Place, values: Tensor, activation: Tensor) -> Tensor:
        axes = site.activation.factor_shape
        between = activation.dim() - 1 - len(axes)
        rows, *tokens = index = list(self.index.shape)
        shape = "nested" if activation.is_nested else list(activation.shape)
        fits = not activation.is_nested and between >= 0
        if fits and tokens:
            if len(axes) == 1 and shape[:-1] in (index, [self.index.numel()]):
                return values.reshape(activation.shape)
        elif fits and shape[0] == rows:
            return values.reshape(rows, *[1] * between, *axes)
        elif fits:
            repeats = set(self.repeats)
            if between == 0 and len(axes) == 1:
                # Without an axis for them the tokens of a row follow each other.
                repeats |= {k * length for k in self.repeats for length in self._lengths}
            if shape[0] in {rows * k for k in repeats}:
                return values.reshape(rows, 1, *[1] * between, *axes)
        named = f"tokens {index}" if tokens else f"{rows} rows"
        raise IA3Error(
            f"adapters were named for {named}, but the activation at "
            f"{self.sites.get(site, 'a module')!r} is {shape}: expected as many, in the order of "
            "the batch; a module that sees something else than the batch cannot be routed, and "
            f"{GENERATES}"
        )


# -- entering --------------------------------------------------------------------------------------


@contextmanager
def entered(route: Route) -> Iterator[None]:
    """Within the context, calls of the route's model in this thread or task are routed."""
    # What is checkpointed is recomputed under the routes of its first run, from now on.
    with LOCK:
        bound = bind()
    if not bound and torch.is_grad_enabled():
        raise IA3Error(
            f"PyTorch {torch.__version__} has no checkpointing that could be told which adapters "
            "its rows were computed with: route without gradients, or use a version that was "
            "tested (2.11 to 2.13)"
        )
    with _under({**_routes(), **dict.fromkeys(route.sites, route)}):
        yield


@dataclass(eq=False)
class _Frame:
    """What a thread or task has entered: the route of each site, of one model or several."""

    routes: Mapping[Place, Route]
    before: _Frame | None
    is_open: bool = True
    # Left out of order, so that nobody knows which calls it was for.
    is_lost: bool = False


_CURRENT: ContextVar[_Frame | None] = ContextVar("ia3_routes", default=None)


def _routes() -> Mapping[Place, Route]:
    # A task that was started within a route keeps it when the route has been left elsewhere.
    frame = _CURRENT.get()
    return {} if frame is None else frame.routes


@contextmanager
def _under(routes: Mapping[Place, Route]) -> Iterator[None]:
    frame = _Frame(routes, _CURRENT.get())
    with ExitStack() as stack:
        for route in set(routes.values()):
            stack.callback(route.host.close, frame)
            route.host.open(route, frame)
        _CURRENT.set(frame)
        try:
            yield
        finally:
            frame.is_open = False
            in_order = _CURRENT.get() is frame
            if in_order:
                before = frame.before
                while before is not None and before.is_lost:
                    before = before.before
                _CURRENT.set(before)
            frame.is_lost = not in_order
        if not in_order:
            raise StateError(
                "a route was left in another order, or by another thread or task, than it was "
                "entered, so that calls in between may have had another one: do not yield "
                "within route(), give adapter_names to each call instead"
            )


def frames_here() -> set[object]:
    """What this thread or task has entered."""
    found: set[object] = set()
    frame = _CURRENT.get()
    while frame is not None:
        found.add(frame)
        frame = frame.before
    return found


def current_route(host: Host) -> Route | None:
    return next((route for route in _routes().values() if route.host is host), None)


# A compiler breaks its graph at what follows: it knows no thread's route.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def is_routed(site: Place) -> bool:
    """Whether a site is routed in this thread or task."""
    return _is_routed(site, _routes())


# One call, as each takes microseconds, and a decoded token asks two hundred times.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def factor_of(site: Place, activation: Tensor) -> tuple[bool, Tensor | None]:
    """Whether a site is routed in this thread or task, and then `Route.factor` of it."""
    routes, frame = _routes(), _CURRENT.get()
    if not _is_routed(site, routes):
        return False, None
    if frame is not None and not frame.is_open:
        raise StateError(
            "this task was started within a route that has been left since: call the whole model, "
            "which has the route again for the length of the call, or enter a route here"
        )
    route = routes.get(site)
    return True, None if route is None else route.factor(site, activation)


def _is_routed(site: Place, routes: Mapping[Place, Route]) -> bool:
    # It may have been put on a routed model since.
    return site in routes or any(route.host.owns(site) for route in set(routes.values()))


def watch(model: nn.Module, wanted: bool) -> None:
    """Have the calls of a model checked by the routes that are on, or no longer."""
    hooks = model._forward_pre_hooks
    own = [number for number, hook in hooks.items() if hook is _check_call]
    if wanted and not own:
        model.register_forward_pre_hook(_check_call, with_kwargs=True)
    if not wanted:
        for number in own:
            del hooks[number], model._forward_pre_hooks_with_kwargs[number]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for route in set(_routes().values()):
        if route.host.model is module:
            route.check(args, kwargs)


class OneCall:
    """The forward of a model with adapters: each call of it sees one state of them.

    Where the route that it is called in has been left elsewhere, it is entered again.
    """

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self.model, self.calls = model, calls
        self.patch = patch(model, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        below = self.patch.below
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return below(*args, **kwargs)
        with self.calls.opened(self.model):
            left = _CURRENT.get()
            if left is None or left.is_open:
                return below(*args, **kwargs)
            try:
                with _under(left.routes):
                    return below(*args, **kwargs)
            finally:
                _CURRENT.set(left)


# -- checkpointing ---------------------------------------------------------------------------------


@cache
def bind() -> bool:
    """Have both kinds of torch's checkpoint bind the function that they recompute; false if not.

    The public way, `context_fn`, would have to be given by each caller of `checkpoint`:
    transformers, FSDP and the user's own layers. Reentrant checkpoints have none.
    """
    reentrant = getattr(checkpoint, "CheckpointFunction", None)
    frame = getattr(checkpoint, "_CheckpointFrame", None)
    if reentrant is None or frame is None:
        return False
    reentrant.forward = staticmethod(partial(_with_bound, reentrant.forward))
    original = frame.__init__
    frame.__init__ = lambda *args, **kwargs: _with_bound(original, *args, **kwargs)
    return True


def _with_bound(original: Any, self: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    routes = _routes()
    # What is routed does not ask what is active.
    states = {c: s for c, s in states_now().items() if not s.active.keys() & routes.keys()}
    bound = partial(_run_under, routes, states, function)
    return original(self, bound, *args, **kwargs)


def _run_under(
    routes: Mapping[Place, Route],
    states: Mapping[Calls, State],
    function: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    with _under(routes), seeing(states):
        return function(*args, **kwargs)
