"""How a site gets at its layer's input or output: in the layer's forward, else by a hook.

A hook sends each call of its module through the slower part of `nn.Module.__call__`, which alone
costs a decoded token one to two percent. A plain linear layer that nobody else has a hand in gets a
forward of its own instead, as accelerate gives it one.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from .rescale import rescale

if TYPE_CHECKING:
    from .sites import Site


class _Hook:
    """A module's forward, or a hook of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._handle: RemovableHandle | None = None

    def install(self, *, seen: bool) -> None:
        """Be in the way of the module's calls from now on.

        Args:
            seen: whoever looks whether the module has hooks must find one.
        """
        # Hooks that are there already come before this one, and so before a forward.
        if is_plain(self.module) and not seen and not self._earlier():
            self.module.__dict__["forward"] = self.forward
        else:
            self._handle = self._register()

    def uninstall(self) -> None:
        """Be out of it."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            return
        attributes = self.module.__dict__
        if self._is_own(attributes.get("forward")):
            del attributes["forward"]
        elif self._is_own(attributes.get("_old_forward")):
            # accelerate has put its own before it since.
            attributes["_old_forward"] = MethodType(type(self.module).forward, self.module)

    def _is_own(self, forward: Any) -> bool:
        return getattr(forward, "__self__", None) is self

    def _earlier(self) -> bool:
        raise NotImplementedError

    def _register(self) -> RemovableHandle:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError


class Output(_Hook):
    """Multiplies a module's output once, by all that is to multiply it.

    Attributes:
        own: the site on the module itself.
        carried: the site on a down projection's input that the module carries.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.own: Site | None = None
        self.carried: Site | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The linear layer's forward, and the product."""
        if is_compiling():
            return self._rescaled(nn.Linear.forward(self.module, input), fresh=True)  # type: ignore[arg-type]
        output = linear(self.module, input)
        # A decoder's calls are short, and so is what is done in most of them.
        site = self.own if self.carried is None else self.carried if self.own is None else None
        if site is not None and site.in_place and not site.routed and not output.is_nested:
            kept = site.kept_product() if site is self.own or site.is_carried() else None
            if kept is not None:
                return output.mul_(kept)
        return self._rescaled(output, fresh=True)

    def _hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._rescaled(output, is_fresh(module))

    def _rescaled(self, output: Tensor, fresh: bool) -> Tensor:
        factor, keep, in_place = None, False, fresh
        if self.own is not None:
            factor = self.own.factor(output)
            in_place = fresh and self.own.in_place
        if self.carried is not None and self.carried.is_carried():
            inner = self.carried.factor(output)
            if inner is not None:
                # In place twice would overwrite what the first time is kept for the gradient.
                factor = inner if factor is None else factor * inner
                keep = True
        if factor is None:
            return output
        return rescale(output, factor, keep_result=keep, in_place=in_place)

    def _earlier(self) -> bool:
        return bool(self.module._forward_hooks)

    def _register(self) -> RemovableHandle:
        return self.module.register_forward_hook(self._hook)


class OutputHandle:
    """One site's part in an `Output`.

    Args:
        module: the module whose output is multiplied.
        site: the site that does.
        carried: it is a down projection's, which the module carries.
    """

    def __init__(self, module: nn.Module, site: Site, *, carried: bool = False) -> None:
        self._output = _output_of(module, seen=site.seen)
        self._role = "carried" if carried else "own"
        setattr(self._output, self._role, site)

    def remove(self) -> None:
        """Multiply by that site no longer."""
        setattr(self._output, self._role, None)
        if self._output.own is None and self._output.carried is None:
            self._output.uninstall()


class Input(_Hook):
    """Multiplies a module's input by a site on it, unless another layer's output has been.

    Args:
        module: the module whose input is multiplied.
        site: the site on it.
    """

    def __init__(self, module: nn.Module, site: Site) -> None:
        super().__init__(module)
        self.site = site
        self.install(seen=site.seen)

    def forward(self, input: Tensor) -> Tensor:
        """The linear layer's forward, of the product."""
        if not self.site.is_carried():
            factor = self.site.factor(input)
            # Never in place: siblings may read the same input, and a ReLU before it keeps it.
            input = input if factor is None else rescale(input, factor)
        if is_compiling():
            return nn.Linear.forward(self.module, input)  # type: ignore[arg-type]
        return linear(self.module, input)

    def remove(self) -> None:
        """Multiply no longer."""
        self.uninstall()

    def _hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.site.is_carried():
            return None
        name = "" if args else next(iter(kwargs))
        activation = args[0] if args else kwargs[name]
        factor = self.site.factor(activation)
        if factor is None:
            return None
        scaled = rescale(activation, factor)
        return ((scaled, *args[1:]), kwargs) if args else ((), {**kwargs, name: scaled})

    def _earlier(self) -> bool:
        return bool(self.module._forward_pre_hooks)

    def _register(self) -> RemovableHandle:
        return self.module.register_forward_pre_hook(self._hook, with_kwargs=True)


def linear(module: nn.Module, input: Tensor) -> Tensor:
    """`nn.Linear.forward`, less two calls of `nn.Module.__getattr__`; not for a compiler."""
    parameters = module._parameters
    if "weight" not in parameters or "bias" not in parameters:
        return nn.Linear.forward(module, input)  # type: ignore[arg-type]
    return functional.linear(input, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose forward is nobody else's."""
    return type(module) is nn.Linear and "forward" not in module.__dict__


def is_fresh(module: nn.Module, own_hooks: int = 1) -> bool:
    """Whether nobody else can hold a module's output: a plain linear layer with no other hook.

    Args:
        own_hooks: how many of its forward hooks are the caller's.
    """
    return (
        is_plain(module)
        and len(module._forward_hooks) == own_hooks
        and not torch_module._global_forward_hooks
    )


def _output_of(module: nn.Module, *, seen: bool) -> Output:
    """What multiplies the module's output now, or a new one."""
    hooks = (module.__dict__.get("forward"), module.__dict__.get("_old_forward"))
    for hook in (*hooks, *module._forward_hooks.values()):
        output = getattr(hook, "__self__", None)
        if isinstance(output, Output):
            return output
    output = Output(module)
    output.install(seen=seen)
    return output
