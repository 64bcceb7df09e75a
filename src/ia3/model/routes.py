"""Routing one model: batches whose rows, or tokens, have an adapter each, and the model's bank."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..adapter.files import Adapter
from ..core.reached import unwatch
from ..core.route import BASE, LOCK, Names, Route, changing, current_route, entered
from ..core.saved_modules import find
from ..core.sites import Site, displace
from ..errors import IA3Error, StateError, UnknownNameError, did_you_mean
from .adapters import Adapters
from .embeddings import own_values
from .gather import RowSource, check_mixable, make_route, read_names
from .heads import with_head


class Routes:
    """The routes of one model, whose host this is, and its bank, which a copy has not."""

    def __init__(self, adapters: Adapters) -> None:
        self.model = adapters.model
        self.bank: RowSource | None = None
        self._adapters = adapters

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "bank": None}

    @contextmanager
    def entered(
        self, names: Names, token_index: Tensor | None = None, call: tuple[Any, Any] | None = None
    ) -> Iterator[None]:
        """Within the context, calls of the model in this thread or task have these adapters.

        The arguments of a `call` to come, by place and by name, are checked first.
        """
        route = self._route(names, token_index)
        if call is not None:
            route.check(*call)
        with entered(route):
            yield

    @contextmanager
    def entered_with(
        self, values: Mapping[Site, Tensor], index: Tensor | None = None
    ) -> Iterator[None]:
        """As `entered`, with values that were gathered before, `[n, dim]`; `index` counts in n.

        Without an index there are n rows, each with its own.
        """
        adapters = self._adapters
        adapters.check_loaded()
        adapters.check_enabled("routing")
        with LOCK:
            sites = {site: module for module, _, site in adapters.contents().sites}
        of_rows = index is None
        if index is None:
            first = next(iter(values.values()))
            index = torch.arange(len(first), device=first.device)
        with entered(Route(self, sites, values.get, index, of_rows)):
            yield

    def generate(self, names: Names | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `IA3Model.generate`; without names, the rows of the current route, if there is one."""
        model: Any = self.model
        route = current_route(self) if names is None else self._route(names)
        if route is None:
            return model.generate(*args, **kwargs)
        if route.by_token:
            raise IA3Error(
                "generate cannot be routed by tokens, those to come have no names: give one name "
                "a row"
            )
        route.check(args, kwargs)
        given = next((c for c in (*args[1:2], kwargs.get("generation_config")) if c), None)
        configs = (given, model.generation_config)
        beams, sequences = (
            next((t for t in (kwargs.get(name), *(getattr(c, name, 0) for c in configs)) if t), 1)
            for name in ("num_beams", "num_return_sequences")
        )
        repeats = {1, max(beams, sequences)}
        if any(kind.__name__ == "WhisperGenerationMixin" for kind in type(model).__mro__):
            # It repeats its input for the sequences, and those for the beams. Once each would be a
            # part of that: it generates those rows again that came out badly.
            repeats = {sequences, sequences * beams}
        # A compiled step would break at every site.
        if given is None:
            kwargs.setdefault("disable_compile", True)
        else:
            given = copy.deepcopy(given)
            given.disable_compile = True
            args, kwargs = args[:1], {**kwargs, "generation_config": given}
        with entered(route.repeated(repeats)):
            return model.generate(*args, **kwargs)

    def check_generates_here(self, what: str, names: Names | None) -> None:
        """Raise `IA3Error` where rows that are to be generated in another thread have names."""
        if names is not None or current_route(self) is not None:
            raise IA3Error(
                f"{what} cannot be routed: it packs all rows into one sequence, in a thread of its "
                "own; use generate with adapter_names, or call it for one active adapter after the "
                "other"
            )

    def _route(self, names: Names, token_index: Tensor | None = None) -> Route:
        adapters, bank = self._adapters, self.bank
        adapters.check_loaded()
        adapters.check_enabled("routing")
        different, index = read_names(names, token_index)
        for name in different:
            if name != BASE and name not in adapters.configs and (bank is None or name not in bank):
                where = "" if bank is None else f", nor in its bank of {len(bank)}"
                known = [*adapters.configs, *(bank.names() if bank is not None else ())]
                raise UnknownNameError(
                    f"no adapter {name!r} on this model, which has {sorted(adapters.configs)}"
                    f"{where}; {BASE!r} is the base model{did_you_mean(name, known)}"
                )
        config = getattr(self.model, "config", None)
        if index.dim() == 2 and getattr(config, "is_encoder_decoder", False):
            raise IA3Error(
                f"{type(self.model).__name__} has an encoder and a decoder, whose tokens are not "
                "the same: give one name a row"
            )
        return make_route(self, adapters, bank, different, index)

    def open(self, route: Route, frame: object) -> None:
        """As `Host.open`: the hooks that ask for a route are there from now on."""
        adapters = self._adapters
        with changing():
            if merged := adapters.merge.adapters:
                raise StateError(
                    f"adapters {sorted(merged)} are merged, in all rows: unmerge_adapter() before "
                    "routing"
                )
            contents = adapters.contents()
            for name, _, copies in contents.copies:
                if copies.active is not None:
                    raise StateError(
                        f"adapter {copies.active!r} is active, whose copy of {name!r} "
                        "(modules_to_save) all rows would go through: set_adapter() to another "
                        "before routing"
                    )
            lost = route.sites.keys() - {site for _, _, site in contents.sites}
            if any(route.values(site) is not None for site in lost):
                raise StateError("the model that was routed has lost adapters since")
            adapters.check_loaded()
            adapters.route_opened(route, frame)

    def close(self, frame: object) -> None:
        """Undo `open`."""
        self._adapters.route_closed(frame)

    def names(self, sites: Collection[Site]) -> list[str]:
        """The names of the modules that these sites are on."""
        return [name for name, _, site in self._adapters.contents().sites if site in sites]

    def sites(self) -> dict[str, Site]:
        """Module name -> the site on it, of all."""
        return {name: site for name, _, site in self._adapters.contents().sites}

    def owns(self, site: Any) -> bool:
        """Whether a site is on this model now."""
        return any(site is each for _, _, each in self._adapters.contents().sites)

    def attach(self, bank: RowSource) -> None:
        self._adapters.check_loaded()
        if self.bank is not None:
            raise StateError("the model has a bank already: close() that first")
        self.bank = bank

    def detach(self) -> None:
        """Undo `attach`, and take off the sites that only the bank needed; not while routed."""
        with changing():
            self._adapters.check_unrouted("detaching the bank")
            self.bank = None
            for _, module, site in self._adapters.contents().sites:
                site.banked = False
                if not site.vectors:
                    displace(module)
            unwatch(self.model)

    def named_as_here(self, adapter: Adapter) -> Adapter:
        """An adapter by the names that the model's modules have now."""
        return self._adapters.named_as_here(adapter)

    def sites_for_bank(self, name: str, adapter: Adapter) -> dict[str, Site]:
        """Module name -> the site for each vector of a bank's adapter, placed now if it is new."""
        adapters = self._adapters
        _, targets = adapters.fit(name, adapter.config, adapter)
        adapter = adapter.whole()
        names = with_head(self.model, adapter.config, stored=True)
        # Embeddings that are the model's are no copies.
        copied = [
            *find(self.model, names, names),
            *chain(*own_values(adapter.copies, (), self.model)),
        ]
        check_mixable(name, copied, [(target.name, target.side) for target in targets])
        with changing():
            sites = adapters.place(targets)
            for site in sites.values():
                site.banked = True
            # Fused layers have to know the sites that are theirs.
            adapters.activate()
        return sites
