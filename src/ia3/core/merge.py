"""Merging adapters into a model's weights, and putting the very bits back.

What was there before is kept, so that unmerging restores it bit for bit (dividing by the vector
does not). All products are computed before the first is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import IA3Error, StateError
from . import quantized, weights
from .activations import Side
from .inventory import sites
from .mlp import read_mlp
from .names import ATTRIBUTE, module_at, modules_of, own_name, own_names, put_module
from .reached import describe, is_unreached
from .sites import displace, site_of
from .spread import any_spread

# A module's name, and one of its slots (see `weights`).
Spot = tuple[str, str]


class Merge:
    """The adapters merged into one base model; none at first."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._originals: dict[Spot, Any] = {}
        self._guards: list[RemovableHandle] = []

    @property
    def adapters(self) -> set[str]:
        """The names of the merged adapters."""
        if not self._originals:
            return set()
        return {name for _, _, site in sites(self.model) for name in site.merged}

    def make(self, adapters: tuple[str, ...], safe: bool) -> None:
        """Have just these adapters merged, all from the original weights.

        `safe` refuses a result that is not finite. Nothing has changed where it raises.
        """
        if any_spread(self.model):
            raise StateError(
                f"cannot merge {list(adapters)}: the model's weights are spread over processes "
                "(FSDP or tensor parallelism); save the adapter, and merge it into a model that is "
                "not"
            )
        before = self._read(self._originals)
        self._check_sizes()
        try:
            self._write(self._originals)
            values = self._products(adapters)
            for (name, slot), value in values.items():
                if safe and not weights.is_finite(value):
                    raise IA3Error(
                        f"merging {list(adapters)} into {name}.{slot} gives values that are not "
                        "finite; nothing was merged"
                    )
            originals = self._read(values) | self._originals
            before = originals | before
            self._write(values)
        except BaseException:  # memory may run out
            self._write(before)
            raise
        self._originals = originals
        self._guard()
        for _, _, site in sites(self.model):
            site.merged = tuple(name for name in adapters if name in site)

    def undo(self) -> None:
        """Put the original weights back, bit for bit."""
        self._check_sizes()
        self._write(self._originals)
        self.keep()

    def keep(self) -> None:
        """Let the original weights go: what is merged stays."""
        self._originals = {}
        self._guard()
        for _, _, site in sites(self.model):
            site.merged = ()

    def original(self, name: str, slot: str) -> Any:
        """What is in a module's slot when nothing is merged."""
        kept = self._originals.get((name, slot))
        return weights.read(self._module(name), slot) if kept is None else kept

    def dequantise(self, adapters: tuple[str, ...], replaced: dict[str, nn.Module]) -> None:
        """Put ordinary linear layers where quantized ones cannot take these adapters exactly.

        Args:
            replaced: gets the quantized layers as they go, for `requantise`.
        """
        for name, module, site in sites(self.model):
            here = tuple(adapter for adapter in adapters if adapter in site)
            if not here or not quantized.is_quantized(module):
                continue
            try:
                owner, side = self._owner(name, site.side)
                weights.products(self._module(owner), owner, {side: site.product(here).detach()})
            except IA3Error:
                self._put(name, quantized.dequantised(module, getattr(self.model, "dtype", None)))
                replaced[name] = module

    def requantise(self, replaced: Mapping[str, nn.Module]) -> None:
        """Put back the layers that `dequantise` took out."""
        for name, module in replaced.items():
            self._put(name, module)

    def _put(self, name: str, module: nn.Module) -> None:
        """Put a module in another one's place, and its site on it."""
        before = self._module(name)
        site = site_of(before)
        assert site is not None
        active = site.active
        displace(before)
        module.add_module(ATTRIBUTE, site)
        site.activate(module, active)
        put_module(self.model, name, module)

    def _products(self, adapters: tuple[str, ...]) -> dict[Spot, Any]:
        """What merging these adapters puts where."""
        having = [name for name, _, site in sites(self.model) if any(a in site for a in adapters)]
        unreached = [name for name in having if is_unreached(self.model, name)]
        if unreached:
            raise IA3Error(
                f"cannot merge {list(adapters)}: {describe(unreached)}, so that vectors there have "
                "no effect, and would have one when merged; leave these modules out "
                "(exclude_modules)"
            )
        vectors: dict[str, dict[Side, Tensor]] = {}
        for name, _, site in sites(self.model):
            here = tuple(adapter for adapter in adapters if adapter in site)
            if here:
                owner, side = self._owner(name, site.side)
                vector = site.product(here).detach()
                vector = vector if side == "inner" else vector.flatten()
                sides = vectors.setdefault(owner, {})
                sides[side] = sides[side] * vector if side in sides else vector
        # Before the weights of offloaded modules are fetched, which replaces their parameters.
        sharing = _sharing(self.model)
        values: dict[Spot, Any] = {}
        for name, sides in vectors.items():
            for slot, value in weights.products(self._module(name), name, sides).items():
                other = sharing.get((name, slot.split(".")[0]))
                if other is not None:
                    raise IA3Error(
                        f"cannot merge into {name}.{slot}: {other!r} shares it and would change too"
                    )
                values[name, slot] = value
        return values

    def _owner(self, name: str, side: Side) -> tuple[str, Side]:
        """Whose weights take a module's vector, on which side: its own or those of a layer before.

        The columns of a quantized weight share constants, its rows do not, so that a vector on the
        input of a quantized layer goes into the rows of the layer that feeds it.
        """
        module = self._module(name)
        if side != "input" or not quantized.is_quantized(module):
            return name, side
        parent, _, down = name.rpartition(".")
        mlp = read_mlp(self._module(parent), down, with_gate=False)
        if isinstance(mlp, str):
            raise IA3Error(
                f"cannot merge into {name!r}: a vector on the input of a quantized "
                f"{type(module).__name__} scales its columns, which share constants, and no layer "
                "before it can take the vector instead; merge with dequantise=True"
            )
        return f"{parent}.{mlp.up}".removeprefix("."), "output"

    def _guard(self) -> None:
        """Have merged weights refuse to be loaded, whichever module around them is loaded."""
        for handle in self._guards:
            handle.remove()
        slots: dict[str, set[str]] = {}
        for name, slot in self._originals:
            slots.setdefault(name, set()).add(slot.split(".")[0])
            while name:
                name = name.rpartition(".")[0]
                slots.setdefault(name, set())
        self._guards = [
            self._module(name).register_load_state_dict_pre_hook(_Guard(frozenset(own)))  # type: ignore[no-untyped-call]
            for name, own in slots.items()
        ]

    def _check_sizes(self) -> None:
        """Raise `IA3Error` where the original weights no longer fit their modules."""
        for name, slot in self._originals:
            now = self._module(name)._parameters.get(slot)
            before = self._originals[name, slot]
            if now is not None and now.shape != before.shape:
                raise StateError(
                    f"{name}.{slot} was {list(before.shape)} when adapters were merged into it and "
                    f"is {list(now.shape)} now, so that they cannot be unmerged: "
                    "merge_and_unload() keeps them merged"
                )

    def _module(self, name: str) -> nn.Module:
        return module_at(self.model, name)

    def _read(self, spots: Iterable[Spot]) -> dict[Spot, Any]:
        return {(name, slot): weights.read(self._module(name), slot) for name, slot in spots}

    def _write(self, values: Mapping[Spot, Any]) -> None:
        for (name, slot), value in values.items():
            weights.write(self._module(name), slot, value)


class _Guard:
    """A hook before `load_state_dict`, on modules with merged weights and on all around them.

    Unmerging would mix what is loaded with the originals. Names are found as the modules stand
    then: PEFT's wrappers may be around them.
    """

    def __init__(self, slots: frozenset[str]) -> None:
        self.slots = slots  # of the module itself

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: Any
    ) -> None:
        given = own_names(state_dict)
        for name, part in modules_of(module).items():
            hooks: Any = part._load_state_dict_pre_hooks.values()
            for wrapped in hooks:
                if not isinstance(guard := wrapped.hook, _Guard):
                    continue
                for slot in guard.slots:
                    key = own_name(f"{prefix}{name}.{slot}" if name else prefix + slot)
                    if key in given:
                        raise StateError(
                            f"cannot load {key!r}: adapters are merged into it, and unmerging them "
                            "would bring the former weight back; unmerge_adapter() first"
                        )


def _sharing(model: nn.Module) -> dict[Spot, str]:
    """Module and parameter name -> another module that has the very same parameter."""
    owners: dict[int, list[Spot]] = {}
    for name, module in modules_of(model).items():
        for slot, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, slot))
    return {
        spot: other
        for spots in owners.values()
        for spot in spots
        for other, _ in spots
        if other != spot[0]
    }
