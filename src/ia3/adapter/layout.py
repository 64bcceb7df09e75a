"""The layout of an adapter's files, which is PEFT's, and their reading without torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.names import ATTRIBUTE, own_name
from ..errors import IA3Error, MissingFileError, naming
from ..files.foreign import no_adapter
from ..files.hub import CONFIG_NAME
from ..targets.config import IA3Config
from .fingerprint import Fingerprint
from .safetensors import read_floats, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.names import Frozen

WEIGHTS_NAME = "adapter_model.safetensors"
# What PEFT wrote before safetensors; read, never written.
PICKLED_NAME = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
KEY_SUFFIX = f".{ATTRIBUTE}"

# The part that PEFT puts into the names of a rescaled module's own weights, and the parts in those
# of a saved embedding's, which it may write a second and a third time.
BASE_LAYER = "base_layer"
AGAIN = re.compile(r"\.(modules_to_save|original_module)(?=\.)")

# What PEFT's config cannot say stands in the header of the safetensors file, which PEFT ignores.
FROZEN_KEY = "ia3_frozen"
BASE_KEY = "ia3_base_model"


@dataclass(frozen=True)
class Outline:
    """What an adapter's files say without its values.

    `shapes` and `frozen` are by module name; `copies` are parameter names in the base model
    (`modules_to_save`); `base` is `None` where the file does not say; `modified` is in seconds
    since 1970.
    """

    folder: Path
    config: IA3Config
    shapes: dict[str, tuple[int, ...]]
    copies: list[str]
    frozen: dict[str, Frozen]
    base: Fingerprint | None
    adapter_bytes: int
    modified: float

    @property
    def values(self) -> int:
        """How many values the vectors have."""
        return sum(map(prod, self.shapes.values()))

    def base_difference(self, other: Outline) -> str | None:
        """How two base models differ, in words; by their names where a fingerprint is lacking."""
        if self.base is not None and other.base is not None:
            return self.base.difference_from(other.base)
        names = [each.config.base_model_name_or_path for each in (self, other)]
        if None in names or names[0] == names[1]:
            return None
        return f"one is of {names[0]!r}, the other of {names[1]!r}"


def find_adapters(root: str | Path) -> Iterator[Path]:
    """The folders with an `adapter_config.json`, from `root` down, by name, without hidden ones."""
    os.listdir(root)  # raises where `root` cannot be read
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if CONFIG_NAME in files:
            yield Path(folder)


def read_outline(folder: str | Path) -> Outline:
    """An adapter's outline: its config, and what its other file's header says."""
    folder = Path(folder)
    config = read_config(folder)
    path = weights_file(folder)
    seen = path.stat()
    metadata: dict[str, str] = {}
    if path.name == PICKLED_NAME:
        tensors = {key: values.shape for key, values in _read_pickled(path).items()}
    else:
        tensors, metadata = read_header(path)
    names, copies = name_tensors(tensors, config, path)
    shapes = {name: tensors[key] for key, name in names.items()}
    frozen, base = read_metadata(metadata, shapes, path)
    copied = list(copies.values())
    return Outline(folder, config, shapes, copied, frozen, base, seen.st_size, seen.st_mtime)


def read_vectors(outline: Outline) -> dict[str, NDArray[np.float32]]:
    """Module name -> its vector, of the shape in the outline; frozen values are one.

    An `IA3Error` where one is not finite.
    """
    import numpy as np

    path = weights_file(outline.folder)
    pickled = path.name == PICKLED_NAME
    tensors = _read_pickled(path) if pickled else read_floats(path, KEY_SUFFIX)
    names, _ = name_tensors(tensors, outline.config, path)
    vectors = {name: tensors[key] for key, name in names.items()}
    for name, vector in vectors.items():
        if not np.isfinite(vector).all():
            with naming(str(path)):
                raise not_finite(name, vector[~np.isfinite(vector)].tolist(), vector.size)
    for name, ranges in outline.frozen.items():
        values = vectors[name].reshape(-1)
        for start, end in ranges:
            values[start:end] = 1
    return vectors


def not_finite(name: str, broken: Sequence[float], size: int) -> IA3Error:
    """The error for a vector, by its module's name, that has these values among so many."""
    return IA3Error(
        f"the vector of {name!r} is not finite ({len(broken)} of its {size} values, the first is "
        f"{broken[0]}): the training that it comes from has diverged, or the file is damaged; "
        "train at a lower learning rate, or take an earlier checkpoint"
    )


def _read_pickled(path: Path) -> dict[str, NDArray[np.float32]]:
    # Brings torch, which the other form is read without.
    from .pickled import read_pickled

    return {key: tensor.float().numpy() for key, tensor in read_pickled(path).items()}


def read_config(folder: str | Path) -> IA3Config:
    """The folder's `adapter_config.json`; a `FileNotFoundError` where there is none."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise no_adapter(Path(folder))
    return IA3Config.from_json(path)


def weights_file(folder: Path) -> Path:
    """The file with the values; a `FileNotFoundError` where there is none."""
    for name in (WEIGHTS_NAME, PICKLED_NAME):
        if (folder / name).is_file():
            return folder / name
    raise MissingFileError(f"no adapter in {folder}: {WEIGHTS_NAME} is not there")


def name_tensors(
    keys: Iterable[str], config: IA3Config, path: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """What a file's tensors are: (key -> a vector's module, key -> a parameter of the model)."""
    vectors, copies = {}, {}
    for key in keys:
        own = own_name(key)
        name = own.removeprefix(KEY_PREFIX)
        if name.endswith(KEY_SUFFIX):
            vectors[key] = name.removesuffix(KEY_SUFFIX)
        elif config.modules_to_save or own.startswith(KEY_PREFIX):
            copies[key] = name.replace(f".{BASE_LAYER}.", ".")
        else:
            raise IA3Error(
                f"{path}: tensor {key!r} is not an (IA)³ vector: expected names like "
                f"'{KEY_PREFIX}<module>{KEY_SUFFIX}'"
            )
    once = set(copies.values())
    again = [key for key, name in copies.items() if AGAIN.sub("", name) in once - {name}]
    return vectors, {key: name for key, name in copies.items() if key not in again}


def mapped(name: str, key_mapping: Mapping[str, str]) -> str:
    """A name after the first of the regular expressions that is found in it."""
    for pattern, replacement in key_mapping.items():
        try:
            new, count = re.subn(pattern, replacement, name)
        except re.error as error:
            message = f"key_mapping {{{pattern!r}: {replacement!r}}} is malformed: {error}"
            raise IA3Error(message) from error
        if count:
            return new
    return name


def read_metadata(
    metadata: Mapping[str, str], vectors: Iterable[str], path: Path
) -> tuple[dict[str, Frozen], Fingerprint | None]:
    """What a header says beyond PEFT's: (the ranges that stay one, the base model)."""
    where = f"{path}: the header's {FROZEN_KEY!r}"
    try:
        read: Any = json.loads(metadata.get(FROZEN_KEY, "{}"))
        frozen = {
            own_name(name): tuple((start, end) for start, end in ranges)
            for name, ranges in read.items()
        }
        if not all(type(n) is int for ranges in frozen.values() for both in ranges for n in both):
            raise TypeError("expected whole numbers")
    except (ValueError, TypeError, AttributeError) as error:
        raise IA3Error(f"{where} is malformed: {error}") from error
    without = sorted(frozen.keys() - set(vectors))
    if without:
        raise IA3Error(f"{where} names {without[0]!r}, which has no vector")
    text = metadata.get(BASE_KEY)
    return frozen, None if text is None else Fingerprint.from_json(text, str(path))
