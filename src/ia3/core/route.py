"""Which adapter each row of a batch is rescaled by, for the length of a call.

A route belongs to the thread or task that entered it. It says for each site of a model what to
multiply by; the sites' hooks ask for it. What is computed again in a backward pass is computed
under the route it was first computed under.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from ..errors import IA3Error

if TYPE_CHECKING:
    from .sites import Site

# The name of the base model among adapters' names.
BASE = "__base__"

GENERATES = "what generates with several beams or sequences goes through IA3Model.generate"

Names = Sequence[str] | Sequence[Sequence[str]]

# Held while hooks or what they read are changed.
LOCK = threading.RLock()


class Opening:
    """That routes were entered once, in a thread or task.

    An interruption may keep them from being left in order: they have been where this is gone.
    """


class Host(Protocol):
    """The model that a route is of."""

    model: nn.Module

    def _open(self, route: Route, opening: Opening) -> None: ...
    def _close(self, opening: Opening) -> None: ...
    def _owns(self, site: Site) -> bool: ...


class Route:
    """What the sites of a model multiply by, for each row or token of a batch.

    Args:
        host: the model.
        sites: all of its sites, and the names of their modules. Nothing is done at one that comes
            later.
        values: the values at a site, `[n, dim]` or anything that can be viewed so; `None` where
            there is nothing to do. With `gathered`, n rows of a batch. Else n adapters, and it is
            called in every pass, so that gradients reach what it gives.
        index: int64, which of the n: `[rows]`, or `[batch, seq]` for tokens.
        gathered: `values` are one a row already.
        repeats: how many rows of an activation one row of the batch may have become.
    """

    def __init__(
        self,
        host: Host,
        sites: Mapping[Site, str],
        values: Callable[[Site], Tensor | None],
        index: Tensor,
        *,
        gathered: bool = False,
        repeats: Collection[int] = (1,),
    ) -> None:
        self.host = host
        self.sites = sites
        self.values = values
        self.index = index
        self.gathered = gathered
        self.repeats = repeats
        # How long the rows of its calls are, with all that they look back on.
        self._lengths: set[int] = set()
        self._kept: dict[object, Tensor] = {}

    def repeated(self, repeats: Collection[int]) -> Route:
        """The same for a call that repeats each row."""
        return Route(
            self.host,
            self.sites,
            self.values,
            self.index,
            gathered=self.gathered,
            repeats=repeats,
        )

    @property
    def by_token(self) -> bool:
        """Whether tokens are routed, not rows."""
        return self.index.dim() == 2

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Look at the arguments of a call of the model before anything runs.

        Raises:
            IA3Error: they have not the rows or tokens that were named.
        """
        main = getattr(self.host.model, "main_input_name", "input_ids")
        first = (*args[:1], *map(kwargs.get, (main, "inputs", "input_ids", "inputs_embeds")))
        values = (*first, *args[1:], *kwargs.values())
        tensors = [value for value in values if isinstance(value, Tensor) and value.dim() > 0]
        if not tensors:
            return
        expected = list(self.index.shape)
        shape = list(tensors[0].shape)
        rows, *tokens = expected
        if shape[0] not in {rows * k for k in self.repeats} or (tokens and shape[1:2] != tokens):
            kind = "tokens" if tokens else "rows"
            several = "" if tokens or shape[0] % rows else f"; {GENERATES}"
            raise IA3Error(
                f"adapter_names for {expected} {kind}, but the input is {shape}: expected one name "
                f"each{several}"
            )
        self._lengths.update(t.shape[1] for t in tensors if t.dim() > 1 and t.shape[0] == shape[0])

    def factor(self, site: Site, activation: Tensor) -> Tensor | None:
        """What to multiply an activation by; `None` for nothing.

        Returns:
            Shaped for `rescale`: it broadcasts over the activation, or over its rows apart.

        Raises:
            IA3Error: the activation has not the rows or tokens that were named.
        """
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            raise IA3Error(
                "a routed model is being traced: the graph would keep this call's adapters; "
                "leave the route first"
            )
        if not self.gathered:
            values = self.values(site)
            if values is None:
                return None
            values = values.to(activation.device)
            index = self.index.to(values.device)
            return self._shaped(site, values.index_select(0, index.flatten()), activation)
        key = (site, activation.shape[0], activation.dim(), activation.device)
        factor = self._kept.get(key)
        if factor is None:
            values = self.values(site)
            if values is None:
                return None
            factor = self._shaped(site, values.to(activation.device), activation)
            self._kept[key] = factor
        return factor

    def _shaped(self, site: Site, values: Tensor, activation: Tensor) -> Tensor:
        axes = site.activation.factor_shape
        between = activation.dim() - 1 - len(axes)
        if activation.is_nested or between < 0:
            raise self._misfit(site, activation)
        count = activation.shape[0]
        if self.by_token:
            tokens = self.index.shape
            if len(axes) == 1 and activation.shape[:-1] in (tokens, (tokens.numel(),)):
                return values.reshape(activation.shape)
            raise self._misfit(site, activation)
        rows = self.index.shape[0]
        if count == rows:
            return values.reshape(rows, *[1] * between, *axes)
        repeats = set(self.repeats)
        if between == 0 and len(axes) == 1:
            # Without an axis for them the tokens of a row follow each other.
            repeats |= {k * length for k in self.repeats for length in self._lengths}
        if count % rows == 0 and count // rows in repeats:
            return values.reshape(rows, 1, *[1] * between, *axes)
        raise self._misfit(site, activation)

    def _misfit(self, site: Site, activation: Tensor) -> IA3Error:
        shape = "nested" if activation.is_nested else list(activation.shape)
        named = (
            f"tokens {list(self.index.shape)}" if self.by_token else f"{self.index.shape[0]} rows"
        )
        return IA3Error(
            f"adapters were named for {named}, but the activation at "
            f"{self.sites.get(site, 'a module')!r} is {shape}: expected as many, in the order of "
            "the batch; a module that sees something else than the batch cannot be routed, and "
            f"{GENERATES}"
        )


# -- entering --------------------------------------------------------------------------------------


@contextmanager
def entered(route: Route) -> Iterator[None]:
    """Within the context, calls of the route's model in this thread or task are routed.

    Raises:
        IA3Error: the model cannot be routed as it is now.
    """
    _bind_checkpoints()
    with _under({**_routes(), **dict.fromkeys(route.sites, route)}):
        yield


@dataclass(eq=False)
class _Frame:
    """What is on in a thread or task.

    Attributes:
        routes: of one model or several.
        before: what was on when this was entered.
        opening: gives `None` once it has been left, in order or by an interruption.
        is_open: it has not been left in order.
    """

    routes: Mapping[Site, Route]
    before: _Frame | None
    opening: ref[Opening]
    is_open: bool = True


_CURRENT: ContextVar[_Frame | None] = ContextVar("ia3_routes", default=None)


def _routes() -> Mapping[Site, Route]:
    frame = _CURRENT.get()
    # A task that was started within a route has it still when that has been left.
    while frame is not None and frame.is_open and frame.opening() is None:
        frame = frame.before
    return {} if frame is None else frame.routes


@contextmanager
def _under(routes: Mapping[Site, Route]) -> Iterator[None]:
    with ExitStack() as stack:
        opening = Opening()
        for route in set(routes.values()):
            # First, as what follows may be interrupted.
            stack.callback(route.host._close, opening)
            route.host._open(route, opening)
        frame = _Frame(routes, _CURRENT.get(), ref(opening))
        try:
            _CURRENT.set(frame)
            yield
        finally:
            in_order = _CURRENT.get() is frame
            if in_order:
                before = frame.before
                while before is not None and not before.is_open:
                    before = before.before
                _CURRENT.set(before)
            frame.is_open = False
            if not in_order and sys.exc_info()[0] is None:
                raise IA3Error(
                    "a route was left in another order, or by another thread or task, than it was "
                    "entered, so that calls in between may have had another one: do not yield "
                    "within route(), give adapter_names to each call instead"
                )


def current_route(host: Host) -> Route | None:
    """The route of this model in this thread or task."""
    return next((route for route in _routes().values() if route.host is host), None)


def is_routed(site: Site) -> bool:
    """Whether a site is routed in this thread or task."""
    routes = _routes()
    if not routes:
        return False
    if site in routes:
        return True
    # Put on a routed model since.
    return any(route.host._owns(site) for route in set(routes.values()))


def factor_of(site: Site, activation: Tensor) -> Tensor | None:
    """`Route.factor` of a site that is routed."""
    route = _routes().get(site)
    return None if route is None else route.factor(site, activation)


def watch(model: nn.Module, wanted: bool) -> None:
    """Have the calls of a model checked by the routes that are on; or no longer."""
    hooks = model._forward_pre_hooks
    own = [number for number, hook in hooks.items() if hook is _check_call]
    if wanted and not own:
        model.register_forward_pre_hook(_check_call, with_kwargs=True)
    for number in own if not wanted else ():
        del hooks[number]
        model._forward_pre_hooks_with_kwargs.pop(number, None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for route in set(_routes().values()):
        if route.host.model is module:
            route.check(args, kwargs)


# -- checkpointing ---------------------------------------------------------------------------------

# Modules that hold the function below under this name.
_GENERATOR = "_checkpoint_without_reentrant_generator"
_CALLERS = ("torch.utils.checkpoint", "torch.distributed._composable.checkpoint_activation")

_bound: set[str] = set()


def _bind_checkpoints() -> None:
    """From now on, have checkpointed functions run again under the route of their first run.

    PyTorch has no hook for that. Both of its kinds get their function replaced by one that enters
    the route, or leaves it: the backward pass may be called within another.

    Raises:
        IA3Error: this version of PyTorch has no such place, and gradients are enabled.
    """
    if len(_bound) == len(_CALLERS):
        return
    from torch.utils import checkpoint

    with LOCK:
        reentrant = getattr(checkpoint, "CheckpointFunction", None)
        generator = getattr(checkpoint, _GENERATOR, None)
        if reentrant is None or generator is None:
            if torch.is_grad_enabled():
                raise IA3Error(
                    f"PyTorch {torch.__version__} has no checkpointing that could be told which "
                    "adapters its rows were computed with: route without gradients, or use a "
                    "version that was tested (2.11 to 2.13)"
                )
            return
        for name in _CALLERS:
            module = sys.modules.get(name)
            if module is None or name in _bound:
                continue
            setattr(module, _GENERATOR, _binding(getattr(module, _GENERATOR), at=0))
            if module is checkpoint:
                reentrant.forward = staticmethod(_binding(reentrant.forward, at=1))
            _bound.add(name)


def _binding(original: Callable[..., Any], at: int) -> Callable[..., Any]:
    if getattr(original, "func", None) is _with_bound:
        return original  # imported by its name, from a module that is bound already
    return partial(_with_bound, original, at)


def _with_bound(original: Callable[..., Any], at: int, *args: Any, **kwargs: Any) -> Any:
    bound = partial(_run_under, _routes(), args[at])
    return original(*args[:at], bound, *args[at + 1 :], **kwargs)


def _run_under(
    routes: Mapping[Site, Route], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with _under(routes):
        return function(*args, **kwargs)
