"""Modules that are never called: a model passes their weights to a function instead.

No hook of such a module runs, so that a vector there takes no effect and gets no gradient, and
merging it would change what the model computes. Of a few classes this is known beforehand. Of
others the first call tells: the module above reads the weight and does not call its module. One
that is neither read nor called, as a head behind a flag, is none of this. The hooks that look take
themselves off.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..errors import warn_caller
from .inventory import sites
from .names import ATTRIBUTE, module_at, starred, unwrapped
from .sites import Site, site_of

# Classes of transformers, and those of their children whose weights they read.
NEVER_CALLED: Mapping[str, tuple[str, ...]] = {
    "MambaMixer": ("dt_proj",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "WavLMAttention": ("k_proj", "out_proj", "q_proj", "v_proj"),
}
LIBRARIES = ("torch", "transformers")
# They have no forward.
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def is_unreached(model: nn.Module, name: str) -> bool:
    """Whether a module is never called, by what it is or by the calls there were."""
    site = site_of(module_at(model, name))
    if site is not None and site.reached is not None:
        return not site.reached
    above, _, child = name.rpartition(".")
    return _is_known(module_at(model, above), child)


def _is_known(parent: nn.Module, child: str) -> bool:
    kind = type(parent)
    ours = kind.__module__.startswith("transformers.")
    return ours and child in NEVER_CALLED.get(kind.__name__, ())


def describe(names: Iterable[str]) -> str:
    """What is the matter with modules that are never called."""
    alike = ", ".join(dict.fromkeys(map(starred, names)))
    return f"{alike}: never called, the model passes their weights to a function"


def tell(on: Iterable[tuple[str, nn.Module, Site]]) -> None:
    """Warn, once, of those sites whose modules are known to be never called."""
    new = [(name, site) for name, _, site in on if site.reached is False and not site.told]
    for _, site in new:
        site.told = True
    if new:
        warn_caller(
            f"{describe(name for name, _ in new)}. Vectors there have no effect, get no gradient "
            "and cannot be merged: leave these modules out (exclude_modules)",
            LIBRARIES,
        )


def watch(modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Have the next calls tell new sites whether they are reached.

    Args:
        modules: all of a model's, itself as `""`.
        names: of those with the sites.
    """
    for name in names:
        module = modules[name]
        site = site_of(module)
        if site is None or site.side == "inner":
            continue
        above, _, child = name.rpartition(".")
        if _is_known(modules[above], child):
            site.reached = False
        _Called(module, site)
        while above and isinstance(modules[above], CONTAINERS):
            above = above.rpartition(".")[0]
        if not _hooks(modules[above], _Watch):
            _Watch(modules[above])
    if not any(isinstance(hook, _Tell) for hook in modules[""]._forward_hooks.values()):
        _Tell(modules[""])


def unwatch(model: nn.Module) -> None:
    """Take off the hooks of `watch` that look after no site any more."""
    looking = False
    for module in model.modules():
        for hook in _hooks(module, _Called):
            if site_of(module) is not hook.site:
                hook.remove()
        for hook in _hooks(module, _Watch):
            if any(_hooks(child, _Called) for child, _ in _below(module)):
                looking = True
            else:
                hook.remove(module)
    for hook in [*unwrapped(model)._forward_hooks.values()]:
        if isinstance(hook, _Tell) and not looking:
            hook.remove()


def _hooks(module: nn.Module, kind: type) -> list[Any]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kind)]


def _below(module: nn.Module) -> Iterator[tuple[nn.Module, Site]]:
    """The modules with a site that this one may call, and the sites."""
    for child in _callees(module):
        site = site_of(child)
        if site is not None:
            yield child, site


def _callees(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that this one may call."""
    for name, child in module._modules.items():
        if child is None or name == ATTRIBUTE:
            continue
        yield child
        if isinstance(child, CONTAINERS):
            yield from _callees(child)


class _Called:
    """A hook that tells a module's site that the module is called, once."""

    def __init__(self, module: nn.Module, site: Site) -> None:
        self.site = site
        self.remove = module.register_forward_pre_hook(self).remove

    def __call__(self, module: nn.Module, args: Any) -> None:
        # What is compiled would have the hooks in it for good.
        if not torch.compiler.is_compiling():
            self.site.reached = True
            _remove(self.remove)


class _Watch:
    """Looks at a module's forward, once: which weights below it reads without a call."""

    def __init__(self, module: nn.Module) -> None:
        # Other threads may be within the forward; the last one to enter it is looked at.
        self.thread: int | None = None
        self.handles = [
            module.register_forward_pre_hook(self),
            module.register_forward_hook(self.returned),
            module.register_forward_hook(self.left, always_call=True),
        ]

    def remove(self, module: nn.Module) -> None:
        for handle in self.handles:
            _remove(handle.remove)
        # A forward that was interrupted has not put them back.
        _put_back(module)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return
        if hasattr(module.forward, "_torchdynamo_orig_callable"):
            return  # it is compiled, and what it reads would be compiled twice
        self.thread = threading.get_ident()
        for child, _ in _below(module):
            # What is compiled, or keeps its parameters in a way of its own, is left alone.
            own = child._parameters
            if type(own) is dict and child._compiled_call_impl is None:
                child._parameters = _Noticing(own)  # type: ignore[assignment]

    def is_looking(self) -> bool:
        """Whether this thread's call is looked at."""
        # Nothing after the first condition can be compiled.
        return self.thread is not None and self.thread == threading.get_ident()

    def returned(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook after a forward that raised nothing."""
        if self.is_looking():
            for child, site in _below(module):
                reads: Any = child._parameters
                # With the hook on it, a call would have been noticed.
                if isinstance(reads, _Noticing) and reads.read and _hooks(child, _Called):
                    site.reached = False
            self.remove(module)

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook after any forward."""
        if self.is_looking():
            self.thread = None
            _put_back(module)


def _remove(remove: Callable[[], None]) -> None:
    """Take a hook off, which another thread's call may be doing too."""
    with suppress(KeyError):
        remove()


def _put_back(module: nn.Module) -> None:
    """Give the modules below their own dicts of parameters again."""
    for child in _callees(module):
        parameters: Any = child._parameters
        if isinstance(parameters, _Noticing):
            child._parameters = parameters.own


class _Noticing(MutableMapping[str, Any]):
    """In the place of a module's dict of parameters: notices when the model asks for one."""

    def __init__(self, own: dict[str, Any]) -> None:
        self.own, self.read = own, False

    def __getitem__(self, name: str) -> Any:
        asking = sys._getframe(1)
        if asking.f_code is nn.Module.__getattr__.__code__ and asking.f_back is not None:
            # Its own forward may run without its hooks: in code that is compiled in parts.
            by = asking.f_back.f_locals.get("self")
            self.read = self.read or by is not asking.f_locals["self"]
        return self.own[name]

    def __contains__(self, name: object) -> bool:
        return name in self.own

    def __setitem__(self, name: str, value: Any) -> None:
        self.own[name] = value

    def __delitem__(self, name: str) -> None:
        del self.own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


class _Tell:
    """Warns after a model's call of what it has shown, once."""

    def __init__(self, model: nn.Module) -> None:
        self.remove = model.register_forward_hook(self).remove

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            _remove(self.remove)
            tell(sites(module))
