"""`AdapterBank`: the adapters of a model that many are served with, as rows of one tensor.

A batch takes its rows from it by one gather. Adapters beyond the capacity wait in the host's
memory, or in their files.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..adapter.files import Adapter, check_finite, unread_adapter
from ..adapter.fingerprint import Fingerprint
from ..adapter.layout import open_folder
from ..arguments import flag, instance, listed, path_of, whole
from ..base.loading import device_named
from ..core.activations import device_of
from ..core.route import BASE, changing
from ..core.sites import Site
from ..errors import (
    IA3Error,
    InvalidTypeError,
    StateError,
    UnknownNameError,
    did_you_mean,
    naming,
    shown,
)
from ..files.saved import (
    HEAD_NAME,
    TASK_NAME,
    WEIGHTS_NAME,
    Beside,
    SavedFolder,
    weights_file,
)
from ..model.adapters import check_name, check_string
from ..model.ia3_model import IA3Model

BASE_SLOT = 0
# A free slot takes eight bytes of a list.
MOST = 2**31

_banks: weakref.WeakSet[AdapterBank] = weakref.WeakSet()
# Held while there is another bank: a fork goes through them.
_making = threading.Lock()
_held_by_fork = threading.local()


def _before_fork() -> None:
    """Wait for other threads' work on a bank: its half would be found in the new process."""
    _making.acquire()
    _held_by_fork.locks = [*(bank._lock for bank in list(_banks)), _making]
    for lock in _held_by_fork.locks[:-1]:
        lock.acquire()


def _after_fork() -> None:
    for lock in _held_by_fork.locks:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork
    )


@dataclass(frozen=True)
class Registered:
    """An adapter of a bank; `source` is its folder, or `None` if it was given in memory.

    Resident: its values are on the device and can be used. Pinned: they stay or come back there.
    """

    name: str
    source: Path | None
    resident: bool
    pinned: bool


@dataclass(frozen=True)
class Refreshed:
    """The adapters whose files were replaced, and adapter -> why it cannot be used."""

    changed: list[str]
    failed: dict[str, str]


@dataclass(frozen=True, eq=False)
class Version:
    """What a classifier has beside its vectors: another object where they are read anew.

    `base` is the model that it was fitted on, if its file says so.
    """

    beside: Beside
    base: Fingerprint | None


@dataclass
class _Entry:
    """An adapter of the bank: its folder, or itself with values of its own.

    `sites` are those it rescales, by module name. `stamp` tells versions of its file apart. `slot`
    is its row, if it is resident, and `version` what a classifier has beside that; a pinned one
    keeps them also where `error` says why it cannot be used.
    """

    source: Path | Adapter
    sites: Mapping[str, Site] = field(default_factory=dict)
    stamp: tuple[int, int, int] | None = None
    slot: int | None = None
    version: Version | None = None
    pinned: bool = False
    error: str | None = None


@dataclass(frozen=True)
class _Found:
    """What an adapter's files hold: its row, `[columns]`, on the CPU; the rest is an `_Entry`'s."""

    row: Tensor
    sites: Mapping[str, Site]
    stamp: tuple[int, int, int] | None = None
    version: Version | None = None

    @property
    def bytes(self) -> int:
        """What it takes, but for what many share."""
        texts = () if self.version is None else self.version.beside.texts.values()
        return self.row.nbytes + sum(len(text) for text in texts if text is not None)


class _Waiting:
    """Adapters that made room for others, in the host's memory; the least recent ones go first."""

    def __init__(self, most_bytes: int) -> None:
        self.bytes = 0
        self._most_bytes = most_bytes
        self._found: OrderedDict[str, _Found] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def put(self, name: str, found: _Found) -> None:
        self.take(name)
        self._found[name] = found
        self.bytes += found.bytes
        while self.bytes > self._most_bytes:
            self.take(next(iter(self._found)))

    def take(self, name: str) -> _Found | None:
        found = self._found.pop(name, None)
        self.bytes -= 0 if found is None else found.bytes
        return found

    def clear(self) -> None:
        self._found.clear()
        self.bytes = 0


class AdapterBank:
    """Adapters of one model for mixed batches: `model(..., adapter_names=[...])`.

    Up to `capacity` of them are resident; of those that are not pinned the least recently used make
    room for others, and wait in the host's memory as long as there is room. All methods may be
    called from several threads.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from ia3 import AdapterBank, IA3Config, IA3Model
    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
    >>> config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    >>> model = IA3Model(LlamaForCausalLM(config), IA3Config())
    >>> tickets = model.adapter("default")
    >>> bank = AdapterBank(model.unload(), capacity=2)
    >>> bank.add("tickets", tickets)  # or the folder of a saved adapter
    >>> ids = torch.arange(10).reshape(2, 5)
    >>> bank.model(input_ids=ids, adapter_names=["tickets", "__base__"]).logits.shape
    torch.Size([2, 5, 64])

    Args:
        model: has no other bank. A base model gets an `IA3Model` without adapters of its own.
        capacity: how many adapters are resident at most.
        device: where the values are; the model's device if not given.
        dtype: of the values; bfloat16 takes half the memory and rounds them.
        host_bytes: how much memory of the host may be taken by adapters that made room for others.
            They come back in a part of a millisecond; those beyond it are read from their files.

    Attributes:
        model: the `IA3Model`, given or made.
        values: `[capacity + 1, columns]`: a row for each resident adapter, and the first one for
            the base model. It has columns for the sites of all adapters so far, ones where an
            adapter has none. Rows that were never used take no memory on a CPU.
        hits, misses, evictions: how often an adapter that was named was resident, or not, and how
            often one made room.

    Raises:
        InvalidTypeError: an argument is of another type.
        StateError: the model has a bank, or there is no such device.
        IA3Error: the capacity is below 1 or above 2**31, or `host_bytes` is below 0.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int = 1024,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype = torch.float32,
        host_bytes: int = 2**30,
    ) -> None:
        instance("model", model, nn.Module, "a torch.nn.Module")
        whole("capacity", capacity, 1, MOST)
        whole("host_bytes", host_bytes, 0, expected="at least 0")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InvalidTypeError(f"dtype is {shown(dtype)}, expected a floating dtype")
        # Before the model is frozen: there may be no such device.
        self.device = device_of(model) if device is None else device_named(device)
        self.model = model if isinstance(model, IA3Model) else IA3Model.without_adapters(model)
        self.capacity = capacity
        self.values = torch.ones(capacity + 1, 0, dtype=dtype, device=self.device)
        self._lock = threading.RLock()
        # Site -> its first column, in the order of the columns.
        self._columns: dict[Site, int] = {}
        self._entries: dict[str, _Entry] = {}
        # Resident adapters that are not pinned, the least recently used first.
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._free = list(range(capacity, 0, -1))
        self._waiting = _Waiting(host_bytes)
        self.hits = self.misses = self.evictions = 0
        # Most adapters of a bank have the same config and shapes, and so the same sites.
        self._fitting: dict[str, tuple[dict[str, Site], Fingerprint | None]] = {}
        self.model.routes.attach(self)
        with _making:
            _banks.add(self)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        """The adapters' names, in the order in which they were added."""
        with self._lock:
            return [*self._entries]

    def add(self, name: str, source: str | Path | Adapter, pinned: bool = False) -> None:
        """Register an adapter. It is checked at once, and loaded while there is room.

        Args:
            name: new to the bank and its model, by the rules of `IA3Model.add_adapter`.
            source: the adapter's folder, or what `IA3Model.adapter` gives, whose values are kept
                in memory. A relative folder is taken from where the process is now.
            pinned: it stays resident.

        Raises:
            InvalidTypeError: an argument is of another type.
            StateError: the bank was closed, or the adapter is to be pinned and all slots are.
            MissingFileError: there is no adapter in the folder.
            IA3Error: the name is taken or malformed; the source is broken, or does not fit the
                model; it has copies of modules (`modules_to_save`) or rescales experts. The bank is
                then unchanged.
        """
        with self._lock:
            self._check_open()
            check_name(name)
            if name in self._entries or name in self.model.peft_config:
                raise IA3Error(f"adapter {name!r} exists already: remove it or choose another")
            entry, pinned = _Entry(_checked_source(source)), flag("pinned", pinned)
            if pinned:
                self._check_room(name)
            found = self._read(name, entry)
            entry.sites, entry.stamp = found.sites, found.stamp
            with changing():
                if name in self.model.peft_config:  # since it was looked for above
                    raise IA3Error(f"adapter {name!r} exists already: remove it or choose another")
                if self._free or pinned:
                    self._place(name, entry, found)
                    if not pinned:
                        self._recent[name] = None
                else:
                    self._waiting.put(name, found)
                entry.pinned = pinned
                self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget an adapter. Calls that are routed to it go on with its values.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: the bank was closed.
        """
        with self._lock, changing():
            self._forget(name, self._entry(name))
            del self._entries[name]

    def list(self) -> list[Registered]:
        """All adapters, in the order in which they were added."""
        listed = []
        with self._lock:
            for name, entry in self._entries.items():
                source = entry.source if isinstance(entry.source, Path) else None
                resident = entry.slot is not None and entry.error is None
                listed.append(Registered(name, source, resident, entry.pinned))
        return listed

    def pin(self, name: str) -> None:
        """Have an adapter stay resident; it is loaded if it is not.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: it cannot be loaded, all slots are pinned, or the bank was closed.
            IA3Error: it does not fit the model any more.
        """
        with self._lock:
            entry = self._entry(name)
            self._make_resident([name])
            entry.pinned = True
            self._recent.pop(name, None)

    def unpin(self, name: str) -> None:
        """Undo `pin`.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: the bank was closed.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.pinned:
                entry.pinned = False
                self._recent[name] = None
                if entry.error is not None:
                    self._forget(name, entry)

    def refresh(self, names: Sequence[str] | None = None) -> Refreshed:
        """Load adapters anew whose files were replaced (by a rename, as `save_pretrained` does).

        All are looked at, or those `names`. A call sees the old
        values of an adapter or the new ones. An adapter whose file is broken cannot be used until
        it has been replaced and refreshed; a pinned one keeps its slot meanwhile. One whose file is
        gone can be used for as long as it is in memory.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: the bank was closed.
        """
        found = Refreshed([], {})
        with self._lock:
            asked = self._entries if names is None else listed("names", names, "a list of names")
            entries = [(name, self._entry(name)) for name in asked]
        for name, entry in entries:
            # One at a time: calls go on meanwhile.
            with self._lock:
                try:
                    if self._entries.get(name) is entry and self._refresh(name, entry):
                        found.changed.append(name)
                except (IA3Error, OSError) as error:
                    found.failed[name] = str(error)
        return found

    def close(self) -> None:
        """Detach the bank from its model.

        Raises:
            StateError: a route of the model is on.
        """
        with self._lock:
            if self.model.routes.bank is self:
                self.model.routes.detach()
                self._entries.clear()
                self._waiting.clear()
                self._columns.clear()
                self.values = self.values.new_ones(self.capacity + 1, 0)

    def gather(self, names: Sequence[str], index: Sequence[int]) -> dict[Site, Tensor]:
        """Site -> values, `[rows, dim]`, in the bank's dtype and on its device.

        `index`, `[rows]`, says which of the adapters, or `BASE`, each row has. Sites are those
        where one of them has a vector. What is not resident is loaded.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: an adapter cannot be loaded, there is no room for all, or the bank was
                closed.
            IA3Error: `index` does not count in `names`.
        """
        with self._lock:
            named = listed("names", names, "a list of names")
            for name in named:
                check_string(name)
            own = list(dict.fromkeys(name for name in named if name != BASE))
            self._make_resident(own)
            slots = [BASE_SLOT if name == BASE else self._entries[name].slot for name in named]
            try:
                rows = torch.tensor([slots[place] for place in index], dtype=torch.int64)
            except (TypeError, IndexError) as error:
                expected = f"a list of numbers from 0 to {len(slots) - 1}"
                raise IA3Error(f"index is {shown(index)}, expected {expected}") from error
            rows = rows.to(self.device)
            with torch.inference_mode(False), torch.no_grad():
                return self._by_site(self.values.index_select(0, rows), own)

    def versions(self, names: Sequence[str]) -> tuple[dict[Site, Tensor], Sequence[Version | None]]:
        """The values of some adapters, site -> `[names, dim]`, and what is beside these.

        The latter is `None` for what is no classifier, or was given in memory. There may be more
        adapters than have room: they are resident in turns.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: an adapter cannot be loaded, all slots are pinned, or the bank was closed.
        """
        with self._lock:
            named = listed("names", names, "a list of names")
            entries = {name: self._entry(name) for name in named}
            room = max(1, len(self._free) + len(self._recent))
            order = [*entries]
            if len(order) > room:
                # Those that are resident first: they make room for the others.
                order.sort(key=lambda name: entries[name].slot is None)
            rows, versions = [], {}
            with torch.inference_mode(False), torch.no_grad():
                for start in range(0, len(order), room):
                    turn = order[start : start + room]
                    self._make_resident(turn)
                    slots = torch.tensor([entries[name].slot for name in turn], device=self.device)
                    rows.append(self.values.index_select(0, slots))
                    versions.update({name: entries[name].version for name in turn})
                if order != named or len(rows) != 1:
                    rows = [self._in_order(rows, [order.index(name) for name in named])]
            return self._by_site(rows[0], named), [versions[name] for name in named]

    def _in_order(self, rows: Sequence[Tensor], index: Sequence[int]) -> Tensor:
        """These rows of all, `[index, columns]`; those that came later may have more columns."""
        width = self.values.shape[1]
        padded = [F.pad(part, (0, width - part.shape[1]), value=1.0) for part in rows]
        together = torch.cat([self.values[:0], *padded])
        return together.index_select(0, torch.tensor(index, device=self.device).long())

    def _by_site(self, values: Tensor, names: Iterable[str]) -> dict[Site, Tensor]:
        """Site -> its columns, for the sites where one of these adapters has a vector."""
        parts = torch.split(values, [site.activation.dim for site in self._columns], 1)
        used = {site for name in names for site in self._entries[name].sites.values()}
        return {s: part for s, part in zip(self._columns, parts, strict=True) if s in used}

    def _make_resident(self, names: Sequence[str]) -> None:
        for name in names:
            entry = self._entry(name)
            if entry.error is not None:
                raise StateError(f"adapter {name!r} cannot be used: {entry.error}")
            if name in self._recent:
                self._recent.move_to_end(name)
        for name in names:
            entry = self._entries[name]
            if entry.slot is not None:
                self.hits += 1
                continue
            self.misses += 1
            self._check_room(name, names)
            found = self._waiting.take(name)
            try:
                found = found or self._read(name, entry)
            except (IA3Error, OSError) as error:
                if isinstance(error, IA3Error):  # else the disk may answer the next time
                    entry.error = str(error)
                raise StateError(f"adapter {name!r} cannot be used: {error}") from error
            with changing():
                self._place(name, entry, found, names)
                self._recent[name] = None

    def _place(self, name: str, entry: _Entry, found: _Found, keep: Sequence[str] = ()) -> None:
        """Put an adapter's row into its slot; it gets one if it has none."""
        if entry.slot is None:
            self._check_room(name, keep)
            if not self._free:
                oldest = next(iter(self._recent))
                self._make_wait(oldest, self._entries[oldest])
            entry.slot = self._free.pop()
        with torch.inference_mode(False), torch.no_grad():
            # It may have waited while others brought columns.
            width = len(found.row)
            self.values[entry.slot, :width] = found.row.to(self.values.device)
            self.values[entry.slot, width:] = 1.0
        entry.sites, entry.stamp, entry.version = found.sites, found.stamp, found.version

    def _check_room(self, name: str, keep: Sequence[str] = ()) -> None:
        # All of a batch were moved to the end.
        oldest = next(iter(self._recent), None)
        if not self._free and (oldest is None or oldest in keep):
            pinned = self.capacity - len(self._recent)
            raise StateError(
                f"no room for adapter {name!r}: of {self.capacity} slots {pinned} are pinned "
                f"and {len(self._recent.keys() & keep)} are of the same batch; make a bank of "
                "more capacity, unpin some or split the batch"
            )

    def _make_wait(self, name: str, entry: _Entry) -> None:
        """Have a resident adapter wait in the host's memory."""
        with torch.inference_mode(False), torch.no_grad():
            row = self.values[entry.slot].to("cpu", copy=True)
        found = _Found(row, entry.sites, entry.stamp, entry.version)
        self._forget(name, entry)
        self._waiting.put(name, found)
        self.evictions += 1

    def _forget(self, name: str, entry: _Entry) -> None:
        """Have an adapter's values nowhere but in its file."""
        self._waiting.take(name)
        if entry.slot is not None:
            self._free.append(entry.slot)
            entry.slot = entry.version = None
            self._recent.pop(name, None)

    def _refresh(self, name: str, entry: _Entry) -> bool:
        """Look at an adapter's files; returns whether there is another version of them."""
        if isinstance(entry.source, Adapter):
            return False
        try:
            if entry.error is None and _stamp(weights_file(entry.source).stat()) == entry.stamp:
                return False
            found = self._read(name, entry)
        except (IA3Error, OSError) as error:
            in_memory = entry.slot is not None or name in self._waiting
            if not in_memory or not isinstance(error, FileNotFoundError):
                entry.error = str(error)
                if not entry.pinned:
                    self._forget(name, entry)
            raise
        with changing():
            entry.error = None
            entry.sites, entry.stamp = found.sites, found.stamp
            if entry.slot is not None:
                self._place(name, entry, found)
            else:
                self._waiting.put(name, found)
        return True

    def _read(self, name: str, entry: _Entry) -> _Found:
        """An adapter as a row, `[columns]`, on the CPU, checked against the model."""
        if isinstance(entry.source, Adapter):
            return self._row(name, entry.source, None)
        with open_folder(entry.source) as saved:
            return self._row(name, unread_adapter(saved), saved)

    def _row(self, name: str, adapter: Adapter, saved: SavedFolder | None) -> _Found:
        adapter = self.model.routes.named_as_here(adapter)
        sites, base = self._sites_of(name, adapter)
        adapter = adapter.whole()
        with torch.inference_mode(False), torch.no_grad():
            row = torch.ones(self.values.shape[1], dtype=self.values.dtype)
            for module, site in sites.items():
                vector, start = adapter.vectors[module], self._columns[site]
                row[start : start + site.activation.dim] = vector.reshape(-1)
                for begin, end in adapter.frozen.get(module, ()):
                    row[start + begin : start + end] = 1.0
        if not row.isfinite().all():
            with naming(f"adapter {name!r}"):
                check_finite(adapter.vectors)
                raise IA3Error(f"it has values beyond {row.dtype}, the bank's dtype")
        if saved is None:
            return _Found(row, sites)
        version = None
        if saved.text(TASK_NAME) is not None:
            version = Version(saved.beside((TASK_NAME, HEAD_NAME)), base)
        return _Found(row, sites, _stamp(saved.seen), version)

    def _sites_of(
        self, name: str, adapter: Adapter
    ) -> tuple[Mapping[str, Site], Fingerprint | None]:
        """Module name -> site, for each vector of an adapter, with columns for all of them.

        And the base model's fingerprint: one object for all adapters that have the same.
        """
        shapes = [(module, vector.shape) for module, vector in adapter.vectors.items()]
        parts = (adapter.config.to_json(), adapter.base, shapes, adapter.frozen, [*adapter.copies])
        key = repr(parts)
        # Copies can only be of the model's own embeddings, which the names do not tell.
        if key not in self._fitting or adapter.copies:
            sites = self.model.routes.sites_for_bank(name, adapter)
            self._widen(sites.values())
            self._fitting[key] = sites, adapter.base
        return self._fitting[key]

    def _widen(self, sites: Iterable[Site]) -> None:
        """Have columns for these sites too."""
        before = width = self.values.shape[1]
        columns = dict(self._columns)
        for site in sites:
            if site not in columns:
                columns[site] = width
                width += site.activation.dim
        if width == before:
            return
        with torch.inference_mode(False), torch.no_grad():
            values = self.values.new_empty(self.capacity + 1, width)
            resident = [entry.slot for entry in self._entries.values() if entry.slot is not None]
            for slot in (BASE_SLOT, *resident):
                values[slot, :before] = self.values[slot]
                values[slot, before:] = 1.0
        # Both at last: memory may have run out.
        self.values, self._columns = values, columns

    def _entry(self, name: str) -> _Entry:
        self._check_open()
        check_string(name)
        if name not in self._entries:
            raise UnknownNameError(
                f"no adapter {name!r} in this bank of {len(self._entries)}"
                f"{did_you_mean(name, self._entries)}"
            )
        return self._entries[name]

    def _check_open(self) -> None:
        if self.model.routes.bank is not self:
            raise StateError("this bank was closed, or its model unloaded: make a new one")


def _checked_source(source: str | Path | Adapter) -> Path | Adapter:
    """A folder's absolute path, or an adapter with values of its own on the CPU."""
    if isinstance(source, Adapter):
        vectors = {name: vector.detach().cpu().clone() for name, vector in source.vectors.items()}
        return replace(source, vectors=vectors)
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise InvalidTypeError(
            f"source is {shown(source)} ({kind}), expected an adapter's folder or an Adapter"
        )
    folder = path_of("source", source).absolute()
    if folder.is_file():
        raise IA3Error(f"{folder} is not a folder: expected the one that {WEIGHTS_NAME} is in")
    return folder


def _stamp(seen: os.stat_result) -> tuple[int, int, int]:
    """What tells one version of a folder's values from another."""
    return seen.st_ino, seen.st_size, seen.st_mtime_ns
