"""Adapters on disk: PEFT's two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..core.names import Frozen
from ..errors import naming
from ..files.hub import CONFIG_NAME
from ..targets.config import IA3Config
from ..targets.matching import matches, matches_feedforward
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
    """

    config: IA3Config
    vectors: dict[str, Tensor]
    copies: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Frozen] = field(default_factory=dict)
    base: Fingerprint | None = None


def check_finite(vectors: Mapping[str, Tensor]) -> None:
    """Raise `IA3Error` where a vector, by module name, holds NaN or infinity."""
    flat = [vector.detach().cpu().reshape(-1) for vector in vectors.values()]
    # All at once: an adapter has a hundred vectors, and is loaded in three milliseconds. In the
    # precision that they are kept in, which a wider file may exceed.
    if not flat or torch.cat(flat).float().isfinite().all():
        return
    for name, values in zip(vectors, flat, strict=True):
        broken = values[~values.float().isfinite()]
        if len(broken):
            raise layout.not_finite(name, broken.tolist(), len(values))


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """The contents of an adapter's files, by file name.

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
    return {
        layout.WEIGHTS_NAME: safetensors.write(tensors, metadata),
        CONFIG_NAME: adapter.config.to_json().encode(),
    }


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
    folder = Path(folder)
    config = layout.read_config(folder) if config is None else replace(config)
    path = layout.weights_file(folder)
    pickled = path.name == layout.PICKLED_NAME
    tensors, metadata = (read_pickled(path), {}) if pickled else safetensors.read_tensors(path)
    named, copied = layout.name_tensors(tensors, config, path)
    vectors = {name: tensors[key] for key, name in named.items()}
    with naming(str(path)):
        check_finite(vectors)
    copies = {name: tensors[key] for key, name in copied.items()}
    frozen, base = layout.read_metadata(metadata, vectors, path)
    adapter = Adapter(config, vectors, copies, frozen, base)
    if not key_mapping:
        return adapter
    names = {name: layout.mapped(name, key_mapping) for name in copies}
    for name in vectors:
        new = layout.mapped(f"{name}{layout.KEY_SUFFIX}", key_mapping)
        names[name] = new.removesuffix(layout.KEY_SUFFIX)
    return renamed(adapter, names)


def renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """An adapter whose modules and parameters have other `names`: old -> new; others stay.

    Where its config's entries do not choose its modules by their new names, it lists these.
    """

    def new(name: str) -> str:
        return names.get(name, name)

    config, vectors = adapter.config, {new(name): v for name, v in adapter.vectors.items()}
    targets, feedforward = config.target_modules, config.feedforward_modules or ()
    inputs = {name for name in adapter.vectors if matches_feedforward(name, feedforward)}
    if any(
        not matches(new(name), targets or ())
        or matches_feedforward(new(name), feedforward) != (name in inputs)
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
    return replace(adapter, config=config, vectors=vectors, copies=copies, frozen=frozen)
