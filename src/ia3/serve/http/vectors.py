"""An adapter's vectors in figures, for a heat map of layers and sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...adapter.layout import read_outline, read_vectors
from ...report.heatmap import layer_site_grid
from ...report.maps import SiteMap, site_maps


def vector_figures(folder: Path) -> dict[str, Any]:
    """The maps of an adapter's vectors, as values of JSON.

    Returns:
        `layers` and `sites`, names in the model's order; `maps`, each with `name`, `title`,
        `caption`, `positive` (the colour of values above 0), `most` (the value of the strongest
        colour), `values` and `shown`, `[layers, sites]`, the latter in words, `None` where a layer
        lacks the site; and how many `vectors` and `values` there are.

    Raises:
        MissingFileError: there is no adapter.
        BrokenFileError: its files are damaged.
        IA3Error: a vector is not finite.
    """
    outline = read_outline(folder)
    grid = layer_site_grid(dict(read_vectors(outline)))
    return {
        "layers": grid.layers,
        "sites": grid.sites,
        "maps": [_map(each) for each in site_maps([grid])[0]],
        "vectors": len(outline.shapes),
        "values": outline.values,
    }


def _map(each: SiteMap) -> dict[str, Any]:
    rows: list[list[float]] = each.values.tolist()
    return {
        "name": each.of.name,
        "title": each.of.title,
        "caption": each.of.caption,
        "positive": each.of.positive,
        "most": each.most,
        "values": [[None if np.isnan(v) else round(v, 5) for v in row] for row in rows],
        "shown": [[None if np.isnan(v) else each.of.unit.format(v) for v in row] for row in rows],
    }
