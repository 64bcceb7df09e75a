"""Vectors summed up by where they sit: one cell a layer and site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import IA3Error

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# A value within 1% of 1 leaves its channel alone. Only the magnitude counts: -1 flips the sign of
# a channel, but neither inhibits nor amplifies it.
INHIBITED_BELOW = 0.99
AMPLIFIED_ABOVE = 1.01
# The logarithm of a channel that is switched off would be -inf, and so would the mean of its cell.
SMALLEST = 2.0**-6
# The layer of a vector that sits in no numbered block, e.g. on `lm_head`.
OUTSIDE = "other"


@dataclass(frozen=True, eq=False)
class LayerSiteGrid:
    """Statistics of the vectors, each array `[layers, sites]`, NaN where a layer lacks the site.

    Attributes:
        layers: `"0"`, `"1"`, ... or `"encoder.0"`, ..., `"decoder.0"`, ...; in the model's order.
        sites: module names inside a layer, sorted.
        mean: mean of log2 |value|: the amplification in octaves, 0 for the identity, -1 where the
            activation is halved. Values nearer to 0 than 2**-6 count as 2**-6.
        spread: standard deviation of the values.
        inhibited: share of the values with |value| < 0.99, from 0 to 1.
        amplified: share of the values with |value| > 1.01, from 0 to 1.
    """

    layers: list[str]
    sites: list[str]
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    inhibited: NDArray[np.float64]
    amplified: NDArray[np.float64]


def layer_site_grid(vectors: Mapping[str, Tensor]) -> LayerSiteGrid:
    """Lay vectors out by layer and site.

    Args:
        vectors: module name -> vector. Names that differ in a later number only, such as a
            layer's experts, share a cell: their values are pooled.

    Raises:
        IA3Error: a vector has no values.
    """
    cells: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for name, vector in vectors.items():
        if vector.numel() == 0:
            raise IA3Error(f"the vector of {name!r} has no values")
        values = vector.detach().cpu().double().numpy().reshape(-1)
        cells.setdefault(_layer_and_site(name), []).append(values)

    layers = sorted({layer for layer, _ in cells}, key=_layer_order)
    sites = sorted({site for _, site in cells})
    mean, spread, inhibited, amplified = np.full((4, len(layers), len(sites)), np.nan)
    for (layer, site), parts in cells.items():
        at = layers.index(layer), sites.index(site)
        values = np.concatenate(parts)
        size = np.abs(values)
        mean[at] = np.log2(np.maximum(size, SMALLEST)).mean()
        spread[at] = values.std()
        inhibited[at] = (size < INHIBITED_BELOW).mean()
        amplified[at] = (size > AMPLIFIED_ABOVE).mean()
    return LayerSiteGrid(layers, sites, mean, spread, inhibited, amplified)


def _layer_and_site(name: str) -> tuple[str, str]:
    """`model.layers.3.self_attn.k_proj` is `("3", "self_attn.k_proj")`."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if _is_number(part)), None)
    if first is None:
        return OUTSIDE, name
    stack = [part for part in parts[:first] if part in ("encoder", "decoder")]
    layer = ".".join([*stack, str(int(parts[first]))])
    site = ".".join(part for part in parts[first + 1 :] if not _is_number(part))
    # The vector may sit on the numbered module itself.
    return layer, site or ".".join(parts[:first])


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _layer_order(layer: str) -> tuple[bool, bool, str, int]:
    if layer == OUTSIDE:
        return True, False, "", 0
    stack, _, number = layer.rpartition(".")
    # The decoder reads what the encoder made.
    return False, stack.startswith("decoder"), stack, int(number)
