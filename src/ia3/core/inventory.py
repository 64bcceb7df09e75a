"""What adapters have put on a model: every site and every saved module, found by one walk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .names import ATTRIBUTE
from .route import LOCK
from .saved_modules import SavedModule
from .sites import Site


@dataclass(frozen=True)
class Contents:
    """A model's modules, and what adapters have put on them.

    Attributes:
        modules: name -> module, in the model's order.
        sites: the base module's name, the module, and the site on it.
        copies: the base module's name, the module, and the copies of it.
    """

    modules: dict[str, nn.Module]
    sites: list[tuple[str, nn.Module, Site]]
    copies: list[tuple[str, nn.Module, SavedModule]]


def contents(model: nn.Module) -> Contents:
    """A model's contents now."""
    modules = dict(model.named_modules())
    on = [(name, m, m._modules.get(ATTRIBUTE)) for name, m in modules.items()]
    return Contents(
        modules,
        [(name, module, site) for name, module, site in on if isinstance(site, Site)],
        [(name, module, saved) for name, module, saved in on if isinstance(saved, SavedModule)],
    )


def sites(model: nn.Module) -> list[tuple[str, nn.Module, Site]]:
    """Every site on a model: the base module's name, the module and the site."""
    return contents(model).sites


class Inventory:
    """A model's contents, kept until a module comes, goes or is replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Every dict of children, and what was in it when the contents were found.
        self._held: list[dict[str, nn.Module | None]] = []
        self._seen: list[dict[str, nn.Module | None]] = []
        self._contents: Contents | None = None

    def now(self) -> Contents:
        """The model's contents as they are now."""
        with LOCK:
            # Lists and dicts compare their items by identity first, in C.
            if self._contents is None or self._held != self._seen:
                found = contents(self.model)
                self._held = [module._modules for module in found.modules.values()]
                self._seen = [dict(children) for children in self._held]
                self._contents = found
            return self._contents

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its own.
        return vars(Inventory(self.model))
