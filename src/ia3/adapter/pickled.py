"""Files that PyTorch pickled, read so that they cannot run code."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IA3Error


def unpickle_tensors(path: Path, expected: str) -> Any:
    """What a file of tensors and plain containers holds; `expected` is for the `IA3Error`."""
    content = path.read_bytes()
    try:
        # From memory, where a truncated file is not an OSError.
        return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        raise IA3Error(
            f"{path} is not a whole file of tensors alone ({type(error).__name__}): {expected}"
        ) from error


def read_pickled(path: Path) -> dict[str, Tensor]:
    """An adapter's named tensors as PEFT pickled them; raises as `unpickle_tensors`."""
    tensors = unpickle_tensors(path, "expected an adapter's named tensors")
    if not isinstance(tensors, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise IA3Error(f"{path} does not hold named tensors")
    # A pickle may have two of them share their memory.
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}
