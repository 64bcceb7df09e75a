"""What adapters have put on a model: every site and every saved module, found by one walk."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from operator import contains
from typing import Any

from torch import nn

from .names import ATTRIBUTE, Target
from .route import LOCK
from .saved_modules import SavedModule
from .sites import Site, site_of


@dataclass
class Contents:
    """A model's modules, and what adapters have put on them.

    Attributes:
        modules: name -> module, in the model's order.
        sites: the base module's name, the module, and the site on it.
        copies: the base module's name, the module, and the copies of it.
        states: of all sites.
        targets: what was chosen from these modules before, by whatever it was chosen by.
        ready: when adapters were activated last, all sites got their hooks, for routes or not, and
            all of these adapters; `None` where that was not so, or what is merged or fused has
            changed since.
    """

    modules: dict[str, nn.Module]
    sites: list[tuple[str, nn.Module, Site]]
    copies: list[tuple[str, nn.Module, SavedModule]]
    targets: dict[Hashable, list[Target]] = field(default_factory=dict)
    ready: bool | None = None

    def __post_init__(self) -> None:
        self.states = [site.site_state for _, _, site in self.sites]

    def vectors(self) -> list[dict[str, nn.Parameter | None]]:
        """Each site's, by adapter."""
        return [state.vectors for state in self.states]


_Children = dict[str, nn.Module | None]
_NO_CHILDREN: _Children = {}


class Inventory:
    """What adapters have put on a model's modules: found by one walk, and kept.

    The walk is done again where any module came, went or was replaced.

    Args:
        model: the base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Each module's children, the dict that holds them and what was in it; and what was found.
        # Put in place at once, as other threads look.
        self._known: tuple[list[_Children], list[_Children], Contents] | None = None

    def now(self) -> Contents:
        """The model as it is now."""
        with LOCK:
            # Lists and dicts compare by identity first, at the speed of C.
            known = self._known
            if known is not None and known[0] == known[1]:
                return known[2]
            modules = dict(self.model.named_modules())
            # Nothing is ever put on a site.
            held = [module._modules for module in modules.values() if type(module) is not Site]
            # One dict for all that are empty: this is read often, and slow to come from memory.
            # Before sites are looked for: what comes after that is seen the next time.
            copied = [dict(c) if c else _NO_CHILDREN for c in held]
            on = [(name, m, m._modules.get(ATTRIBUTE)) for name, m in modules.items()]
            found = Contents(
                modules,
                [(name, module, site) for name, module, site in on if isinstance(site, Site)],
                [
                    (name, module, held)
                    for name, module, held in on
                    if isinstance(held, SavedModule)
                ],
            )
            self._known = held, copied, found
            return found

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its own.
        return {"model": self.model, "_known": None}


def activate(found: Contents, adapters: tuple[str, ...], routed: bool) -> None:
    """`Site.activate` at all sites of a model.

    From one adapter to another mostly nothing but a name changes at each site.
    """
    vectors = found.vectors()
    if (
        adapters
        and found.ready is routed
        and all(all(map(contains, vectors, repeat(name))) for name in adapters)
    ):
        for state in found.states:
            state.active = adapters
            state.kept = None
        return
    # An interruption leaves some sites as they were.
    found.ready = None
    ready = True
    for _, module, site in found.sites:
        site.activate(module, adapters, routed)
        ready = ready and bool(site._handles) and len(site.site_state.active) == len(adapters)
    found.ready = routed if ready else None


def sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, Site]]:
    """Every site on a model: the base module's name, the module and the site."""
    for name, module in list(model.named_modules()):
        site = site_of(module)
        if site is not None:
            yield name, module, site
