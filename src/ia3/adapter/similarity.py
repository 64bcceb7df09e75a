"""How alike adapters are: their log-scales compared, site by site and over folders of thousands."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import IA3Error
from .layout import Outline, read_outline, read_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = Mapping[str, NDArray[np.float32]]

# The logarithm of a channel that is switched off would be -inf.
SMALLEST = 2.0**-6


def log_scales(values: NDArray[Any]) -> NDArray[Any]:
    """log2 |value|, in octaves: 0 for the identity; |value| below 2**-6 counts as 2**-6."""
    scales: NDArray[Any] = np.log2(np.maximum(np.abs(values), SMALLEST))
    return scales


@dataclass(frozen=True)
class SiteDifference:
    """How the vectors of two adapters differ at one site.

    `cosine` is of their log-scales, from -1 to 1, `None` where one of them is all zeros; `norm` is
    ‖second − first‖; `change` is the mean of log2 |second| − log2 |first|, in octaves.
    """

    site: str
    values: int
    cosine: float | None
    norm: float
    change: float


@dataclass(frozen=True)
class ValueChange:
    """One value in two adapters: its place in the flat vector, and log2 |second| − log2 |first|."""

    site: str
    index: int
    first: float
    second: float
    change: float


def difference(first: Vectors, second: Vectors) -> tuple[SiteDifference, list[SiteDifference]]:
    """How two adapters differ: (over all values, by site in the first one's order).

    A site that one of them lacks counts as ones.
    """
    pairs = _pairs(first, second)
    sites = [_difference(site, *both) for site, both in pairs.items()]
    whole = map(np.concatenate, zip(*pairs.values(), strict=True))
    return _difference("all", *whole), sites


def largest_changes(first: Vectors, second: Vectors, count: int) -> list[ValueChange]:
    """The values that differ most by their log-scales, the largest change first."""
    changes = []
    for site, (a, b) in _pairs(first, second).items():
        change = log_scales(b) - log_scales(a)
        for i in np.argsort(-np.abs(change), kind="stable")[:count]:
            if change[i]:
                first_value, second_value, by = float(a[i]), float(b[i]), float(change[i])
                changes.append(ValueChange(site, int(i), first_value, second_value, by))
    return heapq.nlargest(count, changes, key=lambda each: abs(each.change))


def _difference(site: str, a: NDArray[Any], b: NDArray[Any]) -> SiteDifference:
    a, b = a.astype(np.float64), b.astype(np.float64)
    scales_a, scales_b = log_scales(a), log_scales(b)
    size = float(np.linalg.norm(scales_a) * np.linalg.norm(scales_b))
    cosine = float(np.clip(scales_a @ scales_b / size, -1, 1)) if size else None
    change = float((scales_b - scales_a).mean())
    return SiteDifference(site, a.size, cosine, float(np.linalg.norm(b - a)), change)


def _pairs(first: Vectors, second: Vectors) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Site -> the values of both, flat."""
    pairs = {}
    for site in dict.fromkeys([*first, *second]):
        ones = np.ones_like(first[site] if site in first else second[site])
        a, b = first.get(site, ones), second.get(site, ones)
        if a.shape != b.shape:
            raise IA3Error(
                f"the vector of {site!r} is {list(a.shape)} in one adapter and {list(b.shape)} in "
                "the other: they are of different base models"
            )
        pairs[site] = (a.reshape(-1), b.reshape(-1))
    if not pairs:
        raise IA3Error("there are no vectors to compare")
    return pairs


# -- search ---------------------------------------------------------------------------------------


class Neighbour(NamedTuple):
    """An adapter's folder, and the cosine of its log-scales, from -1 to 1."""

    adapter: Path
    cosine: float


@dataclass
class Search:
    """What a search found: the most similar first, how many were compared.

    `other_base` counts those passed over; `broken` says by folder why it could not be read.
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
    """The `top` adapters nearest to one, by the cosine of their log-scales.

    A site that an adapter lacks counts as ones, the zeros of log-scales. An adapter that is the
    identity has the cosine 0 with all others. `like` is left out where it is among the folders;
    `progress` is called with 1 for each.
    """
    own = read_vectors(like)
    ones = {site: np.ones_like(vector) for site, vector in own.items()}
    wanted = _flat_scales(own)
    size = np.linalg.norm(wanted)
    if not size:
        raise IA3Error(f"{like.folder}: all of its values are one, and nothing is like it")
    found = Search()
    for folder in folders:
        progress(1)
        if folder.resolve() == like.folder.resolve():
            continue
        try:
            outline = read_outline(folder)
            if like.base_difference(outline) is not None or any(
                site in own and shape != own[site].shape for site, shape in outline.shapes.items()
            ):
                found.other_base += 1
                continue
            # The wanted one's sites first, in its order.
            scales = _flat_scales({**ones, **read_vectors(outline)})
        except (IA3Error, OSError) as error:
            found.broken[folder] = str(error)
            continue
        found.compared += 1
        product = scales[: wanted.size] @ wanted / (size * (np.linalg.norm(scales) or 1))
        found.nearest.append(Neighbour(folder, float(np.clip(product, -1, 1))))
    found.nearest.sort(key=lambda each: (-each.cosine, str(each.adapter)))
    del found.nearest[top:]
    return found


def _flat_scales(vectors: Vectors) -> NDArray[np.float32]:
    flat = [vector.reshape(-1) for vector in vectors.values()]
    return log_scales(np.concatenate(flat)) if flat else np.zeros(0, np.float32)
