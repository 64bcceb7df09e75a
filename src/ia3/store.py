"""Adapters on disk: PEFT's two files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .config import CONFIG_NAME, IA3Config
from .errors import IA3Error

WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
KEY_SUFFIX = ".ia3_l"


def adapter_files(config: IA3Config, vectors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The contents of an adapter's files, by file name.

    Args:
        config: with its defaults filled in.
        vectors: module name -> `[dim, 1]` or `[1, dim]`.
    """
    tensors = {
        f"{KEY_PREFIX}{name}{KEY_SUFFIX}": vector.detach().cpu().contiguous()
        for name, vector in vectors.items()
    }
    weights = save(tensors, metadata={"format": "pt"})
    return {WEIGHTS_NAME: weights, CONFIG_NAME: config.to_json().encode()}


def read_vectors(folder: str | Path) -> dict[str, Tensor]:
    """Module name -> vector, from a folder's `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: the folder or the file is not there.
        IA3Error: the file is truncated or not safetensors, or holds other tensors than vectors.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {folder}: {WEIGHTS_NAME} is not there")
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise IA3Error(f"{path} is not a whole safetensors file: {error}") from error
    vectors = {}
    for key, tensor in tensors.items():
        if not (key.startswith(KEY_PREFIX) and key.endswith(KEY_SUFFIX)):
            raise IA3Error(
                f"{path}: tensor {key!r} is not an (IA)³ vector: expected names like "
                f"'{KEY_PREFIX}<module>{KEY_SUFFIX}'"
            )
        vectors[key.removeprefix(KEY_PREFIX).removesuffix(KEY_SUFFIX)] = tensor
    return vectors


def read_config(folder: str | Path) -> IA3Config:
    """The folder's `adapter_config.json`.

    Raises:
        FileNotFoundError: the folder or the file is not there.
        IA3Error: the file is not the config of an (IA)³ adapter.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {folder}: {CONFIG_NAME} is not there")
    return IA3Config.from_json(path)
