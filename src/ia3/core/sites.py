"""The vectors at one activation: attach and detach.

A `Site` is a small module registered on the base module as `ia3_l`; it never replaces or wraps it.
Its vectors are its parameters, one per adapter, so that they move, save and train with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
from torch.compiler import is_compiling

from ..errors import IA3Error
from . import experts
from .hooks import Input, OutputHandle
from .mlp import Carrier, Carriers
from .names import ATTRIBUTE, Frozen, Target
from .patch import refuse_replica
from .route import factor_of, is_routed
from .saved_modules import allow_plain_checkpoint, saved_module_of

Handle = Input | OutputHandle | experts.Handle


@dataclass(frozen=True, slots=True)
class _Kept:
    """A product of vectors that was computed before.

    Attributes:
        active: the adapters; as an object, which is another one after each activation.
        vectors: name, vector, and what tells that its values are others by now.
        product: as `Site.product` gives it.
    """

    active: tuple[str, ...]
    vectors: tuple[tuple[str, Tensor, int, int], ...]
    product: Tensor


class SiteState:
    """What a site's hooks ask for at each call.

    A decoder's calls are so short that it shows how much memory is looked at, and each of its
    matrices throws all else out of the caches: these few things lie together.

    Args:
        vectors: the site's own dict of them.

    Attributes:
        active: the adapters whose vectors multiply now.
        routed: a route may be on, which is asked before the active adapters are.
        in_place: rescale where it costs the least memory; else by the plain product, at the module
            itself.
        carrier: of a down projection's input, the layer whose output is rescaled instead.
        kept: the product of the active adapters' vectors.
    """

    __slots__ = ("active", "carrier", "in_place", "kept", "routed", "vectors")

    def __init__(self, vectors: dict[str, nn.Parameter | None]) -> None:
        self.vectors = vectors
        self.active: tuple[str, ...] = ()
        self.routed = False
        self.in_place = True
        self.carrier: Carrier | None = None
        self.kept: _Kept | None = None

    def kept_product(self) -> Tensor | None:
        """The product of the active adapters' vectors, if it is kept and holds here and now."""
        kept = self.kept
        if (
            kept is None
            or kept.active is not self.active
            # The vectors may be about to change, by an optimizer that leaves no trace.
            or is_grad_enabled()
            or are_functorch_transforms_active()
        ):
            return None
        for name, vector, pointer, version in kept.vectors:
            if (
                self.vectors.get(name) is not vector
                or vector._version != version
                or vector.data_ptr() != pointer
            ):
                return None
        return kept.product

    def is_carried(self) -> bool:
        """Whether the carrier's output is rescaled, and not the module's input."""
        return self.in_place and self.carrier is not None and self.carrier.in_place()


class Site(nn.Module):
    """Every adapter's vector at one activation of one base module.

    Vectors have PEFT's shapes (`Activation.shape`) and are float32 whatever the base's dtype.

    Attributes:
        site_state: what it does now.
        in_block: the fused layer that the module is part of multiplies by the vectors (fusing.py).
        banked: a bank has values for it, so that it stays without vectors of its own.
        merged: the adapters that are part of the weights.
        must_be_hook: where it finds none, the module's parent never calls it.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.side = target.side
        self.activation = target.activation
        self.frozen: dict[str, Frozen] = {}
        self.site_state = SiteState(self._parameters)
        self.banked = False
        self.merged: tuple[str, ...] = ()
        self.in_block = False
        self.must_be_hook = False
        self._handles: tuple[Handle, ...] = ()
        # Whether these are in place, all of them.
        self._settled = True
        self.register_load_state_dict_post_hook(allow_plain_checkpoint)  # type: ignore[no-untyped-call]

    _replicate_for_data_parallel = refuse_replica

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """Adapter name -> vector."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Whoever shards parameters puts a dict of theirs in this one's place.
        if name == "_parameters" and "site_state" in self.__dict__:
            self.site_state.vectors = value

    def __contains__(self, adapter: object) -> bool:
        return self._parameters.get(adapter) is not None  # type: ignore[call-overload]

    def __getitem__(self, adapter: str) -> nn.Parameter:
        vector = self._parameters[adapter]
        assert vector is not None
        return vector

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Site:
        # Casting the base to half precision leaves the vectors float32: steps of training are
        # smaller than half precision's around one.
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.itemsize < 4
            return tensor.to(moved.device, torch.float32) if narrow else moved

        super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]
        return self

    def add(self, adapter: str, vector: Tensor, frozen: Frozen = ()) -> None:
        """Store a vector of `Activation.shape` under an adapter's name, not to be trained yet.

        Args:
            frozen: half-open ranges of it that count as one whatever the vector holds.
        """
        if frozen:
            mask = torch.zeros(self.activation.dim, dtype=torch.bool)
            for start, end in frozen:
                mask[start:end] = True
            name = _mask_name(adapter)
            self._non_persistent_buffers_set.add(name)
            self._buffers[name] = mask.reshape(self.activation.shape).to(vector.device)
        # Not register_parameter: it refuses names that are also methods of this class ("product").
        self._parameters[adapter] = nn.Parameter(vector, requires_grad=False)
        if frozen:
            self.frozen[adapter] = frozen

    def target(self, name: str) -> Target:
        """What this site rescales, `name` being its module's."""
        return Target(name, self.side, self.activation)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        with torch.no_grad():
            for adapter in self.frozen:
                self[adapter].copy_(self.vector(adapter))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def remove(self, adapter: str) -> None:
        """Forget an adapter's vector, and what was stored of one that was not stored whole."""
        # First, as a state dict asks for the vectors that are in it.
        self.frozen.pop(adapter, None)
        self._parameters.pop(adapter, None)
        name = _mask_name(adapter)
        self._buffers.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def vector(self, adapter: str) -> Tensor:
        """An adapter's vector, `Activation.shape`, with its frozen values one."""
        vector: Tensor = self[adapter]
        if vector.is_meta and hasattr(self, "_hf_hook"):
            # accelerate brings a module's tensors for its forward, and a site has none.
            hook: Any = self._hf_hook
            vector = hook.weights_map[adapter].to(hook.execution_device)
        if adapter in self.frozen:
            mask = self._buffers[_mask_name(adapter)]
            assert mask is not None
            # Not the gradient alone: weight decay would move the values too.
            vector = vector.masked_fill(mask, 1.0)
        return vector

    def reader(self, adapter: str) -> Callable[[], Tensor]:
        """Gives `vector`, also when the adapter has been removed since."""
        vector, mask = self[adapter], self._buffers.get(_mask_name(adapter))

        def read() -> Tensor:
            if self._parameters.get(adapter) is vector:
                return self.vector(adapter)
            return vector if mask is None else vector.masked_fill(mask.to(vector.device), 1.0)

        return read

    def is_frozen(self, adapter: str) -> Tensor:
        """Which values of an adapter's vector count as one, `Activation.shape`, bool."""
        mask = self._buffers.get(_mask_name(adapter))
        return torch.zeros_like(self[adapter], dtype=torch.bool) if mask is None else mask

    def activate(self, module: nn.Module, adapters: tuple[str, ...], routed: bool = False) -> None:
        """Rescale by the product of these adapters' vectors from now on.

        Adapters without a vector here are left out; with none left, no hook stays installed.

        Args:
            routed: a route may be on: have the hooks there, and ask for it.
        """
        here = adapters
        for name in adapters:
            if self._parameters.get(name) is None:
                here = tuple(name for name in adapters if name in self)
                break
        if self.merged:
            # What is merged takes the place of what is active, or is part of it.
            among = set(self.merged) <= set(here)
            here = tuple(name for name in here if name not in self.merged) if among else ()
        state = self.site_state
        state.active = here
        state.kept = None
        state.routed = routed
        # Experts are not routed: at most they have nothing to do.
        wanted = (bool(here) or (routed and self.side != "inner")) and not self.in_block
        if wanted is not bool(self._handles) or not self._settled:
            # An interruption leaves some of them in place: the next time they are known still.
            self._settled = False
            for handle in self._handles:
                handle.remove()
            self._handles = self._hooks(module) if wanted else ()
            for handle in self._handles:
                handle.install()
            self._settled = True

    def _hooks(self, module: nn.Module) -> tuple[Handle, ...]:
        if self.side == "inner":
            return (experts.rescaling(module, self._inner_product),)
        if self.side == "output":
            return (OutputHandle(module, self),)
        carrier = self.site_state.carrier
        if carrier is None:
            return (Input(module, self),)
        return Input(module, self), OutputHandle(carrier.module, self, carried=True)

    def product(self, adapters: tuple[str, ...]) -> Tensor:
        """The product of the adapters' vectors, `Activation.factor_shape`."""
        product = self.vector(adapters[0])
        for name in adapters[1:]:
            product = product * self.vector(name)
        return product.reshape(self.activation.factor_shape)

    def active_product(self) -> Tensor | None:
        """The product of the active adapters' vectors; computed once where no gradient is wanted.

        Not kept where values can change without a trace (meta device, inference mode, vectors that
        compiled code or a fused optimizer may be training), or are no values at all (traced code).
        `None` where none is active.
        """
        state = self.site_state
        # Another thread may activate others meanwhile.
        active = state.active
        if not active:
            return None
        if is_compiling():
            return self.product(active)
        kept = state.kept_product()
        if kept is not None:
            return kept
        try:
            product = self.product(active)
            vectors = [(name, self[name]) for name in active]
        except KeyError:
            if state.active is active:
                raise
            # Another thread has activated others, and deleted one of these.
            return self.active_product()
        if is_grad_enabled() or are_functorch_transforms_active():
            state.kept = None
            return product
        if all(
            type(v) is nn.Parameter and not v.is_inference() and not v.is_meta for _, v in vectors
        ) and (
            # One vector's product mostly shares its memory, and so has whatever happens to it.
            product.data_ptr() == vectors[0][1].data_ptr()
            or not any(v.requires_grad for _, v in vectors)
        ):
            product = product.detach()
            seen = tuple((name, v, v.data_ptr(), v._version) for name, v in vectors)
            state.kept = _Kept(active, seen, product)
        return product

    def is_routed(self) -> bool:
        """Whether a route says what to do here now, and not the active adapters."""
        return self.site_state.routed and _is_routed(self)

    def factor(self, activation: Tensor) -> Tensor | None:
        """What an activation here is multiplied by now; `None` for nothing."""
        return _factor_of(self, activation) if self.is_routed() else self.active_product()

    def _inner_product(self) -> Tensor | None:
        return None if self.is_routed() else self.active_product()


def site_of(module: nn.Module) -> Site | None:
    """The site registered on a module, if it has one."""
    site = module._modules.get(ATTRIBUTE)
    return site if isinstance(site, Site) else None


def _is_routed(site: Site) -> bool:
    return _is_routed_uncompiled(site) if is_compiling() else is_routed(site)


def _factor_of(site: Site, activation: Tensor) -> Tensor | None:
    if is_compiling():
        factor: Tensor | None = _factor_of_uncompiled(site, activation)
        return factor
    return factor_of(site, activation)


# A compiler breaks its graph at these: it knows no thread's route. To others they cost time.
_is_routed_uncompiled = torch.compiler.disable(is_routed)  # type: ignore[no-untyped-call]
_factor_of_uncompiled = torch.compiler.disable(factor_of)  # type: ignore[no-untyped-call]


def check_free(module: nn.Module, target: Target) -> None:
    """Raise `IA3Error` where another adapter's use of the module rules this one out."""
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


def place(module: nn.Module, target: Target, carriers: Carriers) -> Site:
    """The module's site, registered on it now if it has none."""
    site = site_of(module)
    if site is None:
        # By default compiled code does not look whether hooks were added or removed since, and
        # would go on with the adapters that were active when it was compiled.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        site = Site(target)
        if site.side == "input":
            site.site_state.carrier = carriers.of(target.name)
        site.must_be_hook = isinstance(carriers.parent(target.name), nn.TransformerEncoderLayer)
        module.add_module(ATTRIBUTE, site)
    return site


def displace(module: nn.Module) -> None:
    """Take the site off a module, which is then what it was before `place`."""
    site = site_of(module)
    if site is not None:
        site.activate(module, ())
        del module._modules[ATTRIBUTE]


def _mask_name(adapter: str) -> str:
    # No adapter's name has white space.
    return f"{adapter} frozen"
