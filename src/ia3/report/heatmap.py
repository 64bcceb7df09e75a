"""Statistics of vectors by layer and site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapter.similarity import log_scales
from ..errors import IA3Error

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..adapter.similarity import SiteDifference

# A value within 1% of 1 leaves its channel alone. Only the magnitude counts: -1 flips the sign of
# a channel, but neither inhibits nor amplifies it.
INHIBITED_BELOW = 0.99
AMPLIFIED_ABOVE = 1.01
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


@dataclass(frozen=True)
class Statistics:
    """Of the values of one vector or several, as in `LayerSiteGrid`."""

    mean: float
    spread: float
    inhibited: float
    amplified: float


def statistics(values: NDArray[Any]) -> Statistics:
    """Sum up values of any shape, at least one."""
    size = np.abs(values)
    return Statistics(
        mean=float(log_scales(values).mean()),
        spread=float(values.std()),
        inhibited=float((size < INHIBITED_BELOW).mean()),
        amplified=float((size > AMPLIFIED_ABOVE).mean()),
    )


def layer_site_grid(vectors: Mapping[str, Tensor | NDArray[Any]]) -> LayerSiteGrid:
    """Lay vectors out by layer and site.

    Args:
        vectors: module name -> vector. Names that differ in a later number only, such as a
            layer's experts, share a cell: their values are pooled.

    Raises:
        IA3Error: a vector has no values.
    """
    layers, sites, cells = _cells(vectors)
    grids = {each.name: np.full((len(layers), len(sites)), np.nan) for each in fields(Statistics)}
    for at, values in cells.items():
        for name, value in vars(statistics(values)).items():
            grids[name][at] = value
    return LayerSiteGrid(layers, sites, **grids)


@dataclass(frozen=True)
class SiteStatistics(Statistics):
    """Of one site over all layers: how many vectors and values it has, and their statistics."""

    site: str
    vectors: int
    values: int


def site_statistics(vectors: Mapping[str, NDArray[Any]]) -> list[SiteStatistics]:
    """The statistics of each site over all layers, the sites as in `LayerSiteGrid`."""
    pooled: dict[str, list[NDArray[Any]]] = {}
    for name, vector in vectors.items():
        pooled.setdefault(_layer_and_site(name)[1], []).append(vector.reshape(-1))
    joined = {site: np.concatenate(pooled[site]).astype(np.float64) for site in sorted(pooled)}
    return [
        SiteStatistics(
            **vars(statistics(values)), site=site, vectors=len(pooled[site]), values=values.size
        )
        for site, values in joined.items()
    ]


def mean_grid(grids: Sequence[LayerSiteGrid]) -> LayerSiteGrid:
    """The mean of each statistic over adapters, at least one, of those that have the cell."""
    layers = sorted({layer for grid in grids for layer in grid.layers}, key=_layer_order)
    sites = sorted({site for grid in grids for site in grid.sites})
    names = [each.name for each in fields(Statistics)]
    total, count = np.zeros((2, len(names), len(layers), len(sites)))
    for grid in grids:
        values = np.array([getattr(grid, name) for name in names])
        rows = [layers.index(layer) for layer in grid.layers]
        at = np.ix_(range(len(names)), rows, [sites.index(site) for site in grid.sites])
        total[at] += np.nan_to_num(values)
        count[at] += ~np.isnan(values)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return LayerSiteGrid(layers, sites, *means)


@dataclass(frozen=True, eq=False)
class DifferenceGrid:
    """How two adapters differ, each array `[layers, sites]`, NaN where neither has the site.

    Attributes:
        layers: as in `LayerSiteGrid`.
        sites: as in `LayerSiteGrid`.
        change: mean of log2 |second| − log2 |first|, in octaves.
        norm: ‖second − first‖ of the values themselves.
        cosine: of the two log-scales, the mean where several vectors share a cell; NaN also where
            one of the two is the identity.
    """

    layers: list[str]
    sites: list[str]
    change: NDArray[np.float64]
    norm: NDArray[np.float64]
    cosine: NDArray[np.float64]


def difference_grid(differences: Sequence[SiteDifference]) -> DifferenceGrid:
    """Lay differences out by layer and site; those that share a cell are pooled."""
    sums = {
        d.site: np.array(
            [d.values, d.values * d.change, d.norm**2, d.cosine is not None, d.cosine or 0]
        )
        for d in differences
    }
    layers, sites, cells = _cells(sums)
    change, norm, cosine = np.full((3, len(layers), len(sites)), np.nan)
    for at, parts in cells.items():
        values, changes, squares, known, cosines = parts.reshape(-1, 5).sum(0)
        change[at], norm[at] = changes / values, np.sqrt(squares)
        cosine[at] = cosines / known if known else np.nan
    return DifferenceGrid(layers, sites, change, norm, cosine)


def _cells(
    vectors: Mapping[str, Tensor | NDArray[Any]],
) -> tuple[list[str], list[str], dict[tuple[int, int], NDArray[np.float64]]]:
    """(layers, sites, the values at each place among them)."""
    pooled: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for name, vector in vectors.items():
        held = vector if isinstance(vector, np.ndarray) else vector.detach().cpu().double().numpy()
        if held.size == 0:
            raise IA3Error(f"the vector of {name!r} has no values")
        pooled.setdefault(_layer_and_site(name), []).append(held.astype(np.float64).reshape(-1))
    layers = sorted({layer for layer, _ in pooled}, key=_layer_order)
    sites = sorted({site for _, site in pooled})
    cells = {
        (layers.index(layer), sites.index(site)): np.concatenate(parts)
        for (layer, site), parts in pooled.items()
    }
    return layers, sites, cells


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
    # The decoder comes after the encoder.
    return False, stack.startswith("decoder"), stack, int(number)
