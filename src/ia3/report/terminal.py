"""Maps of layers and sites in a terminal: numbers, on colours where it has some."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.columns import Columns
from rich.table import Table
from rich.text import Text

from .console import visible
from .maps import SiteMap

# The page's colours.
_RGB = {"inhibited": (37, 99, 201), "amplified": (217, 98, 15), "total": (70, 78, 92)}
# Below this share of full strength a cell keeps the terminal's own colours.
_PALE = 0.08
_CELL = 6


def heat_tables(maps: Sequence[SiteMap], width: int) -> Iterator[Columns]:
    """A table of each map, a row a layer and a column a site, side by side where they fit.

    Sites that do not fit into the terminal's width go into further tables.
    """
    sites = maps[0].sites
    # The layer's column, two borders, and a cell with its margin and border.
    fitting = max(1, (width - 12) // (_CELL + 3))
    for start in range(0, len(sites), fitting):
        some = range(start, min(start + fitting, len(sites)))
        yield Columns([_table(each, some) for each in maps], padding=(1, 2))


def short_sites(sites: Sequence[str]) -> list[str]:
    """The ends of dotted names, as long as they have to be to differ."""
    parts = [site.split(".") for site in sites]
    shortened = []
    for own in parts:
        length = 1
        while length < len(own) and sum(p[-length:] == own[-length:] for p in parts) > 1:
            length += 1
        shortened.append(".".join(own[-length:]))
    return shortened


def _table(shown: SiteMap, columns: range) -> Table:
    table = Table(title=Text(shown.of.title))
    table.add_column("layer", justify="right", overflow="fold")
    names = short_sites(shown.sites)
    for column in columns:
        name = Text(visible(names[column]))
        table.add_column(name, justify="right", overflow="fold", min_width=_CELL, max_width=12)
    for row, layer in enumerate(shown.layers):
        cells = [_cell(shown, float(shown.values[row, column])) for column in columns]
        table.add_row(Text(visible(layer)), *cells)
    return table


def _cell(shown: SiteMap, value: float) -> Text:
    if math.isnan(value):
        return Text("×", style="dim")
    text = shown.of.short.format(value)
    strength = min(1.0, abs(value) / shown.most)
    if strength < _PALE:
        return Text(text)
    colour = _RGB[shown.of.positive if value >= 0 else "inhibited"]
    red, green, blue = (round(255 + (c - 255) * strength) for c in colour)
    ink = "#ffffff" if 299 * red + 587 * green + 114 * blue < 150_000 else "#000000"
    return Text(text, style=f"{ink} on #{red:02x}{green:02x}{blue:02x}")
