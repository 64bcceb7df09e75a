"""Adapters on disk: PEFT's two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..core.names import Frozen
from ..errors import IA3Error
from ..files.hub import CONFIG_NAME
from ..targets.config import IA3Config
from .fingerprint import Fingerprint
from .layout import (
    BASE_KEY,
    FROZEN_KEY,
    KEY_PREFIX,
    KEY_SUFFIX,
    PICKLED_NAME,
    WEIGHTS_NAME,
    is_embedding,
    name_tensors,
    read_config,
    read_metadata,
    weights_file,
)
from .pickled import read_pickled

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The format's names of dtypes, in the order in which its library writes them: the widest first.
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass
class Adapter:
    """An adapter off its model.

    Attributes:
        config: with its modules named.
        vectors: module name -> vector, float32, `Activation.shape`.
        copies: parameter name in the base model -> its value in this adapter's copy
            (`modules_to_save`).
        frozen: module name -> the ranges of its vector that stay one.
        base: the model it was trained on; `None` where nobody wrote it down.
    """

    config: IA3Config
    vectors: dict[str, Tensor]
    copies: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Frozen] = field(default_factory=dict)
    base: Fingerprint | None = None


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """The contents of an adapter's files, by file name."""
    tensors = {f"{KEY_PREFIX}{name}{KEY_SUFFIX}": v for name, v in adapter.vectors.items()}
    tensors.update({f"{KEY_PREFIX}{name}": value for name, value in adapter.copies.items()})
    metadata = {"format": "pt"}
    if adapter.frozen:
        metadata[FROZEN_KEY] = json.dumps(adapter.frozen)
    if adapter.base is not None:
        metadata[BASE_KEY] = adapter.base.to_json()
    return {
        WEIGHTS_NAME: _safetensors(tensors, metadata),
        CONFIG_NAME: adapter.config.to_json().encode(),
    }


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: 8 bytes with the header's length, the header, the tensors.

    As the library writes it, whose metadata stand in another order in every process, and which
    takes as long for many small tensors as for one large one.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise IA3Error(
                f"{name!r} is {tensor.dtype}, which cannot be saved: expected one of "
                f"{[str(dtype) for dtype in DTYPES]}"
            )
    place = {dtype: number for number, dtype in enumerate(DTYPES)}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    data: list[Any] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (place[tensors[name].dtype], name)):
        tensor = tensors[name]
        values = _values(tensor)
        start, end = end, end + values.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        data.append(values)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def _values(tensor: Tensor) -> NDArray[Any]:
    """A tensor's values as they lie in a file."""
    if tensor.dtype is not torch.float32:  # numpy lacks some of them
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    return np.ascontiguousarray(tensor.numpy(force=True))


def read_adapter(folder: str | Path, config: IA3Config | None = None) -> Adapter:
    """An adapter from its folder.

    Args:
        config: instead of the folder's own.

    Raises:
        FileNotFoundError: the folder or a file is not there.
        IA3Error: a file is truncated or not what it should be.
    """
    folder = Path(folder)
    config = replace(config) if config is not None else read_config(folder)
    path = weights_file(folder)
    if path.name == PICKLED_NAME:
        return _adapter(config, read_pickled(path), {}, path)
    # Read, not mapped: the file may be replaced meanwhile.
    return parse_adapter(config, path.read_bytes(), path)


def parse_adapter(config: IA3Config, content: bytes, path: Path) -> Adapter:
    """An adapter from what its safetensors file holds; raises as `read_adapter`.

    Args:
        config: the adapter's, whose `modules_to_save` are filled in.
        path: the file, for messages.
    """
    return _adapter(config, *_parse_safetensors(content, path), path)


def _adapter(
    config: IA3Config, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> Adapter:
    named, copied = name_tensors(tensors, config, path)
    vectors = {name: tensors[key] for key, name in named.items()}
    frozen, base = read_metadata(metadata, vectors, path)
    copies = {name: tensors[key] for key, name in copied.items()}
    embeddings = {name.rpartition(".")[0] for name in copies if is_embedding(name)}
    saved = config.modules_to_save or []
    # Their own names, where the config does not cover them already.
    new = [name for name in sorted(embeddings) if not any(name.endswith(entry) for entry in saved)]
    config.modules_to_save = [*saved, *new] or None
    return Adapter(config, vectors, copies, frozen, base)


@dataclass(frozen=True)
class _Header:
    """How a file of float32 tensors alone begins, and what follows from that.

    Attributes:
        text: its first bytes.
        size: bytes of the whole file.
        places: name -> the tensor's first value, the one after its last, and its shape, in the
            order in which they lie.
        metadata: what the header says beside them.
    """

    text: bytes
    size: int
    places: dict[str, tuple[int, int, tuple[int, ...]]]
    metadata: dict[str, str]

    def tensors(self, content: bytes) -> dict[str, Tensor]:
        """The tensors of a file that begins so and is as long."""
        values = np.frombuffer(bytearray(memoryview(content)[len(self.text) :]), np.float32)
        # Not views of one tensor: where one was written to, all would count as changed.
        return {
            name: torch.from_numpy(values[start:end].reshape(shape))
            for name, (start, end, shape) in self.places.items()
        }


# Of the file that was read last: adapters of one base model and config begin alike.
_last_header: _Header | None = None


def _parse_safetensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    global _last_header
    known = _last_header
    if known is not None and len(content) == known.size and content.startswith(known.text):
        return known.tensors(content), dict(known.metadata)
    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:  # the latter for a dtype that torch lacks
        raise IA3Error(f"{path} is not a whole safetensors file: {error}") from error
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    metadata = header.pop("__metadata__", None) or {}
    if any(t.numel() for t in tensors.values()) and all(
        entry["dtype"] == "F32" for entry in header.values()
    ):
        # The library has seen to it that they lie one after the other and fill the file.
        ordered = sorted((entry["data_offsets"], name) for name, entry in header.items())
        places = {
            name: (start // 4, end // 4, tuple(tensors[name].shape))
            for (start, end), name in ordered
        }
        _last_header = _Header(content[:length], len(content), places, metadata)
    return tensors, dict(metadata)
