"""The adapters on one base model: which there are, which multiply, and which train."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter.files import Adapter
from ..arguments import flag, instance, listed
from ..core import saved_modules
from ..core.activations import device_of, dtype_of
from ..core.calls import Calls, State
from ..core.inventory import Contents, Inventory
from ..core.merge import Merge
from ..core.names import ATTRIBUTE, Target, modules_of, own_names, unwrapped
from ..core.patch import patched
from ..core.reached import tell, unwatch, watch as watch_calls
from ..core.route import BASE, LOCK, OneCall, Route, bind, changing, frames_here, watch
from ..core.saved_modules import SavedModule, saved_module_of
from ..core.sites import Site, check_free, displace, place, site_of
from ..core.spread import any_spread, gathered, is_spread, is_tensor_parallel, trains_apart
from ..core.weights import write
from ..errors import (
    IA3Error,
    InvalidTypeError,
    StateError,
    UnknownNameError,
    did_you_mean,
    shown,
    warn_caller,
)
from ..targets.config import IA3Config
from ..targets.notes import notes
from ..targets.resolve import check_vectors, resolve
from .embeddings import own_values
from .frozen_base import FrozenBase
from .fused_mlp import fuse, is_fused, mark_sites, unfuse
from .heads import ends_of_heads, fresh_modules, warn_of_untrained, with_head
from .renaming import as_named_in

# The attributes of the modules that hold vectors or copies: setting one ("training") would set the
# vector, and a vector that is set ("frozen") would be the attribute.
TAKEN = {*dir(nn.Module()), *Site.__annotations__, *SavedModule.__annotations__}


class Adapters:
    """The adapters on a base model: vectors at its activations, and copies of whole modules.

    Changes hold the lock of `core.route`, and what raises (`IA3Error`) changes nothing. `configs`
    have their modules named; the `active` adapters multiply while `enabled`.
    """

    def __init__(self, model: nn.Module, merge: Merge) -> None:
        model = unwrapped(instance("the model", model, nn.Module, "a torch.nn.Module"))
        on = next((name for name, m in modules_of(model).items() if ATTRIBUTE in m._modules), None)
        if on is not None:
            raise StateError(
                f"{type(model).__name__} has adapters already (at {on!r}): use add_adapter on "
                "its IA3Model, or unload() that first"
            )
        self.model = model
        self.merge = merge
        self.base = FrozenBase(model)
        self.configs: dict[str, IA3Config] = {}
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.unloaded = False
        self._fresh = fresh_modules(model)
        self._inventory = Inventory(model)
        self.calls = Calls()
        # How many are in `disabled`, and what they will find again.
        self._disabling, self._enabled_before = 0, True
        # What threads and tasks have entered.
        self._open_routes: set[object] = set()
        _all.add(self)
        # Those that a thread or task may still be in: it keeps one that was left elsewhere.
        self._routes: list[weakref.ref[Route]] = []
        self._fused: list[str] = []
        self._plain = False
        # By config: structure is not asked again for each of many adapters.
        self._notes: dict[str, list[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not routed, and nobody is in `disabled` with it.
        return {**vars(self), "_open_routes": set(), "_routes": [], "_disabling": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _all.add(self)

    def contents(self) -> Contents:
        """The model's modules, sites and copies as they are now."""
        return self._inventory.now()

    def sites_of(self, name: str) -> list[tuple[str, Site]]:
        """Where an adapter has a vector: module name and site, in the model's order."""
        return [(module, site) for module, _, site in self.contents().sites if name in site]

    def copies_of(self, name: str) -> dict[str, nn.Module]:
        """Module name -> an adapter's copy of the module (`modules_to_save`)."""
        return {m: copies[name] for m, _, copies in self.contents().copies if name in copies}

    def notes_on(self, name: str, config: IA3Config) -> list[str]:
        """What a person should hear about the config that an adapter was added with."""
        key = config.to_json()
        if key not in self._notes:
            sides = {module: site.side for module, site in self.sites_of(name)}
            self._notes[key] = notes(self.model, config, sides)
        return self._notes[key]

    def merged_modules(self) -> set[str]:
        """The modules that have adapters merged into them."""
        return {module for module, _, site in self.contents().sites if site.merged}

    def stored(self, name: str, values: Mapping[str, Tensor] | None = None) -> Adapter:
        """An adapter, in the model's memory; `values`, the base model's state dict, go first.

        Without them, what is spread over processes is gathered: all of these have to ask.
        """
        end, having = f"{ATTRIBUTE}.{name}", self.sites_of(name)

        def given(key: str, held: Tensor) -> Tensor | None:
            if values is not None and key not in values and is_spread(held):
                raise StateError(
                    f"adapter {name!r} is spread over processes, and the state_dict has no "
                    f"{key!r}: save the gathered one, by the main process alone"
                )
            return gathered(values[key]) if values is not None and key in values else None

        vectors, copies = {}, {}
        for _, site in having:
            site.spread_again()
        for module, site in having:
            value = given(f"{module}.{end}", site[name])
            vectors[module] = site.whole(name) if value is None else value
        for module, twin in self.copies_of(name).items():
            for key, held in own_names(twin.state_dict(keep_vars=True)).items():
                value = given(f"{module}.{end}.{key}", held)
                copies[f"{module}.{key}"] = gathered(held) if value is None else value
        rescaled = {module for module, _ in having}
        for module, slot in self.base.replaced:
            key = f"{module}.{slot}"
            if module in rescaled:
                copies[key] = gathered((values or {}).get(key, self.merge.original(module, slot)))
        frozen = {module: site.frozen[name] for module, site in having if name in site.frozen}
        return Adapter(dataclasses.replace(self.configs[name]), vectors, copies, frozen)

    def named_as_here(self, stored: Adapter) -> Adapter:
        """An adapter by the names that the model's modules have now."""
        return as_named_in(self.model, self.contents().modules.keys(), stored)

    def active_config(self) -> IA3Config:
        """The (first) active adapter's config; raises `IA3Error` where none is active."""
        with LOCK:
            self.check_loaded()
            if not self.active:
                what = "set_adapter()" if self.configs else "add_adapter() and set_adapter()"
                there = sorted(self.configs)
                raise StateError(
                    f"no adapter is active on this model, which has {there}: {what} first"
                )
            return self.configs[self.active[0]]

    def named(self, names: str | Sequence[str]) -> tuple[str, ...]:
        """The names of adapters that there are, each once."""
        given = [names] if isinstance(names, str) else listed("adapters", names, "a list of names")
        self.check_known(given)
        return tuple(dict.fromkeys(given))

    # -- checks: each raises IA3Error -------------------------------------------------------------

    def check_known(self, names: Collection[str]) -> None:
        for name in listed("adapters", names, "a list of names"):
            check_string(name)
            if name not in self.configs:
                raise UnknownNameError(
                    f"no adapter {name!r} on this model, which has {sorted(self.configs)}"
                    f"{did_you_mean(name, self.configs)}"
                )

    def check_loaded(self) -> None:
        if self.unloaded:
            raise StateError("this model was unloaded: make a new one")

    def check_enabled(self, before: str) -> None:
        if not self.enabled:
            raise StateError(f"adapters are disabled: enable_adapter_layers() before {before}")

    def check_unrouted(self, what: str) -> None:
        """No route of the model is on. The caller holds the lock."""
        if self._open_routes:
            raise StateError(f"{what}: a route of this model is on, leave it first")

    def _check_unmerged(self, name: str) -> None:
        if name in self.merge.adapters:
            raise StateError(f"adapter {name!r} is merged: unmerge_adapter() first")

    def _check_one_copy(self, names: Collection[str]) -> None:
        for module, _, copies in self.contents().copies:
            having = sorted(set(names).intersection(copies.adapters))
            if len(having) > 1:
                raise StateError(
                    f"adapters {having} each have a copy of {module!r} (modules_to_save): only one "
                    "of them can be active"
                )

    def fit(
        self, name: str, config: IA3Config, stored: Adapter | None
    ) -> tuple[IA3Config, list[Target]]:
        """What a config, or a stored adapter, rescales; raises where that does not fit the model.

        Warns where a stored adapter was trained on another base model. Nothing is changed.
        """
        contents = self.contents()
        resolved, targets = resolve(self.model, config, stored.frozen if stored else None)
        for target in targets:
            check_free(self.model, contents.modules[target.name], target)
            _check_outside_copies(target.name, contents)
        if stored is not None:
            check_vectors(stored.vectors, targets, self.model)
            if stored.base and (other := stored.base.difference(self.model, self.merged_modules())):
                warn_caller(f"this may be the wrong base model for adapter {name!r}: {other}")
        return resolved, targets

    def add(
        self, name: str, config: IA3Config, stored: Adapter | None = None, wide: bool = True
    ) -> None:
        """Add an adapter, not active, its vectors from `stored` or new.

        They are `wide`, which is float32 or more, or have the dtypes of their modules.
        """
        # What is made in inference mode could never train.
        with changing(), torch.inference_mode(False):
            self.check_loaded()
            check_config(config)
            check_name(name)
            wide = flag("autocast_adapter_dtype", wide)
            if name in self.configs:
                raise IA3Error(f"adapter {name!r} exists already: delete it or choose another")
            old = stored is not None
            if stored is not None and (here := self.named_as_here(stored)) is not stored:
                stored, config = here, here.config
            saved_too = with_head(self.model, config, stored=old) or None
            config = dataclasses.replace(config, modules_to_save=saved_too)
            resolved, targets = self.fit(name, config, stored)
            # PEFT names all heads of a task in a config that it saves.
            optional = (saved_too or ()) if old else ends_of_heads(config)
            saved = saved_modules.find(self.model, resolved.modules_to_save, optional)
            _check_can_be_copied(saved, self.contents())
            own: Mapping[str, Mapping[str, Tensor]] = {}
            if stored is not None:
                stored = self._whole(stored, saved)
                own = self._own_values(name, stored, saved, targets)
            warn_of_untrained(self.model, self._fresh, name, config, saved, stored=old)
            if not config.inference_mode and trains_apart(self.model):
                warn_caller(
                    f"adapter {name!r} is put on a model that is spread over processes already: "
                    "the gradients of its vectors are not averaged over these; to train it, put it "
                    "on before FSDP"
                )
            try:
                self._add_vectors(name, config, targets, stored, wide)
                for module_name in saved:
                    module = self.contents().modules[module_name]
                    copies = saved_modules.attach(module)
                    copies.add(name, module)
                    if stored is not None:
                        saved_modules.load(copies[name], module_name, stored.copies)
                self._take_own(name, own)
                self.configs[name] = resolved
                tell(self.contents().sites)
            except BaseException:  # memory may run out, and a warning be an error
                self._take_off(name)
                raise

    def place(self, targets: Sequence[Target]) -> dict[str, Site]:
        """Module name -> the site there, placed now where there is none."""
        modules = self.contents().modules
        held = Counter(id(child) for m in modules.values() for child in m._modules.values())
        new = [t.name for t in targets if site_of(modules[t.name]) is None]
        sites = {t.name: place(self.model, modules[t.name], t, held) for t in targets}
        for site in sites.values():
            site.in_place = not self._plain
        if new:
            watch_calls(modules, new)
        return sites

    def _add_vectors(
        self,
        name: str,
        config: IA3Config,
        targets: Sequence[Target],
        stored: Adapter | None,
        wide: bool,
    ) -> None:
        modules, sites = self.contents().modules, self.place(targets)
        new = torch.ones if config.init_ia3_weights else torch.randn
        for target in targets:
            module = modules[target.name]
            device, dtype = device_of(module), torch.float32 if wide else dtype_of(module)
            if stored is None:
                vector = new(target.activation.shape, device=device, dtype=dtype)
            else:
                # A model on the meta device has no values to lose; the adapter has.
                device = torch.device("cpu") if device.type == "meta" else device
                vector = stored.vectors[target.name].to(device, dtype, copy=True)
            sites[target.name].add(name, vector, target.frozen, follows=not wide)

    def _whole(self, stored: Adapter, saved: Sequence[str]) -> Adapter:
        """A stored adapter with its values, whose vectors have been checked.

        Raises where its copies do not fit the model, before it reads values that are not read yet.
        """
        if stored.unread is not None and stored.copies:
            copied, _ = own_values(stored.copies, saved, self.model)
            saved_modules.check(copied, saved, self.model)
        return stored.whole()

    def _own_values(
        self, name: str, stored: Adapter, saved: Sequence[str], targets: Sequence[Target]
    ) -> dict[str, dict[str, Tensor]]:
        """The embeddings that a stored adapter needs: slot -> value, by module.

        Raises where these, or its copies of the `saved` modules, cannot be put on the model.
        """
        copied, own = own_values(stored.copies, saved, self.model)
        saved_modules.check(copied, saved, self.model)
        rescaled = {target.name for target in targets}
        # Without values of its own it needs the base's, where another one's are now.
        for (module, slot), value in self.base.replaced.items():
            if module in rescaled and f"{module}.{slot}" not in stored.copies:
                own.setdefault(module, {})[slot] = value
        contents, rescaled = self.contents(), rescaled.intersection(own)
        for module in own:
            _check_unspread(module, contents)
        _check_can_be_copied([module for module in own if module not in rescaled], contents)
        others = [m for m, _, s in contents.sites if m in rescaled and s.vectors.keys() - {name}]
        if others:
            raise IA3Error(
                f"the adapter needs other weights of {others[0]!r} than the model has, and other "
                "adapters on this model rescale it: unload() first"
            )
        return own

    def _take_own(self, name: str, own: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Have an adapter compute with the embeddings that it came with: slot -> value, by module.

        They are a copy that does not train; of an output layer with a vector, the base's own.
        """
        modules = self.contents().modules
        for module_name, values in own.items():
            module = modules[module_name]
            if site_of(module) is not None:
                self.base.replace(module_name, values)
                continue
            copies = saved_modules.attach(module)
            copies.add(name, module)
            copies.frozen.add(name)
            for slot, value in values.items():
                write(copies[name], slot, value)

    def load_into(self, name: str, stored: Adapter) -> None:
        """Give an adapter that is there the values of a stored one, in place.

        Calls of other threads go on with those they began with.
        """
        # Else what is copied for these could not be saved for a backward pass.
        with changing(), torch.inference_mode(False):
            self._check_unmerged(name)
            stored = self.named_as_here(stored)
            having, copies = self.sites_of(name), self.copies_of(name)
            for _, site in having:
                site.check_whole(name)
            targets = [site.target(module) for module, site in having]
            check_vectors(stored.vectors, targets, self.model)
            saved = [
                m for m, _, c in self.contents().copies if m in copies and name not in c.frozen
            ]
            stored = self._whole(stored, saved)
            own = self._own_values(name, stored, saved, targets)
            for module, site in having:
                here, there = site.frozen.get(name, ()), stored.frozen.get(module, ())
                if here != there:
                    raise IA3Error(
                        f"the adapter does not fit {name!r}: other values of its vectors stay one: "
                        f"of {module!r} {list(there)}, expected {list(here)}"
                    )
            with self.calls.closed():
                called = self.calls.is_called_elsewhere()
                if called:
                    former: dict[tuple[Any, str], Any] = {
                        (site, name): site.former(name) for _, site in having
                    }
                    for _, _, held in self.contents().copies:
                        if name in held:
                            former[held, name] = copy.deepcopy(held[name])
                    self.calls.keep(former)
                for module, site in having:
                    site.write(name, stored.vectors[module], in_place=not called)
                for module in saved:
                    saved_modules.load(copies[module], module, stored.copies)
                self._drop_copies(name, copies.keys() - set(saved))
                self._take_own(name, own)
                self.activate()

    def remove(self, name: str) -> None:
        """Remove an adapter. If no other is active then, the first that is left becomes so.

        Calls of other threads go on with its values.
        """
        with changing():
            self.check_unrouted("delete_adapter")
            self.check_known([name])
            self._check_unmerged(name)
            if any(any_spread(site) for _, site in self.sites_of(name)):
                raise StateError(
                    f"adapter {name!r} is spread over processes by FSDP, which would put its "
                    "vectors back: set_adapter() to another instead"
                )
            remaining = tuple(other for other in self.active if other != name)
            first = next((other for other in self.configs if other != name), None)
            if self.active and not remaining and first is not None:
                warn_caller(f"adapter {name!r} was active; {first!r} is active now")
            # Before its vectors go: calls of other threads ask for those of the active ones.
            going: dict[tuple[Any, str], Any] = {
                (site, name): site.vector(name) for _, site in self.sites_of(name)
            }
            for _, _, held in self.contents().copies:
                if name in held:
                    going[held, name] = held[name]
            self.calls.keep(going)
            if self.active and not remaining and first is not None:
                self.switch(first, leaving=name)
            else:
                self.activate(remaining)
            self._take_off(name)

    def _take_off(self, name: str) -> None:
        self.configs.pop(name, None)
        contents = self.contents()
        for _, _, site in contents.sites:
            site.remove(name)
        for module_name, _, site in contents.sites:
            if not site.vectors:
                self.base.put_back(module_name)
        empty = [m for _, m, site in contents.sites if not site.vectors and not site.banked]
        for module in empty:
            displace(module)
        if empty:
            unwatch(self.model)
        self._drop_copies(name, self.copies_of(name))

    def _drop_copies(self, name: str, modules: Collection[str]) -> None:
        for module_name, module, copies in self.contents().copies:
            if module_name in modules:
                copies.remove(name)
            if not copies.adapters:
                saved_modules.detach(module)

    def unload(self) -> None:
        """Take everything off the model, which is then what it was."""
        with changing():
            self.unfuse()
            self.unmerge()
            contents = self.contents()
            for _, module, _ in contents.sites:
                displace(module)
            for _, module, _ in contents.copies:
                saved_modules.detach(module)
            watch(self.model, False)
            unwatch(self.model)
            if (forward := patched(self.model, OneCall)) is not None:
                forward.remove()
            self.calls.change(State())
            self.base.give_back()
            self.configs.clear()
            self.active = ()
            # It holds every module, also those that the model may part with later.
            self._inventory = Inventory(self.model)
            # Last: what has failed half way can be called again.
            self.unloaded = True

    # -- which of them multiply and train ---------------------------------------------------------

    def switch(
        self, names: str | Sequence[str], inference_mode: bool = False, leaving: str | None = None
    ) -> None:
        """Make these adapters the active ones, and unless in inference mode those that train."""
        inference_mode = flag("inference_mode", inference_mode)
        with changing():
            active = self.named(names)
            self._check_one_copy(active)
            if any(map(self.copies_of, active)):
                self.check_unrouted("set_adapter of an adapter with modules_to_save")
            if self.merge.adapters:
                warn_caller("adapters are merged; they are unmerged first")
            trained, changed = () if inference_mode else active, {*self.active, *active}
            with self._unmerged("set_adapter"):
                self.activate(active)
            self._train(trained, changed, leaving)

    def _train(self, trained: Collection[str], changed: set[str], leaving: str | None) -> None:
        """Have the vectors and copies of these adapters alone require gradients.

        Of an adapter not `changed`, `model.requires_grad_()` has reached all vectors or none: the
        first one tells. For one that is `leaving`, a backward pass may be to come.
        """
        contents = self.contents()
        for name in self.configs.keys() - {leaving}:
            first = next((site for _, _, site in contents.sites if name in site), None)
            if name in changed or (first is not None and first[name].requires_grad):
                for _, site in self.sites_of(name):
                    site[name].requires_grad = name in trained
        for _, _, copies in contents.copies:
            for name in set(copies.adapters) - copies.frozen - {leaving}:
                for parameter in copies[name].parameters():
                    if parameter.is_floating_point():
                        parameter.requires_grad_(name in trained)

    def require_grad(self, names: str | Sequence[str], required: bool) -> None:
        """Have the vectors and copies of these adapters train or not; others stay as they are."""
        required = flag("requires_grad", required)
        with changing():
            for name in self.named(names):
                for _, site in self.sites_of(name):
                    site[name].requires_grad = required
                for _, _, copies in self.contents().copies:
                    trained = name in copies and name not in copies.frozen
                    for parameter in copies[name].parameters() if trained else ():
                        if parameter.is_floating_point():
                            parameter.requires_grad_(required)

    def activate(self, names: tuple[str, ...] | None = None) -> None:
        """Have these adapters multiply from the next call on; for `None`, those that did.

        What is merged, fused or routed decides where hooks are needed: call this after its changes.
        Where it raises `IA3Error`, nothing has changed.
        """
        with changing():
            names, contents = self.active if names is None else names, self.contents()
            active, merged = names if self.enabled else (), self.merge.adapters
            if not merged <= {*active}:  # then it takes the place of what is active
                active = tuple(name for name in self.configs if name in merged)
            multiplied = tuple(name for name in active if name not in merged)
            for _, module, site in contents.sites:
                site.check(module, multiplied)
            self.active = names
            self._routes = [route for route in self._routes if route() is not None]
            routed = len(self._routes) > 0
            watch(self.model, routed)
            bind()
            if not self.unloaded and patched(self.model, OneCall) is None:
                OneCall(self.model, self.calls)
            places: list[tuple[nn.Module, Any]] = [
                (module, place) for _, module, place in (*contents.sites, *contents.copies)
            ]
            for _, place in places:
                place._calls = self.calls
            # From here on calls that are open hold to what they have read.
            self.calls.disturbed = True
            if self._fused:  # of these layers, some may have been taken out of the model
                fused = [contents.modules[name] for name in self._fused if name in contents.modules]
                mark_sites([site for _, _, site in contents.sites], fused)
            for _, module, site in contents.sites:
                site.activate(module, multiplied, routed)
            for _, _, copies in contents.copies:
                copies.active = next((name for name in active if name in copies), None)
            now = {place: place.active for _, place in places if place.active}
            self.calls.change(State(now, places, frozenset(merged)))
            self.calls.settle()

    def enable(self, enabled: bool) -> None:
        """Have the active adapters multiply, or none, which unmerges those that are merged."""
        with changing():
            if not enabled:
                what = f"disabling adapters (rows of the base model are named {BASE!r})"
                self.check_unrouted(what)
            before, self.enabled = self.enabled, enabled
            try:
                with nullcontext() if enabled else self._unmerged("disabling adapters"):
                    self.activate()
            except BaseException:
                self.enabled = before
                raise

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context adapters are disabled, until the last thread has left such a one."""
        entered = False
        try:
            with changing():
                before = self.enabled
                self.enable(False)
                if not self._disabling:
                    self._enabled_before = before
                self._disabling += 1
                entered = True
            yield
        finally:
            if entered:
                with changing():
                    self._disabling -= 1
                    if not self._disabling:
                        self.enable(self._enabled_before)

    # -- merging ----------------------------------------------------------------------------------

    def merge_in(self, names: str | Sequence[str] | None, safe: bool) -> None:
        """Merge adapters, the active ones for `None`, beside those that are merged already."""
        safe = flag("safe_merge", safe)
        with changing(), torch.inference_mode(False):
            self.check_enabled("merging them")
            self._merge(self.active if names is None else self.named(names), safe)

    def _merge(self, names: Sequence[str], safe: bool) -> None:
        self.check_unrouted("merging")
        merged = self.merge.adapters
        if merged and not set(names) - merged:
            warn_caller(f"adapters {sorted(merged)} are merged already")
            return
        # In the order in which they would multiply, unmerged.
        order = dict.fromkeys([*self.active, *self.configs])
        with self.calls.alone("merging"):
            self.merge.make(tuple(name for name in order if name in merged.union(names)), safe)
            self.activate()

    @contextmanager
    def _unmerged(self, what: str) -> Iterator[None]:
        """Put the original weights back for what is done within, and for good."""
        with self.calls.alone(what) if self.merge.adapters else nullcontext():
            self.merge.undo()
            yield

    def unmerge(self) -> None:
        with changing(), self._unmerged("unmerging"):
            self.activate()

    def merge_for_good(
        self, names: str | Sequence[str] | None, safe: bool, dequantise: bool
    ) -> None:
        """As `IA3Model.merge_and_unload`, but for unloading; the caller holds the lock."""
        safe, dequantise = flag("safe_merge", safe), flag("dequantise", dequantise)
        self.check_unrouted("merging")
        merged = self.merge.adapters
        chosen = self.active if names is None else self.named(names)
        # What is merged takes the place of what is active, or is part of it.
        replaces = names is None and not merged <= set(chosen)
        chosen = tuple(merged) if replaces else tuple(dict.fromkeys([*chosen, *merged]))
        self._check_one_copy(chosen)
        replaced: dict[str, nn.Module] = {}
        try:
            if dequantise:
                self.merge.dequantise(chosen, replaced)
            if set(chosen) - merged:
                self._merge(chosen, safe)
        except BaseException:
            self.merge.requantise(replaced)
            raise
        twins = {
            module: copies[name]
            for _, module, copies in self.contents().copies
            for name in set(chosen).intersection(copies.adapters)
        }
        saved_modules.keep_all(self.model, twins)
        self.merge.keep()
        self.base.keep_replaced()
        # The output layer may have weights of its own now.
        config: Any = getattr(self.model, "config", None)
        tied = getattr(config, "tie_word_embeddings", False)
        if isinstance(self.model, PreTrainedModel) and tied:
            outputs = self.model.get_output_embeddings()
            # A model without an output layer need not have embeddings of tokens.
            if outputs is not None:
                tied = outputs.weight is self.model.get_input_embeddings().weight
                config.tie_word_embeddings = tied

    # -- how they multiply ------------------------------------------------------------------------

    def route_opened(self, route: Route, frame: object) -> None:
        """Have the hooks there that ask for a route. Until it is gone nothing removes them."""
        with changing():
            self._open_routes.add(frame)
            self._routes.append(weakref.ref(route))
            try:
                watch(self.model, True)
                if not all(site.routed for _, _, site in self.contents().sites):
                    self.activate()
            except BaseException:
                self._open_routes.discard(frame)
                raise

    def route_closed(self, frame: object) -> None:
        """Undo `route_opened`; the hooks stay until the next change."""
        # Without the lock: waiting for it could be interrupted, and the route would be on for ever.
        self._open_routes.discard(frame)

    def use_plain_product(self, plain: bool) -> None:
        plain = flag("plain", plain)
        with changing(), self.calls.alone("use_plain_product"):
            self._plain = plain
            for _, _, site in self.contents().sites:
                site.in_place = not plain

    def fuse(self) -> int:
        with changing():
            self.check_loaded()
            with self.calls.alone("fuse_mlp"):
                self._fused = fuse(self.model)
                self.activate()
            return len(self._fused)

    def unfuse(self) -> None:
        with changing():
            if self._fused:
                with self.calls.alone("unfuse_mlp"):
                    self._fused = []
                    unfuse(self.model)
                    self.activate()


def _forget_threads() -> None:
    """Have only the routes on that go on in a process that was forked off."""
    here = frames_here()
    for adapters in list(_all):
        adapters._open_routes &= here


_all: weakref.WeakSet[Adapters] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def check_config(config: Any) -> None:
    if not isinstance(config, IA3Config):
        kind = f"{type(config).__module__}.{type(config).__name__}"
        raise InvalidTypeError(f"the config is a {kind}, expected an ia3.IA3Config")


def check_string(name: object) -> None:
    if not isinstance(name, str):
        kind = type(name).__name__
        raise InvalidTypeError(f"adapter name {shown(name)} is {kind}, expected a string")


def check_name(name: str) -> None:
    check_string(name)
    if not re.fullmatch(r"[^./\\\s\x00\ud800-\udfff]+", name):
        raise IA3Error(f"adapter name {name!r} must have no dot, slash or white space")
    if name == BASE:
        raise IA3Error(f"adapter name {BASE!r} means the base model: choose another")
    if name in TAKEN:
        raise IA3Error(
            f"adapter name {name!r} is also an attribute of the modules that hold the vectors: "
            "choose another"
        )


def _check_can_be_copied(saved: Sequence[str], contents: Contents) -> None:
    for name in saved:
        _check_outside_copies(name, contents)
        _check_unspread(name, contents)
        module = contents.modules[name]
        for part_name, part in own_names(dict(module.named_modules(prefix=name))).items():
            if site_of(part) is not None or (part is not module and saved_module_of(part)):
                raise IA3Error(
                    f"modules_to_save: another adapter on this model has vectors or a copy in "
                    f"{part_name!r}, which is part of {name!r}"
                )
            if is_fused(part):
                raise StateError(
                    f"modules_to_save: {part_name!r} in {name!r} is fused: unfuse_mlp() first"
                )


def _check_unspread(name: str, contents: Contents) -> None:
    if any_spread(contents.modules[name]):
        parallel = any(map(is_tensor_parallel, contents.modules[name].modules()))
        raise StateError(
            f"{name!r} is spread over processes already, and the adapter has weights of its own "
            "for it: "
            + (
                "load the base model without tensor parallelism"
                if parallel
                else "put the adapter on before FSDP"
            )
        )


def _check_outside_copies(name: str, contents: Contents) -> None:
    for around, _, _ in contents.copies:
        if name.startswith(f"{around}."):
            raise IA3Error(
                f"module {name!r} is part of {around!r}, which another adapter on this model "
                "has in its modules_to_save"
            )
