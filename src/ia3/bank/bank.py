"""`AdapterBank`: the adapters of a model that many are served with, as rows of one tensor.

A batch takes its rows from it by one gather. Adapters beyond the capacity wait in their files.
Files are read and not mapped: one that is cut short while it is mapped ends the process. What the
system keeps of them in memory makes reading as fast.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layout import KEY_PREFIX, KEY_SUFFIX, PICKLED_NAME, WEIGHTS_NAME
from ..adapter.store import DTYPES, Adapter, parse_adapter
from ..core.activations import device_of
from ..core.route import BASE
from ..core.sites import Site
from ..errors import IA3Error, did_you_mean
from ..files.hub import CONFIG_NAME
from ..model.gather import Gathered
from ..model.ia3_model import IA3Model, check_name
from ..targets.config import IA3Config

# The row of the base model.
BASE_SLOT = 0

# How often files are read again that were replaced meanwhile.
TRIES = 5

# The format's names of the dtypes that are copied as they are.
COPIED = {
    DTYPES[dtype]: dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


@dataclass(frozen=True)
class Registered:
    """An adapter of a bank.

    Attributes:
        name: its name.
        source: its folder; `None` for one that was given in memory.
        resident: its values are on the device, and can be used.
        pinned: they stay there, or come back there as soon as they can be used again.
    """

    name: str
    source: Path | None
    resident: bool
    pinned: bool


@dataclass(frozen=True)
class Refreshed:
    """What `AdapterBank.refresh` found.

    Attributes:
        changed: the adapters whose files were replaced.
        failed: adapter -> why it cannot be used.
    """

    changed: list[str]
    failed: dict[str, str]


@dataclass(frozen=True)
class _Signature:
    """What tells one version of a file from another; times in nanoseconds."""

    folder: tuple[int, int, int]
    device: int
    inode: int
    size: int
    time: int

    @classmethod
    def of(cls, folder: Path) -> _Signature:
        file, around = os.stat(folder / WEIGHTS_NAME), os.stat(folder)
        return cls(
            (around.st_dev, around.st_ino, around.st_mtime_ns),
            file.st_dev,
            file.st_ino,
            file.st_size,
            file.st_mtime_ns,
        )

    def is_overwritten(self, before: _Signature) -> bool:
        """Whether this is the file from before with something else in it, not another one.

        Inodes are used again: with another inode or in a folder that changed it is another file.
        """
        here = (self.folder, self.device, self.inode)
        return here == (before.folder, before.device, before.inode) and self != before


@dataclass(frozen=True)
class _Plan:
    """How the values of a file go into a row: the same for all files with the same header.

    Attributes:
        names: the modules, in the order of the values.
        columns: `[values]`, int64, on the CPU: where each value goes.
        in_order: the columns are the first ones, in order.
        ones: columns of frozen values.
        sites: those rescaled.
        dtype: of the values, one after the other from byte `start` of the file to its end, `size`;
            `None` where they are not so.
    """

    names: tuple[str, ...]
    columns: Tensor
    in_order: bool
    ones: Tensor | None
    sites: frozenset[Site]
    dtype: torch.dtype | None = None
    start: int = 0
    size: int = 0


@dataclass
class _Entry:
    """An adapter: where its values are.

    Attributes:
        folder: of its files; `None` where `values` are all there is.
        plan: how its values go into a row.
        signature: of the version that is known.
        values: `[values]`, in the order of the plan.
        slot: its row, if it is resident. A pinned one keeps it, also where it cannot be used.
        pinned: it stays so.
        error: why it cannot be used.
    """

    folder: Path | None
    plan: _Plan
    signature: _Signature | None = None
    values: Tensor | None = None
    slot: int | None = None
    pinned: bool = False
    error: str | None = None


@dataclass
class _Layout:
    """The columns of a bank: sites one after the other, in the order in which they came."""

    sites: list[Site] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    starts: dict[Site, int] = field(default_factory=dict)
    columns: int = 0

    def add(self, site: Site) -> None:
        self.starts[site] = self.columns
        self.sites.append(site)
        self.sizes.append(site.activation.dim)
        self.columns += site.activation.dim


class AdapterBank:
    """Adapters of one model for mixed batches: `model(..., adapter_names=[...])`.

    Up to `capacity` of them are resident; of those that are not pinned the least recently used make
    room for others. All methods may be called from several threads.

    Args:
        model: the model, which must have no other bank. A base model gets an `IA3Model` without
            adapters of its own, `bank.model`.
        capacity: how many adapters are resident at most.
        device: where the values are; the model's device if not given.
        dtype: of the values; bfloat16 takes half the memory and rounds them.

    Attributes:
        values: `[capacity + 1, columns]`: a row for each resident adapter, and the first one for
            the base model. It has columns for the sites of all adapters so far, ones where an
            adapter has none. Rows that were never used take no memory on a CPU.

    Raises:
        IA3Error: the capacity is no whole number from one, `dtype` is no floating one, or the model
            has a bank.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise IA3Error(f"capacity is {capacity!r}, expected a whole number, at least 1")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise IA3Error(f"dtype is {dtype!r}, expected a floating dtype")
        self.model = model if isinstance(model, IA3Model) else IA3Model.without_adapters(model)
        self.capacity = capacity
        self.device = device_of(self.model.model) if device is None else torch.device(device)
        self.values = torch.ones(capacity + 1, 0, dtype=dtype, device=self.device)
        self._lock = threading.RLock()
        self._layout = _Layout()
        self._entries: dict[str, _Entry] = {}
        # Resident adapters that are not pinned, the least recently used first.
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._free = list(range(capacity, 0, -1))
        self._plans: dict[bytes, _Plan] = {}
        # Counts changes of the rows; and what was gathered last, for the next step of the same.
        self._version = 0
        self._last: tuple[object, Gathered] | None = None
        self.model.attach_bank(self)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        """The adapters' names, in the order in which they were added."""
        with self._lock:
            return [*self._entries]

    # -- adapters ---------------------------------------------------------------------------------

    def add(self, name: str, source: str | Path | Adapter, pinned: bool = False) -> None:
        """Register an adapter. It is checked at once, and loaded while there is room.

        Args:
            name: new to the bank and its model, by the rules of `IA3Model.add_adapter`.
            source: the adapter's folder, or what `IA3Model.adapter` gives, whose values are kept
                in memory. Of the two forms of files only safetensors are read. A relative folder is
                taken from where the process is now.
            pinned: it stays resident.

        Raises:
            FileNotFoundError: there is no adapter in the folder, or none in safetensors.
            IA3Error: the name is taken or malformed; the source is neither a folder nor an
                `Adapter`; the files are broken or do not fit the model; the adapter has copies of
                modules (`modules_to_save`) or rescales experts; or it is to be pinned and all slots
                are. The bank is then unchanged.
        """
        with self._lock:
            self._check_open()
            _check_text(name)
            check_name(name)
            if not isinstance(source, str | os.PathLike | Adapter):
                raise IA3Error(
                    f"source is {source!r} ({type(source).__name__}), expected an adapter's folder "
                    "or an Adapter"
                )
            if name in self._entries or name in self.model.peft_config:
                raise IA3Error(f"adapter {name!r} exists already: remove it or choose another")
            if pinned:
                self._check_room(name, frozenset())
            if isinstance(source, Adapter):
                plan = self._planned(source, name)
                values = _flat(source, plan).clone()
                entry = _Entry(None, plan, values=values)
            else:
                folder = Path(source).absolute()
                plan, values, signature = self._read(name, folder, None)
                entry = _Entry(folder, plan, signature)
            entry.pinned = pinned
            if self._free or pinned:
                entry.slot = self._slot(name, frozenset())
                self._write(entry.slot, plan, values)
                if not pinned:
                    self._recent[name] = None
            self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget an adapter. Calls that are routed to it go on with its values."""
        with self._lock:
            entry = self._entry(name)
            self._evict(name, entry)
            del self._entries[name]

    def list(self) -> list[Registered]:
        """All adapters, in the order in which they were added."""
        with self._lock:
            return [
                Registered(
                    name,
                    entry.folder,
                    entry.slot is not None and entry.error is None,
                    entry.pinned,
                )
                for name, entry in self._entries.items()
            ]

    def pin(self, name: str) -> None:
        """Have an adapter stay resident; it is loaded if it is not.

        Raises:
            IA3Error: it is unknown or cannot be loaded, or all slots are pinned.
        """
        with self._lock:
            entry = self._entry(name)
            self._make_resident([name])
            entry.pinned = True
            self._recent.pop(name, None)

    def unpin(self, name: str) -> None:
        """Undo `pin`."""
        with self._lock:
            entry = self._entry(name)
            if entry.pinned:
                entry.pinned = False
                self._recent[name] = None
                if entry.error is not None:
                    self._evict(name, entry)

    def refresh(self, names: Sequence[str] | None = None) -> Refreshed:
        """Take up adapters whose files were replaced (by a rename, as `save_pretrained` does).

        A call sees either the old values of an adapter or the new ones. An adapter whose file was
        written over in place or is broken cannot be used until it has been replaced and refreshed;
        the others can. A pinned one stays so: its slot waits for it meanwhile. One whose file is
        gone can be used for as long as it is resident.

        Args:
            names: all adapters if not given.

        Raises:
            IA3Error: a name is unknown.
        """
        if names is not None:
            _check_texts(names)
        changed = []
        failed = {}
        for name in names or ():
            self._entry(name)
        for name in self.names() if names is None else names:
            # One at a time: calls go on meanwhile.
            with self._lock:
                if names is None and name not in self._entries:
                    continue
                try:
                    if self._refresh(name, self._entry(name)):
                        changed.append(name)
                except (IA3Error, OSError) as error:
                    failed[name] = str(error)
        return Refreshed(changed, failed)

    def close(self) -> None:
        """Detach the bank from its model, which is then as it would be without.

        Raises:
            IA3Error: a route of the model is on.
        """
        with self._lock:
            if self.model.bank is self:
                self.model.detach_bank()
                self._entries.clear()
                self._recent.clear()
                self._plans.clear()
                self._last = None
                self.values = self.values.new_ones(self.capacity + 1, 0)

    # -- rows -------------------------------------------------------------------------------------

    def gather(self, names: Sequence[str], index: Sequence[int]) -> Gathered:
        """The values of adapters, of one version each; those that are not resident are loaded.

        Args:
            names: of this bank's adapters, or `BASE`.
            index: which of them each row is to be, `[rows]`.

        Raises:
            IA3Error: there are no rows, or one has none of the names; an adapter is unknown or
                cannot be loaded, or they are more than there is room for.
        """
        _check_texts(names)
        counted = all(isinstance(place, int) and 0 <= place < len(names) for place in index)
        if len(index) == 0 or not counted:
            raise IA3Error(
                f"index is {[*index]}, expected at least one row, and for each one its place among "
                f"the {len(names)} names"
            )
        with self._lock:
            self._check_open()
            own = list(dict.fromkeys(name for name in names if name != BASE))
            self._make_resident(own)
            what = ([*names], [*index], self._version)
            if self._last is not None and self._last[0] == what:
                return self._last[1]
            entries = {name: self._entries[name] for name in own}
            slots = [entries[name].slot if name != BASE else BASE_SLOT for name in names]
            rows = torch.tensor([slots[place] for place in index], device=self.device)
            plans = {id(entry.plan): entry.plan for entry in entries.values()}
            with torch.inference_mode(False), torch.no_grad():
                gathered = Gathered(
                    self.values.index_select(0, rows),
                    list(self._layout.sites),
                    list(self._layout.sizes),
                    frozenset().union(*(plan.sites for plan in plans.values())),
                )
            self._last = what, gathered
            return gathered

    def _make_resident(self, names: Sequence[str]) -> None:
        missing = []
        for name in names:
            entry = self._entry(name)
            if entry.error is not None:
                raise IA3Error(f"adapter {name!r} cannot be used: {entry.error}")
            if entry.slot is None:
                missing.append(name)
            elif not entry.pinned:
                self._recent.move_to_end(name)
        keep = frozenset(names)
        for name in missing:
            self._load(name, self._entries[name], keep)
            self._recent[name] = None

    def _load(self, name: str, entry: _Entry, keep: frozenset[str]) -> None:
        """Give an adapter a slot, and put its values there."""
        plan, values, signature = entry.plan, entry.values, entry.signature
        if entry.folder is not None:
            try:
                plan, values, signature = self._read(name, entry.folder, entry.signature)
            except (IA3Error, OSError) as error:
                entry.error = str(error)
                raise IA3Error(f"adapter {name!r} cannot be used: {error}") from error
        assert values is not None
        slot = self._slot(name, keep)
        self._write(slot, plan, values)
        entry.slot, entry.plan, entry.signature = slot, plan, signature

    def _slot(self, name: str, keep: frozenset[str]) -> int:
        self._check_room(name, keep)
        if not self._free:
            oldest = next(iter(self._recent))
            self._evict(oldest, self._entries[oldest])
        return self._free.pop()

    def _check_room(self, name: str, keep: frozenset[str]) -> None:
        # All of a batch were moved to the end.
        oldest = next(iter(self._recent), None)
        if not self._free and (oldest is None or oldest in keep):
            pinned = self.capacity - len(self._recent)
            raise IA3Error(
                f"no room for adapter {name!r}: of {self.capacity} slots {pinned} are pinned "
                f"and {len(keep & self._recent.keys())} are of the same batch; make a bank of "
                "more capacity, unpin some or split the batch"
            )

    def _evict(self, name: str, entry: _Entry) -> None:
        self._version += 1
        if entry.slot is not None:
            self._free.append(entry.slot)
            entry.slot = None
            self._recent.pop(name, None)

    def _write(self, slot: int, plan: _Plan, values: Tensor) -> None:
        self._version += 1
        with torch.inference_mode(False), torch.no_grad():
            row = self.values[slot]
            if not plan.in_order or len(values) != len(row):
                row.fill_(1.0)
                row[plan.columns.to(row.device)] = values.to(row.device, row.dtype)
            elif row.device.type == "cpu" and row.dtype == values.dtype:
                # Some hundred kilobytes are not worth a wait for other threads.
                row.view(torch.uint8).numpy()[:] = values.view(torch.uint8).numpy()
            else:
                row.copy_(values)
            if plan.ones is not None:
                row[plan.ones.to(row.device)] = 1.0

    def _refresh(self, name: str, entry: _Entry) -> bool:
        """Look at an adapter's files; returns whether there is another version of them."""
        if entry.folder is None:
            return False
        try:
            with _reading(entry.folder):
                signature = _Signature.of(entry.folder)
            if signature == entry.signature and entry.error is None:
                return False
            plan, values, signature = self._read(name, entry.folder, entry.signature)
        except (IA3Error, OSError) as error:
            if entry.slot is None or not isinstance(error, FileNotFoundError):
                entry.error = str(error)
                if not entry.pinned:
                    self._evict(name, entry)
            raise
        entry.error = None
        entry.plan, entry.signature = plan, signature
        if entry.slot is not None:
            self._write(entry.slot, plan, values)
        return True

    # -- files ------------------------------------------------------------------------------------

    def _read(
        self, name: str, folder: Path, known: _Signature | None
    ) -> tuple[_Plan, Tensor, _Signature]:
        """An adapter's values from its files, of one version: the one that is known or another."""
        for _ in range(TRIES):
            with _reading(folder):
                before = _Signature.of(folder)
                config = bytes(_content(folder / CONFIG_NAME))
                content = _content(folder / WEIGHTS_NAME)
                after = _Signature.of(folder)
            if known is not None and after.is_overwritten(known):
                raise IA3Error(
                    f"{folder / WEIGHTS_NAME} was written over in place, so that nobody knows "
                    "which version was read: write a new file, rename it to that name, and "
                    "refresh()"
                )
            if before == after and len(content) == after.size:
                plan, values = self._parse(name, folder, config, content)
                return plan, values, after
        raise IA3Error(f"{folder} was written to each of {TRIES} times that it was read")

    def _parse(
        self, name: str, folder: Path, config: bytes, content: bytearray
    ) -> tuple[_Plan, Tensor]:
        path = folder / WEIGHTS_NAME
        begin = 8 + int.from_bytes(content[:8], "little")
        key = blake2b(config + b"\0" + content[:begin]).digest()
        plan = self._plans.get(key)
        if plan is None or plan.dtype is None:
            parsed = IA3Config.from_text(config, str(folder / CONFIG_NAME))
            adapter = parse_adapter(parsed, bytes(content), path)
            if plan is None:
                plan = self._planned(adapter, name, _order(content[8:begin], adapter, begin))
                self._plans[key] = plan
            if plan.dtype is None:
                return plan, _flat(adapter, plan)
        if len(content) != plan.size:
            raise IA3Error(
                f"{path} is not a whole safetensors file: it has {len(content)} bytes, expected "
                f"{plan.size}"
            )
        return plan, torch.frombuffer(content, dtype=plan.dtype, offset=plan.start)

    def _planned(
        self,
        adapter: Adapter,
        name: str,
        order: tuple[tuple[str, ...], torch.dtype, int, int] | None = None,
    ) -> _Plan:
        """Check an adapter against the model, and have columns for all of its sites."""
        sites = self.model.sites_for_bank(name, adapter)
        names, dtype, start, size = order or (tuple(sites), None, 0, 0)
        # In the order of the file, so that its values are copied as they are.
        new = [sites[module] for module in names if sites[module] not in self._layout.starts]
        if new:
            self._widen(new)
        starts = self._layout.starts
        columns = torch.cat(
            [
                torch.arange(starts[site], starts[site] + site.activation.dim)
                for site in map(sites.__getitem__, names)
            ]
            or [torch.zeros(0, dtype=torch.int64)]
        )
        ones = [
            torch.arange(starts[sites[module]] + begin, starts[sites[module]] + end)
            for module, ranges in adapter.frozen.items()
            for begin, end in ranges
        ]
        return _Plan(
            names,
            columns,
            bool((columns == torch.arange(len(columns))).all()),
            torch.cat(ones) if ones else None,
            frozenset(sites.values()),
            dtype,
            start,
            size,
        )

    def _widen(self, sites: Sequence[Site]) -> None:
        before = self._layout.columns
        for site in sites:
            self._layout.add(site)
        rows, dtype = self.capacity + 1, self.values.dtype
        with torch.inference_mode(False), torch.no_grad():
            values = torch.empty(rows, self._layout.columns, dtype=dtype, device=self.device)
            resident = [entry.slot for entry in self._entries.values() if entry.slot is not None]
            for slot in (BASE_SLOT, *resident):
                values[slot, :before] = self.values[slot]
                values[slot, before:] = 1.0
        self.values = values

    def _entry(self, name: str) -> _Entry:
        self._check_open()
        _check_text(name)
        if name not in self._entries:
            raise IA3Error(
                f"no adapter {name!r} in this bank of {len(self._entries)}"
                f"{did_you_mean(name, self._entries)}"
            )
        return self._entries[name]

    def _check_open(self) -> None:
        if self.model.bank is not self:
            raise IA3Error("this bank was closed, or its model unloaded: make a new one")


def _check_text(name: object) -> None:
    if not isinstance(name, str):
        raise IA3Error(f"an adapter's name is {name!r}, expected a text")


def _check_texts(names: object) -> None:
    if isinstance(names, str) or not isinstance(names, Collection):
        raise IA3Error(f"names is {names!r}, expected a list of adapters' names")
    for name in names:
        _check_text(name)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Say what is wrong with a folder that has not the files of an adapter."""
    try:
        yield
    except NotADirectoryError as error:
        raise IA3Error(
            f"{folder} is not a folder: expected the one that {WEIGHTS_NAME} is in"
        ) from error
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        if missing == WEIGHTS_NAME and (folder / PICKLED_NAME).is_file():
            raise FileNotFoundError(
                f"no {WEIGHTS_NAME} in {folder}, and a bank does not read {PICKLED_NAME}: load it "
                "with IA3Model.from_pretrained, and save_pretrained writes the other"
            ) from error
        raise FileNotFoundError(f"no adapter in {folder}: {missing} is not there") from error


def _content(path: Path) -> bytearray:
    """What is in a file; less where it is longer than its size says by now."""
    with path.open("rb", buffering=0) as file:
        content = bytearray(os.fstat(file.fileno()).st_size)
        read = file.readinto(content) or 0
    return content[:read] if read < len(content) else content


def _flat(adapter: Adapter, plan: _Plan) -> Tensor:
    """`[values]`, in the order of the plan."""
    return torch.cat([adapter.vectors[name].detach().reshape(-1).cpu() for name in plan.names])


def _order(
    header: bytes | bytearray, adapter: Adapter, begin: int
) -> tuple[tuple[str, ...], torch.dtype, int, int] | None:
    """The modules in the order of their vectors in a safetensors file, if that is all there is.

    Returns:
        The modules' names, the dtype, the byte where the values begin and the one where they end;
        `None` where other tensors stand between them or dtypes differ.
    """
    tensors: dict[str, Any] = json.loads(header)
    tensors.pop("__metadata__", None)
    held = sorted(tensors, key=lambda key: tensors[key]["data_offsets"])
    names = [key.removeprefix(KEY_PREFIX).removesuffix(KEY_SUFFIX) for key in held]
    dtypes = {tensors[key]["dtype"] for key in held}
    if set(names) != adapter.vectors.keys() or len(dtypes) != 1 or not dtypes <= COPIED.keys():
        return None
    dtype = COPIED[dtypes.pop()]
    if begin % dtype.itemsize:
        return None
    # The format has no gaps.
    return tuple(names), dtype, begin, begin + tensors[held[-1]]["data_offsets"][1]
