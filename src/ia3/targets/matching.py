"""PEFT's rules for which modules an entry of a config names, and the entries that name given ones.

A string is a regular expression that must match the whole name. An entry of a list names the module
of that very name and all modules whose names end in a dot and the entry.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from ..core.names import base_modules
from ..errors import IA3Error

if TYPE_CHECKING:
    from torch import nn


def matches(name: str, modules: Iterable[str] | str) -> bool:
    """Whether `target_modules` or `exclude_modules` name a module."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def matches_feedforward(name: str, modules: Iterable[str] | str) -> bool:
    """Whether `feedforward_modules` name a module: an entry may be the end of its last part too.

    The side decides a vector's shape, so that the rule must be PEFT's.
    """
    if isinstance(modules, str):
        return matches(name, modules)
    return any(name.endswith(module) for module in modules)


def feedforward_among(
    targets: Iterable[str], feedforward: Iterable[str]
) -> tuple[list[str], list[str]]:
    """The same choice with the feed-forward entries a subset of the targets: (targets, those).

    PEFT wants a subset, but writes its own defaults whatever the targets. A longer target
    (`mlp.down_proj` for `down_proj`) stands in for the entry, an entry inside a wider target
    (`mlp.c_proj` in `c_proj`) is named among the targets too, and one outside all is dropped.
    """
    pairs = [(target, module) for target in targets for module in feedforward]
    longer = {target for target, module in pairs if target.endswith(module)}
    inside = {module for target, module in pairs if module.endswith(f".{target}")}
    return sorted({*targets, *inside}), sorted(longer | inside)


def names_or_suffixes(
    model: nn.Module, names: Sequence[str], apart_from: Collection[str] = ()
) -> list[str]:
    """The shortest list of entries that names exactly these modules of the model, sorted.

    An entry is a module's last part where that suffices, its whole name where nothing shorter does.
    No entry ends, dot or not, a name in `apart_from`: the outputs' names, where the entries are for
    `feedforward_modules`. Raises `IA3Error` if a name is no module's, or ends another's.
    """
    everywhere = Counter(end for name in base_modules(model) for end in _ends(name))
    wanted = Counter(end for name in set(names) for end in _ends(name))

    def names_no_other(end: str) -> bool:
        return everywhere[end] == wanted[end] and not any(n.endswith(end) for n in apart_from)

    entries = set()
    for name in names:
        # The shortest covers all that longer ones cover: taking it for each name gives the fewest.
        entry = next(filter(names_no_other, _ends(name)), None)
        if entry is None:
            raise IA3Error(
                f"module {name!r} of {type(model).__name__} cannot be selected by its name, which "
                "is not there or ends another module's: give target_modules as a regular expression"
            )
        entries.add(entry)
    return sorted(entries)


def _ends(name: str) -> list[str]:
    """A name's dotted suffixes, shortest first, the whole name last."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
