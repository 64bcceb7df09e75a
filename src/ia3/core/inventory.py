"""What adapters have put on a model: every site and every saved module, found by one walk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .names import ATTRIBUTE, own_names
from .route import LOCK
from .saved_modules import SavedModule
from .sites import Site


@dataclass(frozen=True)
class Contents:
    """A model's modules, and what adapters have put on them: on which, and under what name.

    Names are the modules' own, whatever wrappers are around them.
    """

    modules: dict[str, nn.Module]
    sites: list[tuple[str, nn.Module, Site]]
    copies: list[tuple[str, nn.Module, SavedModule]]


def contents(model: nn.Module) -> Contents:
    return _contents(dict(model.named_modules()))


def _contents(walked: dict[str, nn.Module]) -> Contents:
    modules = own_names(walked)
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
        with LOCK:
            # Lists and dicts compare their items by identity first, in C.
            if self._contents is None or self._held != self._seen:
                walked = dict(self.model.named_modules())
                found = _contents(walked)
                self._held = [module._modules for module in walked.values()]
                self._seen = [dict(children) for children in self._held]
                self._contents = found
            return self._contents

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its own.
        return vars(Inventory(self.model))
