"""The layout of an adapter's files, which is PEFT's, and their reading without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.names import ATTRIBUTE, own_name
from ..errors import BrokenFileError, IA3Error, MissingFileError, StateError, naming, shown
from ..files.hub import CONFIG_NAME
from ..files.json import parse_object
from ..files.saved import WEIGHTS_NAME, SavedFolder, holds_config_copy
from ..targets.config import IA3Config, config_from_text
from .fingerprint import Fingerprint
from .safetensors import read_floats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.names import Frozen

KEY_PREFIX = "base_model.model."
KEY_SUFFIX = f".{ATTRIBUTE}"

# The part that PEFT puts into the names of a rescaled module's own weights, and the parts in those
# of a saved embedding's, which it may write a second and a third time.
BASE_LAYER = "base_layer"
AGAIN = re.compile(r"\.(modules_to_save|original_module)(?=\.)")
# A tensor's name is a tenth of it. Looking for a module takes the square of its name's length.
LONGEST_KEY = 2000

# What vectors are made of; copies of modules may hold anything.
FLOATS = ("F64", "F32", "BF16", "F16")

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
    """The folders of adapters, from `root` down, by name, without hidden ones."""
    os.listdir(root)  # raises where `root` cannot be read
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if CONFIG_NAME in files or (
            WEIGHTS_NAME in files and holds_config_copy(Path(folder, WEIGHTS_NAME))
        ):
            yield Path(folder)


def open_folder(folder: str | Path) -> SavedFolder:
    """An adapter's folder, opened.

    A `FileNotFoundError` where it holds none; an `IA3Error` where that can be told to be another
    library's.
    """
    try:
        return SavedFolder(folder)
    except MissingFileError:
        path = Path(folder) / CONFIG_NAME
        if path.is_file():
            IA3Config.from_json(path)
        raise


def read_config(saved: SavedFolder) -> IA3Config:
    """The config in an adapter's folder; raises as `IA3Config.from_json`."""
    return config_from_text(*saved.config_text())


def read_outline(folder: str | Path) -> Outline:
    """An adapter's outline: its config, and what its other file's header says."""
    folder = Path(folder)
    with open_folder(folder) as saved:
        config = read_config(saved)
        metadata: dict[str, str] = {}
        if saved.pickled:
            tensors = {key: values.shape for key, values in _read_pickled(saved).items()}
        else:
            tensors, metadata = saved.header.shapes, saved.header.metadata
        names, copies = name_tensors(tensors, config, saved.path)
        shapes = {name: tensors[key] for key, name in names.items()}
        frozen, base = read_metadata(metadata, shapes, saved.path)
        size, modified = saved.seen.st_size, saved.seen.st_mtime
    return Outline(folder, config, shapes, list(copies.values()), frozen, base, size, modified)


def read_vectors(outline: Outline) -> dict[str, NDArray[np.float32]]:
    """Module name -> its vector, of the shape in the outline; frozen values are one.

    An `IA3Error` where one is not finite, or the file has been replaced by another adapter's.
    """
    import numpy as np

    with open_folder(outline.folder) as saved:
        path = saved.path
        if not saved.pickled:
            names, _ = name_tensors(saved.header.shapes, outline.config, path)
            check_floating(saved.header.dtypes, names, path)
        tensors = _read_pickled(saved) if saved.pickled else read_floats(saved, KEY_SUFFIX)
    names, _ = name_tensors(tensors, outline.config, path)
    vectors = {name: tensors[key] for key, name in names.items()}
    if {name: vector.shape for name, vector in vectors.items()} != outline.shapes:
        raise StateError(f"{path} is another adapter's than it was a moment ago: read it again")
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


def _read_pickled(saved: SavedFolder) -> dict[str, NDArray[np.float32]]:
    # Brings torch, which the other form is read without.
    from .pickled import read_pickled

    return {key: tensor.float().numpy() for key, tensor in read_pickled(saved).items()}


def check_floating(dtypes: Mapping[str, str], vectors: Iterable[str], path: Path) -> None:
    """Raise `BrokenFileError` unless a file's vectors, by key, are of floating-point values."""
    for key in vectors:
        if dtypes[key] not in FLOATS:
            raise BrokenFileError(
                f"{path}: tensor {key!r} is {dtypes[key]}, expected floating-point values "
                f"({', '.join(FLOATS)})"
            )


def name_tensors(
    keys: Iterable[str], config: IA3Config, path: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """What a file's tensors are: (key -> a vector's module, key -> a parameter of the model)."""
    vectors, copies = {}, {}
    for key in keys:
        own = own_name(key)
        if len(key) > LONGEST_KEY:
            raise BrokenFileError(f"{path}: a tensor's name has {len(key):,} characters")
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
    again = {
        key
        for key, name in copies.items()
        if (short := AGAIN.sub("", name)) != name and short in once
    }
    return vectors, {key: name for key, name in copies.items() if key not in again}


def mapped(name: str, key_mapping: Mapping[str, str]) -> str:
    """A name after the first of the regular expressions that is found in it."""
    for pattern, replacement in key_mapping.items():
        try:
            new, count = re.subn(pattern, replacement, name)
        except (re.error, IndexError, TypeError) as error:  # IndexError: no group of that name
            message = f"key_mapping {{{pattern!r}: {replacement!r}}} is malformed: {error}"
            raise IA3Error(message) from error
        if count:
            return new
    return name


def read_metadata(
    metadata: Mapping[str, str], vectors: Iterable[str], path: Path
) -> tuple[dict[str, Frozen], Fingerprint | None]:
    """What a header says beyond PEFT's: (the ranges that stay one, the base model).

    Raises:
        BrokenFileError: it is malformed, or has ranges for what has no vector.
    """
    where = f"{path}: the header's {FROZEN_KEY!r}"
    read = parse_object(metadata.get(FROZEN_KEY, "{}"), where)
    frozen = {own_name(name): _ranges(ranges, where) for name, ranges in read.items()}
    without = sorted(frozen.keys() - set(vectors))
    if without:
        raise BrokenFileError(f"{where} names {shown(without[0])}, which has no vector")
    text = metadata.get(BASE_KEY)
    return frozen, None if text is None else Fingerprint.from_json(text, str(path))


def _ranges(given: Any, where: str) -> Frozen:
    """Half-open ranges from JSON, ascending."""
    ranges = given if isinstance(given, list) else [given]
    end = 0
    for both in ranges:
        whole = isinstance(both, list) and len(both) == 2 and all(type(n) is int for n in both)
        if not whole or not end <= both[0] < both[1]:
            raise BrokenFileError(f"{where} is malformed: {shown(both)} is no range of values")
        end = both[1]
    return tuple((start, end) for start, end in ranges)
