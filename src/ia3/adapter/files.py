"""Adapters on disk: PEFT's two files, and those of a classifier that belong to its values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import instance
from ..core.names import Frozen
from ..errors import IA3Error, InvalidTypeError, naming, shown
from ..files.atomic import write_files
from ..files.hub import CONFIG_NAME
from ..files.saved import (
    COPIED,
    PICKLED_NAME,
    REPORTS,
    WEIGHTS_NAME,
    SavedFolder,
    as_copy,
    completed,
    copies,
    weights_file,
)
from ..targets.config import IA3Config
from ..targets.matching import Matching
from . import layout, safetensors
from .fingerprint import Fingerprint
from .pickled import read_pickled


@dataclass
class Adapter:
    """An adapter off its model.

    Attributes:
        config: with its modules named.
        vectors: module name -> vector, `[dim, 1]` on an output, `[1, dim]` on an input,
            `[experts, dim]` within experts; float32, or of a file's dtype.
        copies: parameter name in the base model -> its value with this adapter: in its copy of a
            module (`modules_to_save`), or of embeddings that were resized before it was trained.
        frozen: module name -> the ranges of its vector that stay one.
        base: the model it was trained on; `None` where the file does not say.
        unread: reads it, where its tensors are on the meta device until its file is read.
    """

    config: IA3Config
    vectors: dict[str, Tensor]
    copies: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Frozen] = field(default_factory=dict)
    base: Fingerprint | None = None
    unread: Callable[[], Adapter] | None = field(default=None, repr=False, compare=False)

    def whole(self) -> Adapter:
        """The adapter with its values; raises `IA3Error` where its file is broken."""
        return self if self.unread is None else self.unread()


# Where state dicts hold more than tensors: extra state of any module, and quantized layers.
_NOT_TENSORS = {"_extra_state", "_packed_params"}


def named_tensors(name: str, values: object) -> dict[str, Tensor]:
    """An argument that is a state dict, or vectors by module; raises `InvalidTypeError`."""
    expected = "a mapping from names to tensors"
    given = instance(name, values, Mapping, expected)
    for key, value in given.items():
        fits = isinstance(key, str) and (
            isinstance(value, Tensor) or not _NOT_TENSORS.isdisjoint(key.split("."))
        )
        if not fits:
            what = f"{shown(key)}: {type(value).__name__}"
            raise InvalidTypeError(f"{name} holds {what}, expected {expected}")
    return dict(given)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise `InvalidTypeError` for what is no tensor of plain numbers with values of its own."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            problem = f"a {type(tensor).__name__}"
        elif tensor.layout is not torch.strided:
            problem = "sparse"
        elif tensor.device.type == "meta":
            problem = "on the meta device, without values"
        elif tensor.is_quantized or tensor.is_complex() or tensor.dtype in _NO_NUMBERS:
            problem = f"{tensor.dtype}"
        else:
            continue
        raise InvalidTypeError(f"{name!r} is {problem}, expected a tensor of plain numbers")


# Two values in a byte, and powers of two without a zero.
_NO_NUMBERS = {
    getattr(torch, name, None) for name in ("float4_e2m1fn_x2", "float8_e8m0fnu", "bits8")
}


def check_finite(vectors: Mapping[str, Tensor]) -> None:
    """Raise `IA3Error` where a vector, by module name, holds NaN or infinity, or no numbers."""
    check_tensors(vectors)
    # In the precision that they are kept in, which a wider file may exceed.
    flat = [vector.detach().cpu().reshape(-1).float() for vector in vectors.values()]
    # All at once: an adapter has a hundred vectors, and is loaded in three milliseconds.
    if not flat or torch.cat(flat).isfinite().all():
        return
    for name, values in zip(vectors, flat, strict=True):
        broken = values[~values.isfinite()]
        if len(broken):
            raise layout.not_finite(name, broken.tolist(), len(values))


def adapter_files(
    adapter: Adapter, texts: Callable[[str], Mapping[str, str | bytes]] = lambda digest: {}
) -> dict[str, bytes]:
    """The contents of an adapter's files, by file name; `write_saved` writes them.

    `texts` gives further files that belong to its values, of `COPIED`, by the SHA-256 of these.

    An `IA3Error` where a vector is not finite: a training that diverged leaves no good adapter, and
    the file could not be read again.
    """
    check_finite(adapter.vectors)
    tensors = {
        f"{layout.KEY_PREFIX}{name}{layout.KEY_SUFFIX}": v for name, v in adapter.vectors.items()
    }
    for name, value in adapter.copies.items():
        module, _, slot = name.rpartition(".")
        # What PEFT calls the weight of an output layer that it rescales too.
        base = f"{module}.{layout.BASE_LAYER}.{slot}" if module in adapter.vectors else name
        tensors[f"{layout.KEY_PREFIX}{base}"] = value
    metadata = {"format": "pt"}
    if adapter.frozen:
        metadata[layout.FROZEN_KEY] = json.dumps(adapter.frozen)
    if adapter.base is not None:
        metadata[layout.BASE_KEY] = adapter.base.to_json()
    beside = {CONFIG_NAME: adapter.config.to_json().encode()}

    def copied(digest: str) -> dict[str, str]:
        for name, given in texts(digest).items():
            beside[name] = given if isinstance(given, bytes) else given.encode()
        return {COPIED[name]: as_copy(name, content) for name, content in beside.items()}

    weights = safetensors.write(tensors, metadata, copied)
    return {WEIGHTS_NAME: weights, **beside}


def write_saved(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write an adapter's files, of `adapter_files`, and others into a folder, made if absent.

    What belongs to the values that were there before goes with them. Killed at any moment, it
    leaves the adapter that was there or the new one.

    Raises:
        OSError: the disk is full or may not be written; what was there before stays.
    """
    gone = dict.fromkeys((*COPIED, *REPORTS, PICKLED_NAME))
    belonging = (*COPIED, *REPORTS)
    write_files(folder, {**gone, **files}, WEIGHTS_NAME, belonging, _completed)


def write_report(folder: str | Path, name: str, page: str, seen: os.stat_result) -> bool:
    """Write a page, of `REPORTS`, beside the values whose status was `seen` before they were read.

    Where others are there by now, nothing is written: False.

    Raises:
        OSError: the disk is full or may not be written; what was there before stays.
    """

    def is_theirs() -> bool:
        now = weights_file(Path(folder)).stat()
        return os.path.samestat(seen, now) and seen.st_mtime_ns == now.st_mtime_ns

    return write_files(folder, {name: page.encode()}, provided=is_theirs)


def _completed(folder: Path) -> bytes | None:
    """As `completed`; of a folder with a pickled file alone, the safetensors file in its place."""
    if (folder / WEIGHTS_NAME).exists() or not (folder / PICKLED_NAME).exists():
        return completed(folder)
    try:
        with SavedFolder(folder) as saved:
            return safetensors.write(read_pickled(saved), {"format": "pt", **copies(folder)})
    except (IA3Error, OSError):
        return None  # nothing is lost, or less than by a file that cannot be read


def read_adapter(
    folder: str | Path,
    config: IA3Config | None = None,
    key_mapping: Mapping[str, str] | None = None,
) -> Adapter:
    """An adapter from its folder; its tensors are on the CPU, in the dtypes of the file.

    A `config` is used instead of the folder's own. A `key_mapping`, of regular expressions to what
    takes their place, renames modules; the first that is found in a name counts.
    An `IA3Error` where a file is broken, or a vector is not finite.
    """
    with layout.open_folder(folder) as saved:
        return unread_adapter(saved, config, key_mapping).whole()


def unread_adapter(
    saved: SavedFolder,
    config: IA3Config | None = None,
    key_mapping: Mapping[str, str] | None = None,
) -> Adapter:
    """As `read_adapter`, of an open folder: its values are not read yet, but by `whole`."""
    if key_mapping is not None:
        instance("key_mapping", key_mapping, Mapping, "a mapping from expressions to texts")
    config = layout.read_config(saved) if config is None else replace(config)
    path, metadata = saved.path, {}
    tensors: Mapping[str, Tensor]
    if saved.pickled:
        # Nothing but itself says what is in it.
        tensors = read_pickled(saved)
    else:
        header = saved.header
        metadata = header.metadata
        tensors = {key: _promised(s, header.dtypes[key]) for key, s in header.shapes.items()}
    named, copied = layout.name_tensors(tensors, config, path)
    if not saved.pickled:
        layout.check_floating(header.dtypes, named, path)
    frozen, base = layout.read_metadata(metadata, named.values(), path)

    def adapter_of(tensors: Mapping[str, Tensor], read: bool = True) -> Adapter:
        vectors = {name: tensors[key] for key, name in named.items()}
        if read:
            with naming(str(path)):
                check_finite(vectors)
        copies = {name: tensors[key] for key, name in copied.items()}
        unread = None if read else lambda: adapter_of(safetensors.read_tensors(saved))
        return Adapter(config, vectors, copies, frozen, base, unread)

    adapter = adapter_of(tensors, saved.pickled)
    if not key_mapping:
        return adapter
    names = {name: layout.mapped(name, key_mapping) for name in adapter.copies}
    for name in adapter.vectors:
        new = layout.mapped(f"{name}{layout.KEY_SUFFIX}", key_mapping)
        names[name] = new.removesuffix(layout.KEY_SUFFIX)
    return renamed(adapter, names)


_DTYPES = {name: getattr(torch, dtype) for dtype, name in safetensors.DTYPES.items()}


@lru_cache(1000)
def _promised(shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor without values, as a header describes it."""
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")


def renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """An adapter whose modules and parameters have other `names`: old -> new; others stay.

    Where its config's entries do not choose its modules by their new names, it lists these.
    """

    def new(name: str) -> str:
        return names.get(name, name)

    config, vectors = adapter.config, {new(name): v for name, v in adapter.vectors.items()}
    matching = Matching()
    is_target = matching.rule("target_modules", config.target_modules)
    is_input = matching.rule("feedforward_modules", config.feedforward_modules)
    inputs = set(filter(is_input, adapter.vectors))
    if any(
        not is_target(new(name)) or is_input(new(name)) != (name in inputs)
        for name in adapter.vectors
    ):
        config = replace(
            config,
            target_modules=sorted(vectors),
            feedforward_modules=sorted(map(new, inputs)),
            exclude_modules=None,
        )
    if config.modules_to_save:
        ends = {new(f"{entry}.weight").removesuffix(".weight") for entry in config.modules_to_save}
        config = replace(config, modules_to_save=sorted(ends))
    copies = {new(name): value for name, value in adapter.copies.items()}
    frozen = {new(name): ranges for name, ranges in adapter.frozen.items()}
    read = adapter.unread
    unread = None if read is None else lambda: renamed(read(), names)
    return Adapter(config, vectors, copies, frozen, adapter.base, unread)
