"""From adapters' names to a route: what each row of a batch is multiplied by, at every site."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.activations import Side
from ..core.inventory import Contents
from ..core.route import BASE, LOCK, Host, Names, Route
from ..core.sites import Site
from ..errors import IA3Error


@dataclass(frozen=True)
class Gathered:
    """The values of several adapters, a row each.

    Attributes:
        values: `[rows, columns]`, floating.
        sites, sizes: what the columns are of, and how many each has.
        used: the sites where one of the adapters has a vector.
    """

    values: Tensor
    sites: Sequence[Site]
    sizes: Sequence[int]
    used: frozenset[Site]

    def parts(self) -> dict[Site, Tensor]:
        """Site -> `[rows, dim]`."""
        split = zip(self.sites, torch.split(self.values, [*self.sizes], 1), strict=True)
        return {site: part for site, part in split if site in self.used}


class RowSource(Protocol):
    """Adapters beside those on the model, whose values come as rows: a bank."""

    def __contains__(self, name: object) -> bool: ...

    def __len__(self) -> int: ...

    def names(self) -> list[str]:
        """The adapters' names."""
        ...

    def gather(self, names: Sequence[str], index: Sequence[int]) -> Gathered:
        """The values of adapters.

        Args:
            names: of these adapters, or `BASE`.
            index: which of the names each row is to be, `[rows]`.
        """
        ...


def make_route(
    host: Host,
    find: Callable[[], Contents],
    adapters: Collection[str],
    source: RowSource | None,
    names: Sequence[str],
    index: Tensor,
) -> Route:
    """A route of a model's adapters, and those of its bank.

    Args:
        host: what the route is of.
        find: gives what is on the model now.
        adapters: the names of the model's own.
        source: has all other names; `None` where there are no others.
        names: each once: adapters, or `BASE`.
        index: which of the names, int64: `[rows]`, or `[batch, seq]` for tokens.

    Raises:
        IA3Error: an adapter cannot be mixed with others, or cannot be loaded.
    """
    own = [name for name in names if name in adapters]
    others = [name for name in names if name != BASE and name not in adapters]
    by_row = index.dim() == 1
    gathered: dict[Site, Tensor] = {}
    if source is not None and others:
        if own:
            gathered = source.gather(others, range(len(others))).parts()
        else:
            places = index.tolist() if by_row else range(len(names))
            gathered = source.gather(names, places).parts()
    # After the bank, which may have placed new sites.
    with LOCK:
        contents = find()
        sites = {site: module for module, _, site in contents.sites}
        if not own:
            return Route(host, sites, gathered.get, index, gathered=by_row)
        for name in own:
            if name not in adapters:
                raise IA3Error(f"adapter {name!r} was deleted while it was asked for")
            _check_mixable(contents, name)
        stacked = StackedVectors(names, sites, others, gathered)
        if any(site[name].requires_grad for site in sites for name in own if name in site):
            return Route(host, sites, stacked, index)
        with torch.inference_mode(False), torch.no_grad():
            values = {site: stacked(site) for site in sites}
            rows = {
                site: value.index_select(0, index.to(value.device)) if by_row else value
                for site, value in values.items()
                if value is not None
            }
        return Route(host, sites, rows.get, index, gathered=by_row)


class StackedVectors:
    """The values of several adapters at a site, `[names, dim]`, through which gradients flow.

    Args:
        names: in the order of the rows; a name that has nothing at a site counts as ones there.
        sites: where the model's own adapters may have vectors.
        others, gathered: the names of adapters that are not the model's own, and site -> their
            values, `[others, dim]`.
    """

    def __init__(
        self,
        names: Sequence[str],
        sites: Collection[Site],
        others: Sequence[str],
        gathered: Mapping[Site, Tensor],
    ) -> None:
        self._names = names
        self._others = others
        self._gathered = gathered
        self._having = {site: [name for name in names if name in site] for site in sites}

    def __call__(self, site: Site) -> Tensor | None:
        having = self._having.get(site, [])
        gone = next((name for name in having if name not in site), None)
        if gone is not None:
            raise IA3Error(f"adapter {gone!r} was deleted while a call with it was running")
        rows = {name: site.vector(name).reshape(-1) for name in having}
        like = next(iter(rows.values()), self._gathered.get(site))
        if like is None:
            return None
        if site in self._gathered:
            rows.update(zip(self._others, self._gathered[site].to(like), strict=True))
        ones = torch.ones(site.activation.dim, dtype=like.dtype, device=like.device)
        return torch.stack([rows.get(name, ones) for name in self._names])


def is_within_experts(module: str, side: Side) -> bool:
    """Whether a module of this name sees tokens by expert, no longer in the order of the batch."""
    return side == "inner" or "experts" in module.split(".")


def _check_mixable(contents: Contents, name: str) -> None:
    for module, _, copies in contents.copies:
        if name in copies:
            raise IA3Error(
                f"adapter {name!r} has a copy of {module!r} (modules_to_save), which all rows of a "
                "batch would go through: it cannot be mixed with others, make it the active one"
            )
    for module, _, site in contents.sites:
        if name in site and is_within_experts(module, site.side):
            raise IA3Error(
                f"adapter {name!r} rescales within the experts {module!r}, whose tokens are no "
                "longer in the order of the batch: it cannot be mixed with others, make it the "
                "active one"
            )


def read_names(names: Names, token_index: Tensor | None = None) -> tuple[list[str], Tensor]:
    """Which adapters a batch is given, and which of them each row or token has.

    Args:
        names: one a row; or one a token, in lists of the same length; or, with `token_index`,
            what that counts in.
        token_index: `[batch, seq]`, int64.

    Returns:
        The names, each once, and `[rows]` or `[batch, seq]`, int64.

    Raises:
        IA3Error: the names are no such list, or the index leads beyond them.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) == 0:
        raise IA3Error(f"adapter_names is {names!r}, expected a list with one name a row")
    if token_index is not None:
        return _read_names_by_index(names, token_index)
    flat = list(names)
    shape = [len(flat)]
    if not isinstance(flat[0], str):
        lists = [
            [*each] if isinstance(each, Sequence) and not isinstance(each, str) else []
            for each in names
        ]
        if len({len(each) for each in lists}) != 1 or not lists[0]:
            raise IA3Error(
                f"adapter_names for tokens has lists of {[len(each) for each in lists]} names, "
                "expected one name a token, the same number in each row"
            )
        flat = [name for each in lists for name in each]
        shape = [len(lists), len(lists[0])]
    for name in flat:
        if not isinstance(name, str):
            base = f" ({BASE!r} is the base model)" if name is None else ""
            raise IA3Error(
                f"adapter_names holds {name!r}, expected names, or a list of names a row{base}"
            )
    places: dict[Any, int] = {}
    index = [places.setdefault(name, len(places)) for name in flat]
    return list(places), torch.tensor(index).reshape(shape)


def _read_names_by_index(names: Names, token_index: Tensor) -> tuple[list[str], Tensor]:
    if not all(isinstance(name, str) for name in names):
        raise IA3Error("adapter_names holds lists: expected plain names beside a token_index")
    if token_index.dim() != 2 or token_index.dtype != torch.int64 or token_index.numel() == 0:
        raise IA3Error(
            f"token_index is {list(token_index.shape)} {token_index.dtype}, expected "
            "[batch, seq] torch.int64"
        )
    low, high = (int(bound) for bound in torch.aminmax(token_index))
    if low < 0 or high >= len(names):
        raise IA3Error(
            f"token_index has values from {low} to {high}, expected 0 to {len(names) - 1}: it "
            f"counts in the {len(names)} names"
        )
    places: dict[Any, int] = {}
    new = torch.tensor([places.setdefault(name, len(places)) for name in names])
    return list(places), new.to(token_index.device)[token_index]
