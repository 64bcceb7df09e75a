"""What the other folders share: where vectors are registered, and what a target is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Reading an adapter's files needs no torch, which takes seconds to import.
    from torch import nn

    from .activations import Activation, Side

# The name under which a module's vectors are registered on it.
ATTRIBUTE = "ia3_l"

# Half-open ranges of a vector that stay exactly one: the query part of a fused projection.
Frozen = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Target:
    """A module to rescale: its name, which side of it, and the activation there."""

    name: str
    side: Side
    activation: Activation
    frozen: Frozen = ()
    why: str = ""


def model_type_of(model: nn.Module) -> str:
    """The architecture, as its config names it: `"llama"`."""
    return str(getattr(getattr(model, "config", None), "model_type", None))


def base_modules(model: nn.Module) -> list[str]:
    """The names of the model's own modules: not what adapters have put on them."""
    return own_modules(dict(model.named_modules()))


def own_modules(modules: Mapping[str, nn.Module]) -> list[str]:
    """Those of a model's modules that are its own, by name: not what adapters have put on them."""
    return [name for name in modules if name and ATTRIBUTE not in name.split(".")]


def starred(name: str) -> str:
    """A module's name with a star for the number of its layer: `layers.*.k_proj`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
