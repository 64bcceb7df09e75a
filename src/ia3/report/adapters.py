"""What adapters switch off and on, and how two differ: one-file pages and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import counted
from .heatmap import Grid, mean_grid
from .maps import SiteMap, site_maps
from .page import facts_list, page, section, site_figure
from .plotting import saved, settings

# isort: split
# After the module that says what to install where matplotlib is absent.
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# With more adapters than this, a page or a picture has the means alone.
MOST_ON_PAGE = 12
MOST_IN_PICTURE = 5
_HEX = {"inhibited": "#2563c9", "amplified": "#d9620f", "total": "#1b1f27"}


def maps_of_adapters(
    grids: Sequence[tuple[str, Grid]], most: int
) -> list[tuple[str, list[SiteMap]]]:
    """(name, maps) of adapters on common scales: their means first where there are several.

    With more adapters than `most` there are the means alone.
    """
    shown = list(grids) if len(grids) <= most else []
    if len(grids) > 1:
        mean = mean_grid([grid for _, grid in grids])
        shown.insert(0, (f"Mean over {counted(len(grids), 'adapter')}", mean))
    maps = site_maps([grid for _, grid in shown])
    return [(name, of_one) for (name, _), of_one in zip(shown, maps, strict=True)]


def maps_page(
    title: str,
    facts: Sequence[tuple[str, str]],
    maps: Sequence[tuple[str, Sequence[SiteMap]]],
    more: Sequence[str] = (),
) -> str:
    """A page with maps under headings, and sections of HTML below them."""
    sections = [
        section(
            escape(name), "".join(site_figure(one, f"adapter-{number}-{one.of.name}") for one in of)
        )
        for number, (name, of) in enumerate(maps)
    ]
    return page(title, [facts_list(facts), *sections, *more])


def maps_picture(columns: Sequence[tuple[str, Sequence[SiteMap]]]) -> bytes:
    """A PNG with a column of maps under each name."""
    rows = len(columns[0][1])
    widest = max(len(maps[0].layers) for _, maps in columns)
    tallest = max(len(maps[0].sites) for _, maps in columns)
    size = (
        len(columns) * (2.6 + float(np.clip(0.12 * widest, 1.5, 9))) + 0.6,
        rows * (0.9 + 0.2 * tallest),
    )
    # Names of folders and modules are no formulas.
    with settings({"font.size": 8, "text.parse_math": False}):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, len(columns), squeeze=False)
        for column, (name, maps) in enumerate(columns):
            for row, one in enumerate(maps):
                axes = grid[row, column]
                drawn = _draw(axes, one)
                title = f"{name}\n{one.of.title}" if row == 0 else one.of.title
                axes.set_title(title, fontsize=8, loc="left", color="#333333")
                if column == len(columns) - 1:
                    bar = figure.colorbar(drawn, ax=list(grid[row]), fraction=0.03, pad=0.01)
                    bar.ax.set_title(one.of.measure, fontsize=7)
        return saved(figure, dpi=140)


def _draw(axes: Axes, one: SiteMap) -> Any:
    colours = [_HEX["inhibited"]] if one.of.signed else []
    colours += ["#ffffff", _HEX[one.of.positive]]
    palette = LinearSegmentedColormap.from_list(one.of.name, colours)
    palette.set_bad("#e2e2e2")
    least = -one.most if one.of.signed else 0.0
    drawn = axes.imshow(one.values.T, cmap=palette, vmin=least, vmax=one.most, aspect="auto")
    step = -(-len(one.layers) // 12)
    places = range(0, len(one.layers), step)
    axes.set_xticks(list(places), [one.layers[place] for place in places])
    axes.set_yticks(range(len(one.sites)), one.sites)
    axes.tick_params(length=2)
    return drawn
