"""Figures of vectors by layer and site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapter.similarity import log_scales

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
class Grid:
    """Figures by layer and site: name -> `[layers, sites]`, NaN where a layer lacks the site.

    Layers are `"0"`, `"1"`, ... or `"encoder.0"`, ..., `"decoder.0"`, ..., in the model's order;
    sites are module names inside a layer, sorted.
    """

    layers: list[str]
    sites: list[str]
    values: dict[str, NDArray[np.float64]]


def statistics(values: NDArray[Any]) -> dict[str, float]:
    """The `mean` of log2 |value|, `spread`, and the shares `inhibited` and `amplified`.

    The mean is in octaves: 0 for the identity, -1 where the activation is halved.
    """
    size = np.abs(values)
    return {
        "mean": float(log_scales(values).mean()),
        "spread": float(values.std()),
        "inhibited": float((size < INHIBITED_BELOW).mean()),
        "amplified": float((size > AMPLIFIED_ABOVE).mean()),
    }


def layer_site_grid(vectors: Mapping[str, Tensor | NDArray[Any]]) -> Grid:
    """The `statistics` of vectors by layer and site; a layer's experts are pooled."""
    flat = {
        name: np.asarray(v if isinstance(v, np.ndarray) else v.detach().cpu().double(), float)
        for name, v in vectors.items()
    }
    return _grid({name: values.reshape(-1) for name, values in flat.items()}, statistics)


def site_statistics(vectors: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """The `statistics` of each `site` over all layers, and how many `vectors` and `values`."""
    pooled: dict[str, list[NDArray[Any]]] = {}
    for name, vector in vectors.items():
        pooled.setdefault(_layer_and_site(name)[1], []).append(vector.reshape(-1))
    rows = []
    for site, parts in sorted(pooled.items()):
        values = np.concatenate(parts).astype(np.float64)
        counts = {"site": site, "vectors": len(parts), "values": values.size}
        rows.append({**counts, **statistics(values)})
    return rows


def mean_grid(grids: Sequence[Grid]) -> Grid:
    """The mean of each figure over adapters, at least one, of those that have the cell."""
    layers = sorted({layer for grid in grids for layer in grid.layers}, key=_layer_order)
    sites = sorted({site for grid in grids for site in grid.sites})
    names = list(grids[0].values)
    total, count = np.zeros((2, len(names), len(layers), len(sites)))
    for grid in grids:
        values = np.array([grid.values[name] for name in names])
        rows = [layers.index(layer) for layer in grid.layers]
        at = np.ix_(range(len(names)), rows, [sites.index(site) for site in grid.sites])
        total[at] += np.nan_to_num(values)
        count[at] += ~np.isnan(values)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return Grid(layers, sites, dict(zip(names, means, strict=True)))


def difference_grid(differences: Sequence[SiteDifference]) -> Grid:
    """The `change`, `norm` and `cosine` of `SiteDifference` by layer and site.

    Differences that share a cell are pooled; cosines are averaged over a cell's vectors.
    """

    def pooled(parts: NDArray[np.float64]) -> dict[str, float]:
        values, changes, squares, known, cosines = parts.sum(0)
        cosine = cosines / known if known else np.nan
        return {"change": changes / values, "norm": np.sqrt(squares), "cosine": cosine}

    sums = {
        d.site: [d.values, d.values * d.change, d.norm**2, d.cosine is not None, d.cosine or 0]
        for d in differences
    }
    return _grid({site: np.array([parts]) for site, parts in sums.items()}, pooled)


def _grid(
    of_modules: Mapping[str, NDArray[np.float64]],
    figures: Callable[[NDArray[np.float64]], Mapping[str, float]],
) -> Grid:
    cells: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for name, values in of_modules.items():
        cells.setdefault(_layer_and_site(name), []).append(values)
    layers = sorted({layer for layer, _ in cells}, key=_layer_order)
    sites = sorted({site for _, site in cells})
    grid = Grid(layers, sites, {})
    for (layer, site), parts in cells.items():
        for name, figure in figures(np.concatenate(parts)).items():
            empty = np.full((len(layers), len(sites)), np.nan)
            at = layers.index(layer), sites.index(site)
            grid.values.setdefault(name, empty)[at] = figure
    return grid


def _layer_and_site(name: str) -> tuple[str, str]:
    """`model.layers.3.self_attn.k_proj` is `("3", "self_attn.k_proj")`."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isascii() and part.isdigit()]
    if not numbers:
        return OUTSIDE, name
    first = numbers[0]
    stack = [part for part in parts[:first] if part in ("encoder", "decoder")]
    layer = ".".join([*stack, str(int(parts[first]))])
    site = ".".join(part for i, part in enumerate(parts) if i > first and i not in numbers)
    # The vector may sit on the numbered module itself.
    return layer, site or ".".join(parts[:first])


def _layer_order(layer: str) -> tuple[bool, bool, str, int]:
    if layer == OUTSIDE:
        return True, False, "", 0
    stack, _, number = layer.rpartition(".")
    # The decoder comes after the encoder.
    return False, stack.startswith("decoder"), stack, int(number)
