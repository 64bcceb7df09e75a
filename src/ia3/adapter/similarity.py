"""How alike adapters are: their log-scales compared, site by site and over folders of thousands."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import IA3Error
from .layout import Outline, read_outline, read_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = Mapping[str, NDArray[np.float32]]

# The logarithm of a channel that is switched off would be -inf.
SMALLEST = 2.0**-6
# What adapters are compared at once may take this much memory.
BLOCK_BYTES = 2**26


def log_scales(values: NDArray[Any]) -> NDArray[Any]:
    """log2 |value|, in octaves: 0 for the identity; |value| below 2**-6 counts as 2**-6."""
    scales: NDArray[Any] = np.log2(np.maximum(np.abs(values), SMALLEST))
    return scales


@dataclass(frozen=True)
class SiteDifference:
    """How the vectors of two adapters differ at one site.

    Attributes:
        site: the module's name.
        values: how many the vector has.
        cosine: of the two log-scales, from -1 to 1; `None` where one of them is all zeros.
        norm: ‖second − first‖ of the values themselves.
        change: mean of log2 |second| − log2 |first|, in octaves.
    """

    site: str
    values: int
    cosine: float | None
    norm: float
    change: float


@dataclass(frozen=True)
class ValueChange:
    """One value in two adapters.

    Attributes:
        site: the module's name.
        index: of the value in the vector, flattened.
        first: the value in the first adapter.
        second: in the second.
        change: log2 |second| − log2 |first|, in octaves.
    """

    site: str
    index: int
    first: float
    second: float
    change: float


def difference(first: Vectors, second: Vectors) -> tuple[SiteDifference, list[SiteDifference]]:
    """How two adapters differ: (over all values, by site in the first one's order).

    Args:
        first: module name -> vector; a site that one of them lacks counts as ones.
        second: likewise.

    Raises:
        IA3Error: the vectors of a site have different shapes, or there are none.
    """
    pairs = _pairs(first, second)
    sites = [_difference(site, *both) for site, both in pairs.items()]
    whole = [np.concatenate([both[i].reshape(-1) for both in pairs.values()]) for i in (0, 1)]
    return _difference("all", *whole), sites


def largest_changes(first: Vectors, second: Vectors, count: int) -> list[ValueChange]:
    """The values that differ most by their log-scales, the largest change first."""
    changes = []
    for site, (a, b) in _pairs(first, second).items():
        a, b = a.reshape(-1), b.reshape(-1)
        change = log_scales(b) - log_scales(a)
        for i in np.argsort(-np.abs(change), kind="stable")[:count]:
            if change[i]:
                changes.append(
                    ValueChange(site, int(i), float(a[i]), float(b[i]), float(change[i]))
                )
    return heapq.nlargest(count, changes, key=lambda each: abs(each.change))


def cosine(first: NDArray[Any], second: NDArray[Any]) -> float | None:
    """The cosine of two flat vectors; `None` where one is all zeros."""
    size = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return float(np.clip(first @ second / size, -1, 1)) if size else None


def _difference(site: str, a: NDArray[Any], b: NDArray[Any]) -> SiteDifference:
    a, b = (values.reshape(-1).astype(np.float64) for values in (a, b))
    scales_a, scales_b = log_scales(a), log_scales(b)
    return SiteDifference(
        site,
        a.size,
        cosine(scales_a, scales_b),
        float(np.linalg.norm(b - a)),
        float((scales_b - scales_a).mean()),
    )


def _pairs(
    first: Vectors, second: Vectors
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    pairs = {}
    for site in dict.fromkeys([*first, *second]):
        ones = np.ones_like(first[site] if site in first else second[site])
        a, b = first.get(site, ones), second.get(site, ones)
        if a.shape != b.shape:
            raise IA3Error(
                f"the vector of {site!r} is {list(a.shape)} in one adapter and {list(b.shape)} in "
                "the other: they are of different base models"
            )
        pairs[site] = (a, b)
    if not pairs:
        raise IA3Error("there are no vectors to compare")
    return pairs


# -- search ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neighbour:
    """An adapter that was found: its folder, and the cosine of its log-scales, from -1 to 1."""

    adapter: Path
    cosine: float


@dataclass
class Search:
    """What a search found.

    Attributes:
        nearest: the most similar first.
        compared: how many adapters were.
        other_base: how many were passed over, being of another base model.
        broken: folder -> why it could not be read.
    """

    nearest: list[Neighbour] = field(default_factory=list)
    compared: int = 0
    other_base: int = 0
    broken: dict[Path, str] = field(default_factory=dict)


def search(
    like: Outline,
    folders: Iterable[Path],
    top: int,
    progress: Callable[[int], object] = lambda done: None,
) -> Search:
    """The adapters nearest to one, by the cosine of their log-scales.

    A site that an adapter lacks counts as ones, the zeros of log-scales. An adapter that is the
    identity has the cosine 0 with all others. Adapters are read a block at a time: memory does not
    grow with their number.

    Args:
        like: the adapter to compare with; it is left out where it is among the folders.
        folders: of adapters.
        top: how many to find.
        progress: called with 1 for each folder.

    Raises:
        IA3Error: the adapter to compare with is broken, or the identity.
    """
    own = read_vectors(like)
    layout = {site: vector.shape for site, vector in own.items()}
    wanted = _flat_scales(own, list(own))
    size = float(np.linalg.norm(wanted))
    if not size:
        raise IA3Error(f"{like.folder}: all of its values are one, and nothing is like it")
    block = np.zeros((max(1, BLOCK_BYTES // wanted.nbytes), wanted.size), np.float32)
    held: list[tuple[Path, float]] = []
    found = Search()
    here = like.folder.resolve()

    def compare() -> None:
        products = block[: len(held)] @ wanted
        for (folder, norm), product in zip(held, products, strict=True):
            cosine = float(np.clip(product / (norm * size), -1, 1)) if norm else 0.0
            found.nearest.append(Neighbour(folder, cosine))
        order = heapq.nsmallest(top, found.nearest, key=lambda n: (-n.cosine, str(n.adapter)))
        found.nearest = order
        held.clear()

    for folder in folders:
        progress(1)
        if folder.resolve() == here:
            continue
        try:
            outline = read_outline(folder)
            if like.base_difference(outline) is not None or any(
                shape != layout.get(site, shape) for site, shape in outline.shapes.items()
            ):
                found.other_base += 1
                continue
            vectors = read_vectors(outline)
        except (IA3Error, OSError) as error:
            found.broken[folder] = str(error)
            continue
        filled = {s: vectors.get(s, np.ones(shape, np.float32)) for s, shape in layout.items()}
        row = block[len(held)]
        row[:] = _flat_scales(filled, list(layout))
        beyond = _flat_scales(vectors, [site for site in vectors if site not in layout])
        held.append((folder, math.hypot(np.linalg.norm(row), np.linalg.norm(beyond))))
        found.compared += 1
        if len(held) == len(block):
            compare()
    compare()
    return found


def _flat_scales(vectors: Vectors, sites: list[str]) -> NDArray[np.float32]:
    """The log-scales of these sites one after the other, float32."""
    flat = [vectors[site].reshape(-1) for site in sites]
    return log_scales(np.concatenate(flat)) if flat else np.zeros(0, np.float32)
