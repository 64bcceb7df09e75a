"""Maps of layers and sites, as the page, the picture and the terminal show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .heatmap import AMPLIFIED_ABOVE, INHIBITED_BELOW, Grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The scale of a measure reaches at least this far, so that tiny values stay pale (0.02 octaves are
# 1.4%).
LEAST = {"octaves": 0.02, "of channels": 0.05, "spread": 0.01, "norm": 0.01, "cosine": 1.0}


@dataclass(frozen=True)
class Quantity:
    """What a map shows, and how; quantities of the same measure share a scale."""

    name: str  # of the figure in a `Grid`, as in JSON
    title: str
    positive: str  # colour of the values above 0; those below are `"inhibited"`
    short: str  # a format of the value where there is little room
    unit: str  # a format of the value with its unit
    measure: str
    caption: str

    @property
    def signed(self) -> bool:
        """Whether values may be below 0."""
        return self.unit.startswith("{:+")


@dataclass(frozen=True, eq=False)
class SiteMap:
    """One quantity `[layers, sites]`, NaN where there is nothing; `most` is full strength."""

    of: Quantity
    layers: list[str]
    sites: list[str]
    values: NDArray[np.float64]
    most: float


_OCTAVES = ("{:+.3f}", "{:+.3f} octaves", "octaves")
_QUANTITIES = (
    Quantity(
        *("mean", "Mean amplification", "amplified", *_OCTAVES),
        "Each cell is one learned vector, found by its layer (input on the left, output on the "
        "right) and the module whose activation it multiplies: blue ones turn the activation down "
        "on average, orange ones turn it up (an octave is a factor of 2), and pale ones leave its "
        "strength alone.",
    ),
    Quantity(
        *("spread", "Spread", "total", "{:.3f}", "{:.3f}", "spread"),
        "The standard deviation of a vector's values: how far training has told its channels "
        "apart.",
    ),
    Quantity(
        *("inhibited", "Share of channels inhibited", "inhibited"),
        *("{:.0%}", "{:.0%} inhibited", "of channels"),
        f"How much of each vector turns its channels down (below {INHIBITED_BELOW}): where this "
        "map and the next are both strong, the vector turns some channels down and others up, even "
        "if its mean is pale.",
    ),
    Quantity(
        *("amplified", "Share of channels amplified", "amplified"),
        *("{:.0%}", "{:.0%} amplified", "of channels"),
        f"How much of each vector turns its channels up (above {AMPLIFIED_ABOVE}): cells that are "
        "pale in both maps of shares are vectors that training has hardly moved from 1.",
    ),
    Quantity(
        *("change", "Mean change", "amplified", *_OCTAVES),
        "By how much the second adapter turns a vector's channels up (orange) or down (blue) "
        "against the first, on average; an octave is a factor of 2.",
    ),
    Quantity(
        *("norm", "Norm of the difference", "total", "{:.3f}", "{:.3f}", "norm"),
        "How far the two vectors are apart, whatever the direction: where this is strong and the "
        "mean change is pale, some channels go up and others down.",
    ),
    Quantity(
        *("cosine", "Cosine of the log-scales", "amplified", "{:+.2f}", "{:+.3f}", "cosine"),
        "Whether both adapters turn the same channels up and down (1), or the opposite ones (−1), "
        "however strongly; about 0 where they have nothing to do with each other.",
    ),
)


def site_maps(grids: Sequence[Grid]) -> list[list[SiteMap]]:
    """The maps of each grid, on common scales."""
    most = dict(LEAST)
    for of in _QUANTITIES:
        for grid in grids:
            values = np.abs(grid.values.get(of.name, np.nan))
            if np.isfinite(values).any():
                most[of.measure] = max(most[of.measure], float(np.nanmax(values)))
    return [
        [
            SiteMap(of, grid.layers, grid.sites, grid.values[of.name], most[of.measure])
            for of in _QUANTITIES
            if of.name in grid.values
        ]
        for grid in grids
    ]
