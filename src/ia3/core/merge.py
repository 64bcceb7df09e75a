"""Merging adapters into a model's weights, and putting the very bits back.

What was there before is kept, so that unmerging restores it bit for bit (dividing by the vector
does not). All products are computed before the first is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import IA3Error
from . import quantized, weights
from .activations import Side
from .inventory import sites
from .mlp import read_mlp
from .names import ATTRIBUTE, module_at, modules_of, put_module
from .sites import displace, site_of
from .spread import any_spread

# A module's name, and one of its slots (see `weights`).
Spot = tuple[str, str]


class Merge:
    """The adapters merged into one base model; none at first."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._originals: dict[Spot, Any] = {}

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
            raise IA3Error(
                f"cannot merge {list(adapters)}: the model's weights are spread over processes "
                "(FSDP or tensor parallelism); save the adapter, and merge it into a model that is "
                "not"
            )
        before = self._read(self._originals)
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
        for _, _, site in sites(self.model):
            site.merged = tuple(name for name in adapters if name in site)

    def undo(self) -> None:
        """Put the original weights back, bit for bit."""
        self._write(self._originals)
        self.keep()

    def keep(self) -> None:
        """Let the original weights go: what is merged stays."""
        self._originals = {}
        for _, _, site in sites(self.model):
            site.merged = ()

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

    def _module(self, name: str) -> nn.Module:
        return module_at(self.model, name)

    def _read(self, spots: Iterable[Spot]) -> dict[Spot, Any]:
        return {(name, slot): weights.read(self._module(name), slot) for name, slot in spots}

    def _write(self, values: Mapping[Spot, Any]) -> None:
        for (name, slot), value in values.items():
            weights.write(self._module(name), slot, value)


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
