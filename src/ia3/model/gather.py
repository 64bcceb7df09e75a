"""From adapters' names to routes: what each row of a batch is multiplied by, at every site."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.activations import Side
from ..core.inventory import Contents
from ..core.route import BASE, LOCK, Host, Names, Route
from ..core.sites import Site
from ..errors import IA3Error

if TYPE_CHECKING:
    from ..bank.bank import AdapterBank


@dataclass(frozen=True)
class Gathered:
    """Rows of a bank.

    Attributes:
        values: `[rows, columns]`.
        sites, sizes: what the columns are of, and how many each has.
        used: the sites where one of the rows' adapters has a vector.
    """

    values: Tensor
    sites: Sequence[Site]
    sizes: Sequence[int]
    used: frozenset[Site]

    def parts(self) -> dict[Site, Tensor]:
        """Site -> `[rows, dim]`."""
        split = zip(self.sites, torch.split(self.values, [*self.sizes], 1), strict=True)
        return {site: part for site, part in split if site in self.used}

    def rows(self) -> list[dict[Site, Tensor]]:
        """The same of each row: site -> `[dim]`."""
        parts = self.parts()
        return [
            {site: part[row] for site, part in parts.items()} for row in range(len(self.values))
        ]


@dataclass
class _Kept:
    """An adapter's values as one row.

    Attributes:
        state: of the vectors that they are of; `None` where these can change without a trace.
        row: `[values]`, sites in the model's order, ones where the adapter has no vector.
        sites: those where it has one.
    """

    state: object
    row: Tensor
    sites: frozenset[Site]


class Rows:
    """The rows of a model's own adapters, each kept until its vectors change."""

    def __init__(self) -> None:
        self._found: Contents | None = None
        self._sites: dict[Site, str] = {}
        self._routed: list[Site] = []
        self._kept: dict[str, _Kept] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy gathers its own.
        return vars(Rows())

    def forget(self) -> None:
        """Vectors may have changed without a trace."""
        self._kept.clear()

    def route(
        self,
        host: Host,
        find: Callable[[], Contents],
        adapters: Collection[str],
        bank: AdapterBank | None,
        names: Sequence[str],
        index: Tensor,
    ) -> Route:
        """A route of adapters of this model and its bank.

        Args:
            host: the model.
            find: what is on it.
            adapters: its own.
            bank: the model's, which has all other names.
            names: different ones, of its adapters, its bank's or `BASE`.
            index: which of the names, int64: `[rows]`, or `[batch, seq]` for tokens.

        Raises:
            IA3Error: an adapter cannot be mixed with others, or cannot be loaded.
        """
        own = [name for name in names if name in adapters]
        banked = [name for name in names if name != BASE and name not in adapters]
        by_row = index.dim() == 1
        gathered: Gathered | None = None
        if bank is not None and banked and not own:
            places = index.tolist() if by_row else range(len(names))
            gathered = bank.gather(names, places)
        elif bank is not None and banked:
            gathered = bank.gather(banked, range(len(banked)))
        # After the bank, which may have found new sites.
        with LOCK:
            found = find()
            self._look_at(found)
            sites = self._sites
            for name in own:
                if name not in adapters:
                    raise IA3Error(f"adapter {name!r} was deleted while it was asked for")
                _check_mixable(found, name)
            if not own:
                parts = gathered.parts() if gathered is not None else {}
                return Route(host, sites, parts.get, index, gathered=by_row)
            others = {} if gathered is None else dict(zip(banked, gathered.rows(), strict=True))
            if any(
                site[name].requires_grad for name in own for site in self._routed if name in site
            ):
                # They may be trained by an optimizer that leaves no trace.
                self.forget()
                return Route(host, sites, _Stacked(names, self._routed, others), index)
            with torch.inference_mode(False), torch.no_grad():
                kept = {name: self._row(name) for name in own}
                kept.update((name, self._row_of_bank(parts)) for name, parts in others.items())
                values = self._values(names, index, kept)
                used = frozenset().union(*(each.sites for each in kept.values()))
                sizes = [site.activation.dim for site in self._routed]
                split = zip(self._routed, torch.split(values, sizes, 1), strict=True)
                parts = {site: part for site, part in split if site in used}
            return Route(host, sites, parts.get, index, gathered=by_row)

    def _values(self, names: Sequence[str], index: Tensor, kept: dict[str, _Kept]) -> Tensor:
        """`[rows, values]`; `[names, values]` where tokens are routed."""
        like = next(iter(kept.values())).row
        rows = [kept[n].row.to(like.device) if n in kept else torch.ones_like(like) for n in names]
        values = torch.stack(rows)
        if index.dim() == 1 and index.tolist() != list(range(len(names))):
            values = values.index_select(0, index.to(values.device))
        return values

    def _row_of_bank(self, parts: Mapping[Site, Tensor]) -> _Kept:
        device = next((part.device for part in parts.values()), None)
        row = [
            parts[site] if site in parts else torch.ones(site.activation.dim, device=device)
            for site in self._routed
        ]
        return _Kept(None, torch.cat(row), frozenset(parts))

    def _row(self, name: str) -> _Kept:
        having = [site for site in self._routed if name in site]
        vectors = [site[name] for site in having]
        state = None
        if all(type(v) is nn.Parameter and not v.is_inference() and not v.is_meta for v in vectors):
            state = [(vector.data_ptr(), vector._version) for vector in vectors]
        kept = self._kept.get(name)
        if kept is None or state is None or kept.state != state:
            parts = {site: site.vector(name).detach().reshape(-1) for site in having}
            device = next(iter(parts.values())).device if parts else torch.device("cpu")
            kept = _Kept(
                state,
                torch.cat(
                    [
                        parts[site].to(device)
                        if site in parts
                        else torch.ones(site.activation.dim, device=device)
                        for site in self._routed
                    ]
                ),
                frozenset(having),
            )
            self._kept[name] = kept
        return kept

    def _look_at(self, found: Contents) -> None:
        if self._found is not found:
            self._sites = {site: name for name, _, site in found.sites}
            self._routed = [site for site in self._sites if site.side != "inner"]
            self._kept.clear()
            self._found = found


class _Stacked:
    """The values at a site as gradients reach them: the very vectors, stacked.

    Args:
        names: in this order.
        sites: where adapters of the model's own may have vectors.
        others: the values of adapters that are not.
    """

    def __init__(
        self,
        names: Sequence[str],
        sites: Sequence[Site],
        others: Mapping[str, Mapping[Site, Tensor]],
    ) -> None:
        self.names = names
        self.others = others
        self._having = {site: [name for name in names if name in site] for site in sites}

    def __call__(self, site: Site) -> Tensor | None:
        having = self._having.get(site, ())
        for name in having:
            if name not in site:
                raise IA3Error(f"adapter {name!r} was deleted while a call with it was running")
        rows = {name: site.vector(name).reshape(-1) for name in having}
        like = next(iter(rows.values()), None)
        for name, parts in self.others.items():
            if site in parts:
                rows[name] = parts[site] if like is None else parts[site].to(like)
        if not rows:
            return None
        ones = torch.ones_like(next(iter(rows.values())))
        return torch.stack([rows.get(name, ones) for name in self.names])


def is_within_experts(module: str, side: Side) -> bool:
    """Whether a module of this name sees tokens by expert, no longer in the order of the batch."""
    return side == "inner" or "experts" in module.split(".")


def _check_mixable(found: Contents, name: str) -> None:
    for module, _, copies in found.copies:
        if name in copies:
            raise IA3Error(
                f"adapter {name!r} has a copy of {module!r} (modules_to_save), which all rows of a "
                "batch would go through: it cannot be mixed with others, make it the active one"
            )
    for module, _, site in found.sites:
        if name in site and is_within_experts(module, site.side):
            raise IA3Error(
                f"adapter {name!r} rescales within the experts {module!r}, whose tokens are no "
                "longer in the order of the batch: it cannot be mixed with others, make it the "
                "active one"
            )


def named(names: Names, token_index: Tensor | None = None) -> tuple[list[str], Tensor]:
    """Different names, and which of them each row or token has.

    Args:
        names: one a row; or one a token, in lists of the same length; or, with `token_index`,
            what that counts in.
        token_index: `[batch, seq]`, int64.

    Returns:
        The names without repetitions, and `[rows]` or `[batch, seq]`, int64.

    Raises:
        IA3Error: the names are no such list, or the index leads beyond them.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) == 0:
        raise IA3Error(f"adapter_names is {names!r}, expected a list with one name a row")
    if token_index is not None:
        return _named_by_index(names, token_index)
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


def _named_by_index(names: Names, token_index: Tensor) -> tuple[list[str], Tensor]:
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
