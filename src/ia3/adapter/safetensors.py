"""Safetensors files: the package reads the values; they are written here, to the same bytes always.

The package writes a header's metadata in another order in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, deserialize

from ..errors import BrokenFileError, IA3Error
from ..files.saved import (
    HASH_KEY,
    LARGEST_PART,
    LONGEST_HEADER,
    SIZES,
    SavedFolder,
    encoded_header,
    longest_header,
)

# torch is imported where tensors are made of values: outlines are read without it.
if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# torch's dtypes and the format's names of them.
DTYPES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def read_tensors(saved: SavedFolder) -> dict[str, Tensor]:
    """Key -> tensor, on the CPU, in the order of the file; raises `BrokenFileError`."""
    from safetensors.torch import load

    content = saved.content()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise BrokenFileError(f"{saved.path} is not a whole safetensors file: {error}") from error
    return {key: tensors[key] for key in saved.header.shapes}


def read_floats(saved: SavedFolder, ending: str) -> dict[str, NDArray[np.float32]]:
    """Key -> values as float32, of the keys that end so, sorted; without torch."""
    content = saved.content()
    try:
        tensors = dict(deserialize(content))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise BrokenFileError(f"{saved.path} is not a whole safetensors file: {error}") from error
    keys = sorted(key for key in tensors if key.endswith(ending))
    return {key: _floats(tensors[key]) for key in keys}


def write(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    of_values: Callable[[str], Mapping[str, str]] | None = None,
) -> bytes:
    """A safetensors file: 8 bytes with the header's length, the header, the tensors.

    With `of_values` its metadata has the SHA-256 of the values too, and what that says of it.
    """
    import torch

    dtypes = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
    for key, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise IA3Error(
                f"{key!r} is {dtype}, which cannot be saved: expected one of {[*DTYPES]}"
            )
    header: dict[str, Any] = {}
    data: list[Any] = []
    end = 0
    for key in sorted(tensors, key=lambda key: ([*SIZES].index(DTYPES[dtypes[key]]), key)):
        # A copy: numpy pins the memory that it sees, and FSDP frees that of its parameters.
        copied = tensors[key].detach().to("cpu", copy=True)
        # As bytes, because numpy lacks some dtypes.
        values = copied.reshape(-1).view(torch.uint8).numpy()
        shape, start, end = list(tensors[key].shape), end, end + values.nbytes
        header[key] = {"dtype": DTYPES[dtypes[key]], "shape": shape, "data_offsets": [start, end]}
        data.append(values)
    if of_values is not None:
        digest = hashlib.sha256(b"".join(data)).hexdigest()
        metadata = {**metadata, HASH_KEY: digest, **of_values(digest)}
    beginning = encoded_header({**header, "__metadata__": metadata})
    if len(beginning) > longest_header(len(beginning) + end):
        raise IA3Error(
            "the names of the tensors and the copies of the files beside them take "
            f"{len(beginning):,} bytes, which could not be read again: expected "
            f"{LONGEST_HEADER:,}, or a part of {LARGEST_PART:.0%} of the values, at most"
        )
    return b"".join([beginning, *data])


def _floats(tensor: Mapping[str, Any]) -> NDArray[np.float32]:
    dtype, data = tensor["dtype"], tensor["data"]
    if dtype == "BF16":
        # The upper half of a float32.
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, f"<f{int(dtype[1:]) // 8}").astype(np.float32)
    return values.reshape(tensor["shape"])
