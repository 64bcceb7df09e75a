"""What a config would rescale, in a table for people."""

from __future__ import annotations

import math
from collections import Counter

from torch import nn

from ..core.names import Target, model_type_of
from .config import IA3Config
from .resolve import resolve


def explain(model: nn.Module, config: IA3Config | None = None) -> None:
    """Print which modules of a model would be rescaled, how many values, and why.

    Args:
        model: the base model, which is not changed; it may be on the meta device.
        config: what to rescale; the defaults if not given.

    Raises:
        IA3Error: the config does not fit the model.
    """
    print(explanation(model, config or IA3Config()))


def explanation(model: nn.Module, config: IA3Config) -> str:
    """A table: which modules, which side, how many values, and why.

    Modules that differ only in the number of their layer share a line.

    Raises:
        IA3Error: the config does not fit the model.
    """
    _, targets = resolve(model, config)
    rows = [("module", "side", "times", "values", "why")]
    kinds = Counter(_kind(target) for target in targets)
    first = {_kind(target): target for target in reversed(targets)}
    for kind in dict.fromkeys(_kind(target) for target in targets):
        target, times = first[kind], kinds[kind]
        name = kind[0] if times > 1 else target.name
        rows.append((name, target.side, str(times), f"{_values(target):,}", target.why))
    total = sum(_values(target) for target in targets)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  "
        f"{row[3]:>{widths[3]}}  {row[4]}"
        for row in rows
    ]
    model_type = model_type_of(model)
    title = type(model).__name__ + (f" ({model_type})" if model_type != "None" else "")
    modules = "1 module" if len(targets) == 1 else f"{len(targets)} modules"
    frozen = sum(end - start for target in targets for start, end in target.frozen)
    stay = f", {frozen:,} of them stay one" if frozen else ""
    return "\n".join([title, *lines, f"{modules}, {total:,} values, {4 * total:,} bytes{stay}"])


def _kind(target: Target) -> tuple[str, str, tuple[int, ...], object, str]:
    name = ".".join("*" if part.isdigit() else part for part in target.name.split("."))
    return name, target.side, target.activation.shape, target.frozen, target.why


def _values(target: Target) -> int:
    return math.prod(target.activation.shape)
