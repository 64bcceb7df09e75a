"""The vectors at one activation of one module.

A `Site` is a small module registered on the base module as `ia3_l`. Its vectors are its parameters,
one per adapter, so that they move, save and train with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IA3Error, StateError
from . import experts
from .activations import Activation, Side
from .calls import Calls, kept, seen
from .hooks import InputHook, OutputHook
from .mlp import Carrier, carrier_of
from .names import ATTRIBUTE, Frozen, Target
from .patch import refuse_replica
from .route import factor_of, is_routed
from .saved_modules import allow_plain_checkpoint, saved_module_of
from .spread import Part, gathered, is_spread, part_of, spread_like


class Site(nn.Module):
    """Every adapter's vector at one activation of one base module.

    Vectors have PEFT's shapes (`Activation.shape`) and are float32 whatever the base's dtype, but
    for those of the adapters that follow it.
    """

    side: Side
    activation: Activation
    frozen: dict[str, Frozen]  # adapter -> the ranges of its vector that count as one
    following: set[str]  # the adapters whose vectors have the base's dtype
    active: tuple[str, ...] = ()  # the adapters whose vectors multiply now
    # Rescale where it costs the least memory; else by the plain product, at the module itself.
    in_place: bool = True
    merged: tuple[str, ...] = ()  # the adapters that are part of the weights; Merge writes it
    banked: bool = False  # a bank has values for it, so that it stays; Routes writes it
    # Whether the module is ever called, if that is known; `reached` writes both.
    reached: bool | None = None
    told: bool = False  # the user knows that it is not
    in_block: bool = False  # the fused MLP around it multiplies, no hook does; fused_mlp writes it
    # Underscores, as no adapter can have the name of an attribute.
    _calls: Calls = Calls()  # those of the model; Adapters writes it
    _routed: bool = False  # a route may be on, which comes before the active adapters
    _carrier: Carrier | None  # rescaled instead of a down projection's input
    _removers: tuple[Callable[[], None], ...] = ()  # of its hooks, while it has any

    def __init__(self, target: Target, carrier: Carrier | None = None) -> None:
        super().__init__()
        self.side, self.activation = target.side, target.activation
        self.frozen, self.following = {}, set()
        self._carrier = carrier
        self.register_load_state_dict_post_hook(allow_plain_checkpoint)  # type: ignore[no-untyped-call]

    _replicate_for_data_parallel = refuse_replica

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """Adapter name -> vector."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    def __contains__(self, adapter: object) -> bool:
        return isinstance(self._held(adapter), Tensor)

    def __getitem__(self, adapter: str) -> nn.Parameter:
        vector: nn.Parameter = self._held(adapter)
        return vector

    def _held(self, adapter: object) -> Any:
        parameter = self._parameters.get(adapter)  # type: ignore[call-overload]
        # While FSDP 1 computes, its parameters may be plain attributes.
        return self.__dict__.get(adapter) if parameter is None else parameter  # type: ignore[call-overload]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Site:
        vectors = [self[name] for name in self.following]
        following = [*vectors, *(vector.grad for vector in vectors)]

        # Training moves vectors by less than half precision resolves around one.
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.itemsize < 4
            if not narrow or any(tensor is each for each in following):
                return moved
            return tensor.to(moved.device, torch.float32)

        super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]
        return self

    def add(
        self, adapter: str, vector: Tensor, frozen: Frozen = (), *, follows: bool = False
    ) -> None:
        """Store a vector of `Activation.shape`, not to be trained yet, with its frozen ranges.

        One that `follows` is cast with the base model, also to less than float32.
        """
        # Not register_parameter: it refuses names that are also methods of this class ("product").
        self._parameters[adapter] = nn.Parameter(vector, requires_grad=False)
        if follows:
            self.following.add(adapter)
        if frozen:
            mask = torch.zeros(self.activation.dim, dtype=torch.bool)
            for start, end in frozen:
                mask[start:end] = True
            mask = mask.reshape(self.activation.shape).to(vector.device)
            self.register_buffer(_mask_name(adapter), mask, persistent=False)
            # Last: saving a state dict reads both.
            self.frozen[adapter] = frozen

    def target(self, name: str) -> Target:
        """What this site rescales, `name` being its module's."""
        return Target(name, self.side, self.activation)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        with torch.no_grad():
            for adapter in self.frozen:
                if self.is_whole(adapter):
                    self[adapter].copy_(self.vector(adapter))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def remove(self, adapter: str) -> None:
        # First: saving a state dict reads the vector of each adapter that is in it.
        if self.frozen.pop(adapter, ()):
            delattr(self, _mask_name(adapter))
        # Likewise: moving the model reads those that follow it.
        self.following.discard(adapter)
        self._parameters.pop(adapter, None)

    def vector(self, adapter: str) -> Tensor:
        """An adapter's vector, `Activation.shape`, its frozen values one."""
        vector: Any = self._parameters.get(adapter)
        if vector is None:
            vector = self.__dict__.get(adapter)  # as in `_held`
        if vector is None:
            return self._kept(adapter)
        if vector.is_meta and hasattr(self, "_hf_hook"):
            # accelerate brings a module's tensors for its forward, and a site has none.
            hook: Any = self._hf_hook
            vector = hook.weights_map[adapter].to(hook.execution_device)
        if adapter in self.frozen:
            mask = self._buffers[_mask_name(adapter)]
            assert mask is not None
            # Not the gradient alone: weight decay would move the values too.
            vector = vector.masked_fill(spread_like(mask, vector), 1.0)
        return vector  # type: ignore[no-any-return]

    def _kept(self, adapter: str) -> Tensor:
        """The vector of an adapter that was deleted, or written over, since this call began."""
        vector: Tensor | None = kept(self, adapter)
        if vector is None:
            raise StateError(f"adapter {adapter!r} was deleted while this was computed with it")
        written_over = vector.is_leaf and not isinstance(vector, nn.Parameter)
        if written_over and vector.requires_grad and torch.is_grad_enabled():
            raise StateError(
                f"other values were loaded into adapter {adapter!r} in the middle of a call that "
                "trains it: do that between two steps"
            )
        return vector

    def former(self, adapter: str) -> Tensor:
        """A copy of a vector that is to be written over, for calls that began with it."""
        return self.vector(adapter).detach().clone().requires_grad_(self[adapter].requires_grad)

    def write(self, adapter: str, values: Tensor, *, in_place: bool = True) -> None:
        """Give an adapter other values, in the same parameter.

        Where a call may be reading them, not `in_place`: its memory stays as it is.
        """
        self.spread_again()
        vector = self[adapter]
        values = spread_like(values, vector)
        # Of a GPU's memory torch always says that it is shared.
        shared = vector.is_cpu and vector.is_shared()  # type: ignore[no-untyped-call]
        if in_place or is_spread(vector) or shared:
            with torch.no_grad():
                vector.copy_(values)
        else:
            vector.data = values.to(vector.device, vector.dtype, copy=True)
            # As in place: a backward pass that is to come would compute with these values.
            torch.autograd.graph.increment_version(vector)

    def is_whole(self, adapter: str) -> bool:
        """Whether a vector is here or a `DTensor`, and not the piece that FSDP 1 has of it."""
        return self[adapter].shape == self.activation.shape

    def whole(self, adapter: str) -> Tensor:
        """An adapter's vector as it is saved, gathered from all processes; see `check_whole`."""
        self.check_whole(adapter)
        return gathered(self.vector(adapter))

    def spread_again(self) -> None:
        """Have FSDP 2 hold vectors as `DTensor`s, before they are kept or written.

        Since a call it may hold them whole, in memory that it frees and forgets.
        """
        if self._state_dict_pre_hooks:
            self.state_dict()  # FSDP's hook before it does so

    def check_whole(self, adapter: str) -> None:
        """Raise `IA3Error` where FSDP 1 has a vector in pieces, which it alone can gather."""
        if not self.is_whole(adapter):
            raise StateError(
                f"the vectors of adapter {adapter!r} are in pieces, one a process (FSDP 1): give "
                "the gathered state_dict=, or do this within "
                "FullyShardedDataParallel.summon_full_params(model)"
            )

    def activate(self, module: nn.Module, adapters: tuple[str, ...], routed: bool = False) -> None:
        """Have the activation rescaled by the product of those adapters' vectors that are here.

        With `routed`, a route may be on: there are hooks even without vectors, which ask for it.
        Hooks that are no longer wanted stay until `settle`.
        """
        here = self._multiplying(adapters)
        # Not setattr: nn.Module's looks for parameters first.
        self.__dict__.update(active=here, _routed=routed)
        if self._is_wanted():
            self.hook(module)

    def check(self, module: nn.Module, adapters: tuple[str, ...]) -> None:
        """Raise `IA3Error` where `activate` would."""
        if self.side == "inner" and not self._removers and self._multiplying(adapters):
            experts.check_forward(module)

    def _multiplying(self, adapters: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the adapters whose vectors are here."""
        return tuple(name for name in adapters if name in self)

    def hook(self, module: nn.Module) -> None:
        """Put the hooks there that multiply, if they are not."""
        if not self._removers and not self.in_block:
            self._removers = self._register(module)

    def settle(self) -> None:
        """Take off hooks that have nothing to multiply by now."""
        if not self._is_wanted():
            for remove in self._removers:
                remove()
            self._removers = ()

    def _is_wanted(self) -> bool:
        # Experts are not routed.
        routed = self._routed and self.side != "inner"
        return (bool(self.active) or routed) and not self.in_block

    def _register(self, module: nn.Module) -> tuple[Callable[[], None], ...]:
        """Put hooks on the module; returns what removes them again."""
        if self.side == "inner":
            return (experts.attach(module, self._inner_factor).remove,)
        if self.side == "output":
            output = OutputHook.on(module, "own")
            output.own = self
            return (partial(output.remove, self),)
        remove_input = InputHook(module, self).remove
        if self._carrier is None:
            return (remove_input,)
        output = OutputHook.on(self._carrier.module, "carried")
        output.carried = self
        return remove_input, partial(output.remove, self)

    def is_carried(self) -> bool:
        """Whether the carrier's output is rescaled, and not the module's input."""
        return self.in_place and self._carrier is not None and self._carrier.in_place()

    def product(self, adapters: tuple[str, ...]) -> Tensor:
        """The product of the adapters' vectors, `Activation.factor_shape`."""
        product = self.vector(adapters[0])
        for name in adapters[1:]:
            product = product * self.vector(name)
        shape = self.activation.factor_shape
        # A decoded token asks a hundred times, and flattening costs half of a reshape.
        return product.flatten() if len(shape) == 1 else product.reshape(shape)

    @property
    def routed(self) -> bool:
        """Whether hooks are there, and ask for a route."""
        return self._routed

    def factor(self, activation: Tensor) -> Tensor | None:
        """What an activation here is multiplied by now; `None` for nothing."""
        if self._routed:
            is_routed_here, factor = factor_of(self, activation)
            if is_routed_here:
                return factor  # type: ignore[no-any-return]
        calls, active = self._calls, self.active
        if not calls.disturbed:
            product = self.product(active) if active else None
            # Asked last: nothing changes before it says so.
            if not calls.disturbed:
                return product
        return self._seen_product()

    def _inner_factor(self) -> Tensor | None:
        if self._routed and is_routed(self):
            return None
        calls, active = self._calls, self.active
        if not calls.disturbed:
            product = self.product(active) if active else None
            if not calls.disturbed:  # as in `factor`
                return product
        return self._seen_product()

    def _seen_product(self) -> Tensor | None:
        """The product of what this call began with."""
        names = seen(self)
        if not names:
            return None
        product = reduce(torch.mul, map(self.seen_vector, names))
        return product.reshape(self.activation.factor_shape)

    def seen_vector(self, adapter: str) -> Tensor:
        """An adapter's vector, `Activation.shape`, as this call began with it."""
        vector = self.vector(adapter)
        # In this order, and as a view: other values get other memory.
        vector = vector.view_as(vector)
        changed = self._calls.disturbed and kept(self, adapter) is not None
        return self._kept(adapter) if changed else vector


class SplitSite(Site):
    """A site at an activation of which each process has a part; the vectors are whole on all."""

    def __init__(self, target: Target, carrier: Carrier | None, part: Part) -> None:
        super().__init__(target, carrier)
        self._part = part

    def factor(self, activation: Tensor) -> Tensor | None:
        factor = super().factor(activation)
        return None if factor is None else self._part.of(factor)


def site_of(module: nn.Module) -> Site | None:
    site = module._modules.get(ATTRIBUTE)
    return site if isinstance(site, Site) else None


def check_free(model: nn.Module, module: nn.Module, target: Target) -> None:
    """Raise `IA3Error` where the module, as it is now, cannot get a site for this target."""
    site = site_of(module)
    if site is not None and site.side != target.side:
        raise IA3Error(
            f"module {target.name!r}: this adapter rescales its {target.side}, another one on this "
            f"model its {site.side}; adapters of one model must agree on feedforward_modules"
        )
    if saved_module_of(module) is not None:
        raise IA3Error(
            f"module {target.name!r} is in another adapter's modules_to_save: it cannot be "
            "rescaled as well"
        )
    part_of(model, module, target)
    if target.side == "inner":
        experts.check_forward(module)


def place(model: nn.Module, module: nn.Module, target: Target, held: Mapping[int, int]) -> Site:
    """The module's site, registered on it now if it has none; `held` as for `carrier_of`."""
    site = site_of(module)
    if site is None:
        # By default compiled code does not look whether hooks were added or removed since, and
        # would go on with the adapters that were active when it was compiled.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        inner = target.side == "input"
        carrier = carrier_of(model, target.name, held) if inner else None
        part = part_of(model, module, target)
        site = Site(target, carrier) if part is None else SplitSite(target, carrier, part)
        module.add_module(ATTRIBUTE, site)
    return site


def displace(module: nn.Module) -> None:
    """Take the site off a module, which is then what it was before `place`."""
    site = site_of(module)
    if site is not None:
        site.activate(module, ())
        # Calls that are running may be computing with it.
        site._calls.later(site.settle)
        del module._modules[ATTRIBUTE]


def _mask_name(adapter: str) -> str:
    # No adapter's name has white space.
    return f"{adapter} frozen"
