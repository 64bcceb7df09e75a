"""Forward hooks that multiply a module's output or input by a site's vectors."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .rescale import rescale


class Multiplier(Protocol):
    """What a hook asks of a site at each call; `in_place`: a fresh output may be written over."""

    in_place: bool

    def factor(self, activation: Tensor) -> Tensor | None:
        """What `rescale` multiplies the activation by; `None` for nothing."""

    def is_carried(self) -> bool:
        """Whether another layer's output is multiplied in place of the module's input."""


class OutputHook:
    """Multiplies a module's output, once, by all that is to multiply it: see `on`."""

    def __init__(self, module: nn.Module) -> None:
        # The site on the output, and that on a down projection's input which the module carries.
        self.own: Multiplier | None = None
        self.carried: Multiplier | None = None
        self._handle = module.register_forward_hook(self)

    @classmethod
    def on(cls, module: nn.Module, free: Literal["own", "carried"]) -> OutputHook:
        """The module's hook that has no such site yet, registered now if there is none.

        One that was taken off may still be there for the calls that are running.
        """
        own = [hook for hook in module._forward_hooks.values() if isinstance(hook, cls)]
        return next((hook for hook in own if getattr(hook, free) is None), None) or cls(module)

    def remove(self, site: Multiplier) -> None:
        """Multiply by a site no longer; the hook goes with the last one."""
        if self.own is site:
            self.own = None
        if self.carried is site:
            self.carried = None
        if self.own is None and self.carried is None:
            self._handle.remove()

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        own, carried = self.own, self.carried
        factor, inner = None if own is None else own.factor(output), None
        if carried is not None and carried.is_carried():
            inner = carried.factor(output)
            if inner is not None:
                # One product: a second one in place would overwrite what the first one saved.
                factor = inner if factor is None else factor * inner
        if factor is None:
            return output
        in_place = (own is None or own.in_place) and is_fresh(module)
        return rescale(output, factor, keep_result=inner is not None, in_place=in_place)


class InputHook:
    """Multiplies a module's input by a site on it, unless another layer carries the site.

    The first argument is the input, by position or by name.
    """

    def __init__(self, module: nn.Module, site: Multiplier) -> None:
        self.site = site
        self.remove = module.register_forward_pre_hook(self, with_kwargs=True).remove

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.site.is_carried():
            return None
        name = "" if args else next(iter(kwargs))
        activation: Tensor = args[0] if args else kwargs[name]
        factor = self.site.factor(activation)
        if factor is None:
            return None
        # Never in place: siblings may read the same input, and a ReLU before it saves it.
        scaled = rescale(activation, factor)
        return ((scaled, *args[1:]), kwargs) if args else ((), {**kwargs, name: scaled})


def is_fresh(module: nn.Module, own_hooks: int = 1) -> bool:
    """Whether nothing else can hold a module's output: a plain linear layer with no other hook."""
    own = module.__dict__
    return (
        type(module) is nn.Linear
        and "forward" not in own
        and len(own["_forward_hooks"]) == own_hooks
        and not torch_module._global_forward_hooks
    )
