"""The adapters of a folder, each served by the base model that its config names.

A folder in it is an adapter, by the folder's name. A start lists them and reads their configs; the
bank of a base model reads an adapter, and checks it, when it is first asked for. A thread looks at
what the others' files say meanwhile, so that a broken one is known before somebody asks for it.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from warnings import catch_warnings

from ...adapter.files import write_saved
from ...adapter.layout import Outline, open_folder, read_outline
from ...base.embedded import EMBEDDED_ENCODER, EMBEDDED_MODEL, embedded_place
from ...classify.estimator import read_task
from ...classify.task_file import TaskFile
from ...errors import (
    IA3Error,
    MissingFileError,
    StateError,
    UnknownNameError,
    did_you_mean,
    shown,
)
from ...files.atomic import new_folder_beside, remove_dead, remove_folder
from ...files.hub import CONFIG_NAME
from ...files.json import parse_object
from ...files.saved import (
    HEAD_NAME,
    PICKLED_NAME,
    TASK_NAME,
    WEIGHTS_NAME,
    weights_are_in,
)
from ...model.adapters import check_name
from ...targets.config import config_from_text
from ...tfew.prompts.labels import Label
from ..engine.bases import ServedBase
from .keys import EVERYTHING, Access

Kind = Literal["classifier", "adapter"]
# What an adapter may consist of.
PARTS = (CONFIG_NAME, WEIGHTS_NAME, TASK_NAME, HEAD_NAME)
NEEDED = (CONFIG_NAME, WEIGHTS_NAME)
FILES = (WEIGHTS_NAME, PICKLED_NAME, CONFIG_NAME, TASK_NAME, HEAD_NAME)
# Different configs whose base models are remembered.
MOST_READ = 1000
# Among so many a like name is looked for; among thousands it takes 20 ms of the event loop.
MOST_ALIKE = 100
# In bytes: a file's name may have 255, and what is written has more behind it for a while.
LONGEST_NAME = 200

_log = logging.getLogger("ia3.serve")


@dataclass(frozen=True, eq=False)
class Served:
    """An adapter of the folder; `labels` and `fields` are `None` where it is no classifier.

    They are so too until its files were looked at. `stamp` tells versions of the files apart.
    """

    name: str
    folder: Path
    base: ServedBase
    stamp: tuple[object, ...]
    kind: Kind
    bytes: int
    labels: list[Label] | None = None
    fields: list[str] | None = None


@dataclass(frozen=True)
class Changes:
    """What a reload has found, by name; `failed` says why an adapter cannot be served."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Registry:
    """The adapters of a folder and the base models that serve them.

    All methods may be called from several threads. Reading takes no lock: what is looked up is
    replaced whole.

    Args:
        folder: has a folder for each adapter; made if absent.
        bases: at most one of a kind.

    Raises:
        OSError: the folder cannot be read.
    """

    def __init__(self, folder: str | Path, bases: Sequence[ServedBase]) -> None:
        self.folder = Path(folder).absolute()
        self.bases = [*bases]
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # it may be read alone
            remove_dead(self.folder)
        self._by_place = {_place_of(base.name): base for base in bases}
        self._by_name = {base.name: base for base in bases}
        self._adapters: dict[str, Served] = {}
        self._skipped: dict[str, str] = {}
        # Held while the folder or a bank is changed.
        self._lock = threading.RLock()
        self._looking = threading.Thread(
            target=self._look_at_all, name="adapters of the folder", daemon=True
        )
        self._closed = self._is_waited_for = False
        self._read: dict[bytes, str | None] = {}
        self._scan()

    def look(self, wait: float) -> None:
        """Begin to look at what the files of all adapters say; wait for it for so many seconds."""
        self._is_waited_for = True
        self._looking.start()
        self._looking.join(wait)
        self._is_waited_for = False

    def close(self) -> None:
        self._closed = True

    def list(self, access: Access = EVERYTHING) -> list[Served]:
        """The adapters that may be used, by name."""
        return [each for name, each in sorted(self._adapters.items()) if access.may_use(name)]

    def skipped(self, access: Access = EVERYTHING) -> dict[str, str]:
        """The folders that are no adapter of a base model here, and why."""
        return {n: why for n, why in sorted(self._skipped.items()) if access.may_use(n)}

    def __len__(self) -> int:
        return len(self._adapters)

    def resident(self) -> set[str]:
        """The names of the adapters whose values are on the device."""
        return {each.name for base in self.bases for each in base.bank.list() if each.resident}

    def find(self, name: str, access: Access = EVERYTHING) -> Served:
        """An adapter by name.

        Raises:
            UnknownNameError: there is none, or it may not be used.
            StateError: its files are broken.
        """
        found = self._adapters.get(name) if access.may_use(name) else None
        if found is not None:
            return found
        if access.may_use(name) and name in self._skipped:
            raise StateError(f"adapter {name!r} cannot be used: {self._skipped[name]}")
        known = access.of([*self._adapters])  # others may come meanwhile
        alike = did_you_mean(name, known) if len(known) <= MOST_ALIKE else ""
        raise UnknownNameError(f"no adapter {shown(name)} here{alike}")

    def base_named(self, name: str, access: Access = EVERYTHING) -> ServedBase | None:
        """The base model of this name, if there is one and it may be used."""
        return self._by_name.get(name) if access.may_use(name) else None

    def is_ready(self, served: Served) -> bool:
        """Whether the bank knows the adapter already, so that `use` takes no time."""
        return served.name in served.base.bank

    def use(self, served: Served) -> None:
        """Have the bank know an adapter; its files are read and checked if it does not.

        Raises:
            UnknownNameError: it has been removed.
            StateError: its files are broken, or do not fit the base model.
        """
        if self.is_ready(served):
            return
        with self._lock:
            # Another version of it may be there by now.
            served = self.find(served.name)
            if self.is_ready(served):
                return
            try:
                served.base.bank.add(served.name, served.folder)
            except (IA3Error, OSError) as error:
                if isinstance(error, IA3Error):
                    self._skip(served.name, error)
                raise StateError(f"adapter {served.name!r} cannot be used: {error}") from error

    def put(self, name: str, files: Mapping[str, bytes], *, replace: bool = True) -> Served:
        """Add an adapter, or replace one, once its files were checked against the base model.

        Raises:
            StateError: there is an adapter of the name, and it is not to be replaced.
            BrokenFileError: a file is damaged, or belongs to another save than the others.
            MissingFileError: a file is lacking.
            IA3Error: the name is malformed, a file is none of an adapter's, its base model is not
                served here, or it does not fit that. Nothing has changed.
            OSError: the disk is full, or may not be written. Nothing has changed.
        """
        self.check_new(name, replace=replace)
        for file in files:
            if file not in PARTS:
                raise IA3Error(f"{shown(file)} is no file of an adapter: expected some of {PARTS}")
        for file in NEEDED:
            if file not in files:
                raise MissingFileError(f"the file {file} is missing: it and {NEEDED} are needed")
        with self._lock:
            self.check_new(name, replace=replace)
            place = self.folder / name
            with new_folder_beside(place) as staging:
                checked = staging / "adapter"
                write_saved(checked, files)
                base = self._checked(checked)
            write_saved(place, files)
            before = self._adapters.get(name)
            if before is not None:
                if before.stamp[0] == _stamp(_seen(place))[0]:
                    os.utime(place / WEIGHTS_NAME)  # the same values, and another task
                self._renew(before, base)
            return self._take(name)

    def check_new(self, name: str, *, replace: bool = True) -> None:
        """Raise what `put` would raise of the name."""
        _check_name(name)
        if not replace and (name in self._adapters or name in self._skipped):
            raise StateError(f"there is an adapter {name!r} already: replace it, or choose another")
        if name in self._by_name:
            raise IA3Error(f"{name!r} is what a base model is called here: choose another")
        self._check_holds_nothing_else(name)

    def delete(self, name: str, access: Access = EVERYTHING) -> None:
        """Remove an adapter and its folder. What runs goes on with its values.

        Raises:
            UnknownNameError: there is none.
            StateError: the folder of that name holds something else.
            OSError: it cannot be removed.
        """
        with self._lock:
            if name not in self._skipped or not access.may_use(name):
                self.find(name, access)
            place = self.folder / name
            self._check_holds_nothing_else(name)
            with suppress(FileNotFoundError):
                remove_folder(place)
            self._drop(name)

    def _check_holds_nothing_else(self, name: str) -> None:
        """Somebody's folder is not written into, and with that could not be removed as a whole."""
        place = self.folder / name
        if place.is_dir() and os.listdir(place) and not _seen(place):
            raise StateError(f"the folder {name!r} holds something else than an adapter")

    def reload(self) -> Changes:
        """Take up what was changed in the folder: adapters added, replaced and removed."""
        return self._scan(look=True)

    def without_places(self, text: str) -> str:
        """A message without where the folder is, which is no client's business."""
        return re.sub(rf"{re.escape(str(self.folder))}/(\.[^/\s]+\.ia3-\w+/\w+/)?", "", text)

    # -- the folder

    def _scan(self, *, look: bool = False) -> Changes:
        """Look through the folder and, if asked, at the files of what has changed in it."""
        changes, found = Changes(), set()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                # Not `entry.is_dir()`, which raises for a link to itself.
                if not entry.name.startswith(".") and os.path.isdir(entry):
                    found.add(entry.name)
        known = {*self._adapters, *self._skipped}
        for name in sorted(known | found):
            # One at a time: requests for others go on meanwhile.
            with self._lock:
                self._take_up(name, changes, look)
        return changes

    def _take_up(self, name: str, changes: Changes, look: bool) -> None:
        before, folder = self._adapters.get(name), self.folder / name
        if not folder.is_dir():
            self._drop(name)
            if before is not None:
                changes.removed.append(name)
            return
        try:
            if before is not None and before.stamp == _stamp(_seen(folder)):
                return
            after = self._outlined(name)
            if look:
                after = self._looked_at(after)
            if before is not None:
                self._renew(before, after.base)
        except (IA3Error, OSError) as error:
            self._skip(name, error)
            changes.failed[name] = self._skipped[name]
            return
        self._adapters[name] = after
        self._skipped.pop(name, None)
        (changes.added if before is None else changes.changed).append(name)

    def _take(self, name: str) -> Served:
        served = self._adapters[name] = self._looked_at(self._outlined(name))
        self._skipped.pop(name, None)
        return served

    def _outlined(self, name: str) -> Served:
        """An adapter by its config alone."""
        _check_name(name)
        folder = self.folder / name
        seen = _seen(folder)
        with open_folder(folder) as saved:
            base = self._base_for(self._base_in(*saved.config_text()))
            is_classifier = saved.text(TASK_NAME) is not None
        kind: Kind = "classifier" if is_classifier else "adapter"
        size = sum(each.st_size for each in seen.values())
        return Served(name, folder, base, _stamp(seen), kind, size)

    def _base_in(self, content: bytes, place: str) -> str | None:
        """The base model that a config names. Of thousands of adapters most have the same."""
        if content not in self._read:
            with catch_warnings(action="ignore"):
                read = config_from_text(content, place).base_model_name_or_path
            if len(self._read) >= MOST_READ:
                self._read.clear()
            self._read[content] = read
        return self._read[content]

    def _looked_at(self, served: Served) -> Served:
        """The same adapter, with what its files say; their values are not read."""
        with catch_warnings(action="ignore"):
            outline = read_outline(served.folder)
            _check_base(outline, served.base)
            if served.kind == "adapter":
                return served
            with open_folder(served.folder) as saved:
                text = saved.text(TASK_NAME)
        if text is None:
            raise StateError("its files were changed while they were read: reload it")
        task = TaskFile.from_json(text, str(served.folder / TASK_NAME))
        _check_engine(task, served.base)
        return replace(served, labels=task.labels, fields=task.fields)

    def _look_at_all(self) -> None:
        for name, served in [*self._adapters.items()]:
            if self._closed:
                return
            began = time.monotonic()
            found: Served | Exception
            try:
                found = self._looked_at(served)
            except (IA3Error, OSError) as error:
                found = error
            with self._lock:
                if self._adapters.get(name) is served:
                    if isinstance(found, Served):
                        self._adapters[name] = found
                    else:
                        self._skip(name, found)
            if not self._is_waited_for:
                # Half of the time is for what is asked meanwhile.
                time.sleep(time.monotonic() - began)

    def _base_for(self, named: str | None) -> ServedBase:
        if named is not None and (base := self._by_place.get(_place_of(named))) is not None:
            return base
        served = " and ".join(repr(base.name) for base in self.bases) or "none"
        raise IA3Error(f"its base model is {shown(named)}, and served here: {served}")

    def _checked(self, folder: Path) -> ServedBase:
        """The base model that an adapter fits, by trying it."""
        with catch_warnings(action="ignore"):
            outline = read_outline(folder)
        base = self._base_for(outline.config.base_model_name_or_path)
        _check_base(outline, base)
        name = f"upload-{uuid.uuid4().hex}"
        base.bank.add(name, folder)
        try:
            with open_folder(folder) as saved:
                if saved.text(TASK_NAME) is None:
                    return base
                saved.content()  # for its digest, by which the task belongs to the values
                task, head = read_task(saved)
        finally:
            base.bank.remove(name)
        _check_engine(task, base)
        dimension = getattr(base.base, "dimension", None)
        if head is not None and dimension is not None:
            head.check_fits(dimension)
        return base

    # -- the banks

    def _renew(self, before: Served, base: ServedBase) -> None:
        """Have the bank take up other files of an adapter; what runs goes on with the old ones."""
        bank = before.base.bank
        if before.name not in bank:
            return
        if base is not before.base or not bank.refresh([before.name]).changed:
            bank.remove(before.name)
        if base is before.base and before.name not in bank:
            bank.add(before.name, before.folder)

    def _skip(self, name: str, error: Exception) -> None:
        self._drop(name)
        said = self._skipped[name] = self.without_places(str(error))
        _log.warning("adapter skipped", extra={"adapter": name, "error": said})

    def _drop(self, name: str) -> None:
        served = self._adapters.pop(name, None)
        self._skipped.pop(name, None)
        if served is not None and name in served.base.bank:
            served.base.bank.remove(name)


def _seen(folder: Path) -> dict[str, os.stat_result]:
    """The files of an adapter in a folder."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat() for entry in entries if entry.name in FILES}


def _stamp(seen: Mapping[str, os.stat_result]) -> tuple[object, ...]:
    """What tells versions of an adapter's files apart: of the values first, then of the others."""
    found = [seen.get(name) for name in FILES]
    return tuple(each and (each.st_ino, each.st_size, each.st_mtime_ns) for each in found)


def _check_name(name: str) -> None:
    check_name(name)
    if len(name.encode()) > LONGEST_NAME:
        expected = f"expected at most {LONGEST_NAME} bytes"
        raise IA3Error(f"the adapter's name has {len(name):,} characters, {expected}")
    # The last one stands for bytes that are no UTF-8: two addresses would be one name.
    if not name.isprintable() or "\ufffd" in name:
        raise IA3Error(f"adapter name {name!r} has characters that cannot be printed")


def _check_base(outline: Outline, base: ServedBase) -> None:
    if outline.base is not None and (other := outline.base.difference(base.base.model)):
        raise IA3Error(f"it was fitted on another model than {base.name!r}: {other}")


def _check_engine(task: TaskFile, base: ServedBase) -> None:
    if task.engine != base.kind:
        raise IA3Error(f"its task is for a {task.engine}, and its base is a {base.kind}")


def _place_of(name: str) -> str:
    """What a base model is known by: an id, or the place of a folder."""
    # A name may be longer than a file's may be, which `Path.is_dir` raises an error for.
    if name not in (EMBEDDED_ENCODER, EMBEDDED_MODEL) and os.path.isdir(name):
        return os.path.realpath(name)
    return name


def bases_named(folder: str | Path) -> list[str]:
    """The base models that the configs of a folder's adapters name, the most frequent first.

    The embedded ones that are installed, where there are none.
    """
    counts: dict[str, int] = {}
    if Path(folder).is_dir():
        for place in sorted(Path(folder).iterdir()):
            if place.name.startswith(".") or not place.is_dir():
                continue
            with suppress(IA3Error, OSError):
                if not weights_are_in(place):
                    continue
                with open_folder(place) as saved:
                    name = parse_object(*saved.config_text()).get("base_model_name_or_path")
                if name and isinstance(name, str):
                    counts[name] = counts.get(name, 0) + 1
    embedded = [name for name in (EMBEDDED_MODEL, EMBEDDED_ENCODER) if embedded_place(name)]
    return sorted(counts, key=lambda name: -counts[name]) or embedded
