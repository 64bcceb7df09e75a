"""From adapters' names to a route: what each row of a batch is multiplied by, at every site."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..arguments import instance
from ..core.activations import Side
from ..core.route import BASE, LOCK, Host, Names, Route
from ..core.sites import Site
from ..core.spread import is_spread
from ..errors import IA3Error, InvalidTypeError, StateError, shown
from .adapters import Adapters


class RowSource(Protocol):
    """Adapters beside those on the model, whose values come as rows: a bank."""

    def __contains__(self, name: object) -> bool: ...

    def __len__(self) -> int: ...

    def names(self) -> list[str]: ...

    def gather(self, names: Sequence[str], index: Sequence[int]) -> dict[Site, Tensor]:
        """Site -> `[rows, dim]`, where one of these has a vector; row i is that of `index[i]`."""
        ...


def make_route(
    host: Host, model: Adapters, source: RowSource | None, names: Sequence[str], index: Tensor
) -> Route:
    """A route of the model's own adapters, and of others that `source` has, from `read_names`."""
    own = [name for name in names if name in model.configs]
    others = [name for name in names if name != BASE and name not in own]
    by_row = index.dim() == 1
    gathered: dict[Site, Tensor] = {}
    if source is not None and others:
        wanted = others if own else names
        places = index.tolist() if by_row and not own else range(len(wanted))
        gathered = source.gather(wanted, places)
    # After the bank, which may have placed new sites.
    with LOCK:
        contents = model.contents()
        sites = {site: module for module, _, site in contents.sites}
        if not own:
            return Route(host, sites, gathered.get, index, gathered=by_row)
        for name in own:
            if name not in model.configs:
                raise StateError(f"adapter {name!r} was deleted while it was asked for")
            copied = [module for module, _, copies in contents.copies if name in copies]
            having = [(module, site.side) for site, module in sites.items() if name in site]
            check_mixable(name, copied, having)
        stacked = _stacked_vectors(names, sites, others, gathered)
        vectors = [site[name] for site in sites for name in own if name in site]
        # Where FSDP has spread them, they are whole while their module is called, and no sooner.
        if any(vector.requires_grad or is_spread(vector) for vector in vectors):
            return Route(host, sites, stacked, index)
        with torch.inference_mode(False), torch.no_grad():
            values = {site: value for site in sites if (value := stacked(site)) is not None}
            if by_row:
                values = {s: v.index_select(0, index.to(v.device)) for s, v in values.items()}
        return Route(host, sites, values.get, index, gathered=by_row)


def _stacked_vectors(
    names: Sequence[str], sites: Iterable[Site], others: list[str], gathered: dict[Site, Tensor]
) -> Callable[[Site], Tensor | None]:
    """Site -> `[names, dim]` with gradients: vectors there, those of `others` gathered, or ones."""
    had = {site: [name for name in names if name in site] for site in sites}

    def stacked(site: Site) -> Tensor | None:
        having = had.get(site, [])
        gone = next((name for name in having if name not in site), None)
        if gone is not None:
            raise StateError(f"adapter {gone!r} was deleted while a call with it was running")
        rows = {name: _wide(site.seen_vector(name)).reshape(-1) for name in having}
        like = next(iter(rows.values()), gathered.get(site))
        if like is None:
            return None
        if site in gathered:
            rows.update(zip(others, gathered[site].to(like), strict=True))
        ones = torch.ones(site.activation.dim, dtype=like.dtype, device=like.device)
        return torch.stack([rows.get(name, ones) for name in names])

    return stacked


def _wide(vector: Tensor) -> Tensor:
    # Rows of adapters whose vectors have other dtypes stand in one tensor.
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def check_mixable(name: str, copied: Collection[str], sites: Iterable[tuple[str, Side]]) -> None:
    """Raise `IA3Error` where an adapter, by its copies and sites, cannot have some rows alone."""
    alone = "it cannot be mixed with others, make it the active one"
    for module in copied:
        raise IA3Error(
            f"adapter {name!r} has a copy of {module!r} (modules_to_save), which all rows of a "
            f"batch would go through: {alone}"
        )
    for module, side in sites:
        if side == "inner" or "experts" in module.split("."):
            raise IA3Error(
                f"adapter {name!r} rescales within the experts {module!r}, whose tokens are no "
                f"longer in the order of the batch: {alone}"
            )


def read_names(names: Names, token_index: Tensor | None = None) -> tuple[list[str], Tensor]:
    """A batch's adapters, each once, and which of them its rows or tokens have.

    These are `[rows]` or `[batch, seq]`, int64. For tokens, `names` are lists of the same length,
    or what `token_index` counts in.
    """
    expected = "a list with one name a row"
    if isinstance(names, str | bytes) or not isinstance(names, Sequence):
        raise InvalidTypeError(f"adapter_names is {shown(names)}, expected {expected}")
    if len(names) == 0:
        raise IA3Error(f"adapter_names is {names!r}, expected {expected}")
    flat: list[Any] = list(names)
    expected = "names, or a list of names a row"
    if token_index is not None:
        instance("token_index", token_index, Tensor, "[batch, seq] torch.int64")
        if token_index.dim() != 2 or token_index.dtype != torch.int64 or token_index.numel() == 0:
            raise IA3Error(
                f"token_index is {list(token_index.shape)} {token_index.dtype}, expected "
                "[batch, seq] torch.int64"
            )
        low, high = (int(bound) for bound in torch.aminmax(token_index))
        if low < 0 or high >= len(flat):
            raise IA3Error(
                f"token_index has values from {low} to {high}, expected 0 to {len(flat) - 1}: it "
                f"counts in the {len(flat)} names"
            )
        expected = "plain names beside a token_index"
    elif not isinstance(flat[0], str):
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
        token_index = torch.arange(len(flat)).reshape(len(lists), -1)
    for name in flat:
        if not isinstance(name, str):
            base = f" ({BASE!r} is the base model)" if name is None else ""
            raise InvalidTypeError(f"adapter_names holds {shown(name)}, expected {expected}{base}")
    places: dict[str, int] = {}
    index = torch.tensor([places.setdefault(name, len(places)) for name in flat])
    if token_index is not None:
        index = index.to(token_index.device)[token_index]
    return list(places), index
