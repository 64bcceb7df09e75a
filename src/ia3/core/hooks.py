"""How a site gets at its layer's input or output: in the layer's forward, else by a hook.

A hook sends each call of its module through the slower part of `nn.Module.__call__`, which alone
costs a decoded token one to two percent. A plain linear layer that nobody else has a hand in gets a
forward of its own instead, as accelerate gives it one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from .patch import SLOTS, give_back
from .rescale import rescale

if TYPE_CHECKING:
    from .sites import Site, SiteState


class _Hook:
    """In a module's forward, or a hook of it."""

    # Of the module's hooks, those of this kind.
    others: str

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._handle: RemovableHandle | None = None

    def install(self, *, must_be_hook: bool = False) -> None:
        """Be in the way of the module's calls from now on.

        Args:
            must_be_hook: somebody looks whether the module has hooks, or is about to replace its
                forward.
        """
        _take_out_dead(self.module)
        # Hooks that are there already come before this one, and so before a forward.
        if is_plain(self.module) and not must_be_hook and not getattr(self.module, self.others):
            self.module.__dict__["forward"] = self.forward
        else:
            self._handle = self.register()

    def uninstall(self) -> None:
        """Be out of it. Somebody may hold the forward still: it does nothing by now."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        _take_out_dead(self.module)

    def is_dead(self) -> bool:
        """Whether there is nothing to multiply by any more."""
        raise NotImplementedError

    def register(self) -> RemovableHandle:
        """Be a hook of the module."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """The linear layer's forward, and the product."""
        raise NotImplementedError


class Output(_Hook):
    """Multiplies a module's output once, by all that is to multiply it.

    Attributes:
        own: the site on the module itself.
        carried: the site on a down projection's input that the module carries.
    """

    others = "_forward_hooks"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.own: Site | None = None
        self.carried: Site | None = None
        # Of the only one of them.
        self._state: SiteState | None = None

    def put(self, role: str, site: Site | None) -> None:
        """Have a site be what multiplies as `own` or `carried`."""
        # Another thread's call in between looks at both.
        self._state = None
        setattr(self, role, site)
        only = self.own or self.carried
        both = self.own is not None and self.carried is not None
        self._state = None if only is None or both else only.site_state

    def is_dead(self) -> bool:
        return self.own is None and self.carried is None

    def register(self) -> RemovableHandle:
        return self.module.register_forward_hook(self._on_output)

    def forward(self, input: Tensor) -> Tensor:
        if is_compiling():
            return self._rescaled(nn.Linear.forward(self.module, input), fresh=True)  # type: ignore[arg-type]
        output = linear(self.module, input)
        state = self._state
        # A decoder's calls are so short that what `_rescaled` looks at would show in them.
        if (
            state is not None
            and state.in_place
            and not state.routed
            and (self.own is not None or state.is_carried())
            and not output.is_nested
        ):
            kept = state.kept_product()
            if kept is not None:
                return output.mul_(kept)
        return self._rescaled(output, fresh=True)

    def _on_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._rescaled(output, is_fresh(module, own_hooks=1))

    def _rescaled(self, output: Tensor, fresh: bool) -> Tensor:
        # Another thread may change which these are.
        own, carried = self.own, self.carried
        factor, keep, in_place = None, False, fresh
        if own is not None:
            factor = own.factor(output)
            in_place = fresh and own.site_state.in_place
        if carried is not None and carried.site_state.is_carried():
            inner = carried.factor(output)
            if inner is not None:
                # In place twice would overwrite what the first time is kept for the gradient.
                factor = inner if factor is None else factor * inner
                keep = True
        if factor is None:
            return output
        return rescale(output, factor, keep_result=keep, in_place=in_place)


class OutputHandle:
    """One site's part in an `Output`.

    Args:
        module: the module whose output is multiplied.
        site: the site that does.
        carried: it is a down projection's, which the module carries.
    """

    def __init__(self, module: nn.Module, site: Site, *, carried: bool = False) -> None:
        self._module = module
        self._site = site
        self._role = "carried" if carried else "own"
        self._output: Output | None = None

    def install(self) -> None:
        """Multiply from now on."""
        known = _output_of(self._module)
        self._output = Output(self._module) if known is None else known
        self._output.put(self._role, self._site)
        if known is None:
            self._output.install(must_be_hook=self._site.must_be_hook)

    def remove(self) -> None:
        """Multiply by that site no longer; a second time does nothing."""
        if self._output is None:
            return
        self._output.put(self._role, None)
        if self._output.is_dead():
            self._output.uninstall()


class Input(_Hook):
    """Multiplies a module's input by a site on it, unless another layer's output has been.

    Args:
        module: the module whose input is multiplied.
        site: the site on it.
    """

    others = "_forward_pre_hooks"

    def __init__(self, module: nn.Module, site: Site) -> None:
        super().__init__(module)
        self.site: Site | None = site
        self._must_be_hook = site.must_be_hook

    def install(self, *, must_be_hook: bool = False) -> None:
        super().install(must_be_hook=must_be_hook or self._must_be_hook)

    def is_dead(self) -> bool:
        return self.site is None

    def register(self) -> RemovableHandle:
        return self.module.register_forward_pre_hook(self._on_input, with_kwargs=True)

    def remove(self) -> None:
        """Multiply no longer; a second time does nothing."""
        self.site = None
        self.uninstall()

    def forward(self, input: Tensor) -> Tensor:
        factor = self._factor(input)
        # Never in place: siblings may read the same input, and a ReLU before it keeps it.
        scaled = input if factor is None else rescale(input, factor)
        if is_compiling():
            return nn.Linear.forward(self.module, scaled)  # type: ignore[arg-type]
        return linear(self.module, scaled)

    def _factor(self, activation: Tensor) -> Tensor | None:
        site = self.site
        if site is None or site.site_state.is_carried():
            return None
        return site.factor(activation)

    def _on_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        name = "" if args else next(iter(kwargs))
        activation = args[0] if args else kwargs[name]
        factor = self._factor(activation)
        if factor is None:
            return None
        scaled = rescale(activation, factor)
        return ((scaled, *args[1:]), kwargs) if args else ((), {**kwargs, name: scaled})


def linear(module: nn.Module, input: Tensor) -> Tensor:
    """`nn.Linear.forward`, less two calls of `nn.Module.__getattr__`; not for a compiler."""
    parameters = module._parameters
    if "weight" not in parameters or "bias" not in parameters:
        return nn.Linear.forward(module, input)  # type: ignore[arg-type]
    return functional.linear(input, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose forward is nobody else's."""
    return type(module) is nn.Linear and "forward" not in module.__dict__


def is_fresh(module: nn.Module, own_hooks: int) -> bool:
    """Whether nobody else can hold a module's output: a plain linear layer with no other hook.

    Args:
        own_hooks: how many of its forward hooks are the caller's.
    """
    return (
        is_plain(module)
        and len(module._forward_hooks) == own_hooks
        and not torch_module._global_forward_hooks
    )


def make_way(module: nn.Module) -> None:
    """Have what is in a module's forward be a hook from now on: the forward is to be replaced."""
    for slot in SLOTS:
        hook = _hook_in(module, slot)
        if hook is not None:
            give_back(module, slot)
            if not hook.is_dead():
                hook.install(must_be_hook=True)


def _output_of(module: nn.Module) -> Output | None:
    """What multiplies the module's output now."""
    hooks = [_hook_in(module, slot) for slot in SLOTS]
    hooks += [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
    live = (hook for hook in hooks if isinstance(hook, Output) and not hook.is_dead())
    return next(live, None)


def _hook_in(module: nn.Module, slot: str) -> _Hook | None:
    hook = getattr(module.__dict__.get(slot), "__self__", None)
    return hook if isinstance(hook, _Hook) else None


def _take_out_dead(module: nn.Module) -> None:
    for slot in SLOTS:
        hook = _hook_in(module, slot)
        if hook is not None and hook.is_dead():
            give_back(module, slot)
