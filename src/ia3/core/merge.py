"""What is merged into a base model, and what was there before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import IA3Error
from . import quantized
from .activations import Side
from .folding import Change, fold, is_finite, owner_of, read, write
from .inventory import sites
from .names import ATTRIBUTE
from .sites import displace, site_of


class Merge:
    """The adapters merged into one base model; none at first."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Module and slot -> what stood there before.
        self._originals: dict[tuple[str, str], Any] = {}

    @property
    def adapters(self) -> set[str]:
        """The names of the merged adapters."""
        if not self._originals:
            return set()
        return {name for _, _, site in sites(self.model) for name in site.merged}

    def make(self, adapters: tuple[str, ...], safe: bool) -> None:
        """Have just these adapters merged, all from the original weights.

        Args:
            adapters: in the order in which they multiply.
            safe: refuse a result that is not finite.

        Raises:
            IA3Error: a weight cannot take a vector exactly, is shared with another module, or (with
                `safe`) would not be finite; nothing has changed then.
        """
        before = {spot: read(*self._slot(spot)) for spot in self._originals}
        try:
            self._write(self._originals)
            changes = self._changes(adapters)
            if safe:
                _check_finite(changes, adapters)
            originals = {
                (change.name, change.slot): read(*self._slot((change.name, change.slot)))
                for change in changes
            }
        except BaseException:  # memory may run out
            self._write(before)
            raise
        self._originals = {**originals, **self._originals}
        self._write({(change.name, change.slot): change.value for change in changes})
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

    def dequantise(self, adapters: tuple[str, ...]) -> dict[str, nn.Module]:
        """Put ordinary linear layers where quantized ones cannot take these adapters exactly.

        Returns:
            The quantized layers, for `requantise`.
        """
        replaced: dict[str, nn.Module] = {}
        for name, module, site in sites(self.model):
            here = tuple(adapter for adapter in adapters if adapter in site)
            if not here or not quantized.is_quantized(module):
                continue
            try:
                owner, side = owner_of(self.model, name, site.side)
                self._fold(owner, {side: site.product(here).detach().flatten()})
            except IA3Error:
                self._put(name, quantized.dequantised(module, getattr(self.model, "dtype", None)))
                replaced[name] = module
        return replaced

    def requantise(self, replaced: Mapping[str, nn.Module]) -> None:
        """Put back the layers that `dequantise` took out."""
        for name, module in replaced.items():
            self._put(name, module)

    def _put(self, name: str, module: nn.Module) -> None:
        """Put a module in another one's place, and its site on it."""
        before = self.model.get_submodule(name)
        site = site_of(before)
        assert site is not None
        active = site.active
        displace(before)
        module.add_module(ATTRIBUTE, site)
        site.activate(module, active)
        parent, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(parent), last, module)

    def _changes(self, adapters: tuple[str, ...]) -> list[Change]:
        scales: dict[str, dict[Side, Tensor]] = {}
        for name, _, site in sites(self.model):
            here = tuple(adapter for adapter in adapters if adapter in site)
            if here:
                owner, side = owner_of(self.model, name, site.side)
                product = site.product(here).detach()
                product = product if side == "inner" else product.flatten()
                sides = scales.setdefault(owner, {})
                sides[side] = sides[side] * product if side in sides else product
        sharing = _sharing(self.model)
        changes = []
        for name, sides in scales.items():
            for change in self._fold(name, sides):
                other = sharing.get((name, change.slot.split(".")[0]))
                if other is not None:
                    raise IA3Error(
                        f"cannot merge into {name}.{change.slot}: {other!r} shares it and would "
                        "change too"
                    )
                changes.append(change)
        return changes

    def _fold(self, name: str, scales: Mapping[Side, Tensor]) -> list[Change]:
        return fold(self.model.get_submodule(name), name, scales)

    def _slot(self, spot: tuple[str, str]) -> tuple[nn.Module, str]:
        return self.model.get_submodule(spot[0]), spot[1]

    def _write(self, values: Mapping[tuple[str, str], Any]) -> None:
        for spot, value in values.items():
            write(*self._slot(spot), value)


def _check_finite(changes: Sequence[Change], adapters: Sequence[str]) -> None:
    for change in changes:
        if not is_finite(change.value):
            raise IA3Error(
                f"merging {list(adapters)} into {change.name}.{change.slot} gives values that are "
                "not finite; nothing was merged"
            )


def _sharing(model: nn.Module) -> dict[tuple[str, str], str]:
    """Module and parameter name -> another module that has the very same parameter."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for slot, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, slot))
    return {
        spot: next(name for name, _ in spots if name != spot[0])
        for spots in owners.values()
        if len({name for name, _ in spots}) > 1
        for spot in spots
    }
