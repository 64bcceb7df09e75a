"""The file of a linear head, which a classifier on a sentence encoder has beside its adapter."""

from __future__ import annotations

import hashlib
import io

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..adapter import safetensors
from ..errors import BrokenFileError, IA3Error, MissingFileError, shown
from ..files.saved import (
    HEAD_NAME,
    LARGEST_HEAD,
    TASK_NAME,
    Beside,
    SavedFolder,
    read_header,
)
from ..sentences.head import Head

# More than the header of such a file has.
_FOR_HEADER = 1000


def check_head_size(classes: int, dim: int) -> None:
    """Raise `IA3Error` where a head of these sizes is larger than a file of one may be."""
    if 4 * classes * (dim + 1) > LARGEST_HEAD - _FOR_HEADER:
        most = (LARGEST_HEAD - _FOR_HEADER) // (4 * (dim + 1))
        raise IA3Error(
            f"a head of {classes:,} classes on embeddings of {dim:,} values is too large to be "
            f"saved: expected at most {most:,} classes"
        )


def head_bytes(weight: Tensor, bias: Tensor) -> bytes:
    """The file of a linear head; the same values are the same bytes.

    Args:
        weight: `[classes, dim]`, of any floating-point dtype; it is written in float32.
        bias: `[classes]`.

    Raises:
        IA3Error: the shapes do not fit each other, a value is not finite, or the head is larger
            than such a file may be.
    """
    if weight.dim() != 2 or 0 in weight.shape or bias.shape != weight.shape[:1]:
        raise IA3Error(
            f"the head's weight is {list(weight.shape)} and its bias {list(bias.shape)}, expected "
            "[classes, dim] and [classes]"
        )
    check_head_size(*weight.shape)
    head = {"weight": weight.detach().float(), "bias": bias.detach().float()}
    for name, values in head.items():
        _check_finite(values, f"the head's {name}", "the training has diverged")
    return safetensors.write(head, {"format": "pt"})


def read_head(saved: SavedFolder | Beside, classes: int, digest: str | None) -> Head | None:
    """The head that belongs to an adapter, from its file or from the copy of it.

    Args:
        saved: the adapter's folder, opened, or what was beside its values.
        classes: how many labels the task has.
        digest: the file's SHA-256, in hex, as the task file has it; `None` where it has no head.

    Returns:
        The head, on the CPU; `None` without `digest`.

    Raises:
        MissingFileError: there is no head.
        BrokenFileError: it is another one, damaged, of other shapes, or not finite.
    """
    if digest is None:
        return None
    content, where = saved.text(HEAD_NAME), saved.place(HEAD_NAME)
    if content is None:
        raise MissingFileError(f"no classifier in {saved.folder}: {HEAD_NAME} is not there")
    if len(content) > LARGEST_HEAD:
        raise BrokenFileError(f"{where} is longer than {LARGEST_HEAD:,} bytes")
    # All that it says is checked before its values are read.
    header = read_header(io.BytesIO(content), len(content), where)
    if header.shapes.keys() != {"weight", "bias"}:
        raise BrokenFileError(
            f"{where} holds {shown(sorted(header.shapes))}, expected 'bias' and 'weight'"
        )
    for name, dtype in header.dtypes.items():
        if dtype != "F32":
            raise BrokenFileError(f"{where}: {name!r} is {dtype}, expected F32")
    weight, bias = header.shapes["weight"], header.shapes["bias"]
    if len(weight) != 2 or 0 in weight or bias != weight[:1]:
        raise BrokenFileError(
            f"{where}: the weight is {list(weight)} and the bias {list(bias)}, expected "
            "[classes, dim] and [classes]"
        )
    if weight[0] != classes:
        raise BrokenFileError(
            f"{where} is a head of {weight[0]:,} classes, and the task has {classes:,} labels"
        )
    if hashlib.sha256(content).hexdigest() != digest:
        raise BrokenFileError(
            f"{where} is not the head that was saved: another program has replaced it, or it is "
            "damaged; fit and save the classifier again; or, if it is meant to have this head, "
            f"write its SHA-256 as 'head' into {TASK_NAME}"
        )
    try:
        tensors = load(content)
        for name, values in tensors.items():
            _check_finite(values, f"{where}: {name!r}", "the file is damaged")
    except SafetensorError as error:
        raise BrokenFileError(f"{where} is not a whole safetensors file: {error}") from error
    except IA3Error as error:
        raise BrokenFileError(str(error)) from error
    return Head(**tensors)


def _check_finite(values: Tensor, name: str, cause: str) -> None:
    broken = values[~torch.isfinite(values)]
    if len(broken):
        raise IA3Error(
            f"{name} is not finite ({len(broken)} of its {values.numel()} values, the first is "
            f"{broken[0].item()}): {cause}"
        )
