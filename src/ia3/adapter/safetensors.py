"""Safetensors files: the package reads them; they are written here, to the same bytes every time.

The package writes a header's metadata in another order in every process. Readers raise
`FileNotFoundError` where there is no file, and `IA3Error` where it is truncated or another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from ..errors import IA3Error

# torch is imported where tensors are made of values: outlines are read without it.
if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# torch's dtypes and the format's names of them, in the order in which the package writes them: the
# widest first.
DTYPES = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(key -> its tensor's shape, in the order of the file; metadata), without the values."""
    try:
        with safe_open(path, "np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.offset_keys()}
            return shapes, file.metadata() or {}
    except SafetensorError as error:
        raise _not_whole(path, error) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(key -> tensor, on the CPU, in the order of the file; metadata)."""
    from safetensors.torch import load

    # Read, not mapped: a file that is cut short while it is mapped ends the process.
    content = path.read_bytes()
    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:  # the latter for a dtype that torch lacks
        raise _not_whole(path, error) from error
    # The package has checked the header, but gives metadata of files alone.
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header.pop("__metadata__", None) or {}
    return {key: tensors[key] for key in header}, metadata


def read_floats(path: Path, ending: str) -> dict[str, NDArray[np.float32]]:
    """Key -> values as float32, of the keys that end so; without torch."""
    try:
        tensors = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise _not_whole(path, error) from error
    # The package gives them in another order in every process.
    keys = sorted(key for key in tensors if key.endswith(ending))
    return {key: _floats(tensors[key], key, path) for key in keys}


def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: 8 bytes with the header's length, the header, the tensors."""
    import torch

    dtypes = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
    for key, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise IA3Error(
                f"{key!r} is {dtype}, which cannot be saved: expected one of {[*DTYPES]}"
            )
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    data: list[Any] = []
    end = 0
    for key in sorted(tensors, key=lambda key: ([*DTYPES].index(dtypes[key]), key)):
        # A copy: numpy pins the memory that it sees, and FSDP frees that of its parameters.
        copied = tensors[key].detach().to("cpu", copy=True)
        # As bytes, because numpy lacks some dtypes.
        values = copied.reshape(-1).view(torch.uint8).numpy()
        shape, start, end = list(tensors[key].shape), end, end + values.nbytes
        header[key] = {"dtype": DTYPES[dtypes[key]], "shape": shape, "data_offsets": [start, end]}
        data.append(values)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def _floats(tensor: Mapping[str, Any], key: str, path: Path) -> NDArray[np.float32]:
    dtype, data = tensor["dtype"], tensor["data"]
    if dtype == "BF16":
        # The upper half of a float32.
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype in ("F16", "F32", "F64"):
        values = np.frombuffer(data, f"<f{int(dtype[1:]) // 8}").astype(np.float32)
    else:
        raise IA3Error(f"{path}: tensor {key!r} is {dtype}, expected floating-point values")
    return values.reshape(tensor["shape"])


def _not_whole(path: Path, error: Exception) -> IA3Error:
    return IA3Error(f"{path} is not a whole safetensors file: {error}")
