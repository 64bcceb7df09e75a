"""Checkpoints of a training on a sentence encoder: one file, replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..adapter import safetensors
from ..base.processes import processes
from ..errors import BrokenFileError, IA3Error
from ..files.atomic import check_folder, write_file
from ..files.json import parse_json
from ..files.saved import HASH_KEY, read_header
from ..tfew.training.steps import steps_of, threads_kept

CHECKPOINT_NAME = "ia3_encoder_checkpoint.safetensors"
CHECKPOINT_STEPS = 25
_RUN, _HISTORY, _THREADS = "ia3_run", "ia3_history", "ia3_threads"
# Of AdamW, for each trained tensor.
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class EncoderStep:
    """The loss of one optimizer step; `steps` is how many there are at most."""

    step: int
    steps: int
    loss: float


class Checkpoint:
    """The last checkpoint of a run in a folder.

    Args:
        folder: made if absent.
        run: what identifies the run, as values of JSON: all that its vectors depend on.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any]) -> None:
        check_folder(folder)
        self._path = Path(folder) / CHECKPOINT_NAME
        self._run = json.dumps(run, sort_keys=True)

    def keep(
        self,
        optimizer: torch.optim.Optimizer,
        history: Sequence[EncoderStep],
        threads: int | None = None,
    ) -> None:
        """Write what the optimizer trains, its state, the steps so far, and a step's threads.

        Of several processes the first one writes.
        """
        if not processes().is_first:
            return
        tensors = {}
        for place, value in enumerate(_trained(optimizer)):
            tensors[f"{place}.value"] = value.detach()
            # One that gets no gradient has none.
            for name in _MOMENTS if optimizer.state[value] else ():
                tensors[f"{place}.{name}"] = optimizer.state[value][name]
        steps = json.dumps([asdict(step) for step in history])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {_RUN: self._run, _HISTORY: steps, _THREADS: json.dumps(threads)}
        # With the hash of the values, by which a file that was damaged is told.
        write_file(self._path, safetensors.write(tensors, metadata, lambda digest: {}))

    def restore(self, optimizer: torch.optim.Optimizer) -> tuple[list[EncoderStep], int | None]:
        """Have the optimizer and what it trains be as they were kept.

        Returns the steps until then, and a step's threads, if these are known.

        Where there is no checkpoint, nothing changes.

        Raises:
            IA3Error: the checkpoint is another run's.
            BrokenFileError: the file is damaged.
        """
        kept = processes().from_first(self._kept)
        if kept is None:
            return [], None
        metadata, tensors = kept
        trained = _trained(optimizer)
        try:
            read = parse_json(metadata[_HISTORY], f"{self._path}: its history")
            history = steps_of(EncoderStep, read, f"{self._path}: its history")
            read = parse_json(metadata[_THREADS], f"{self._path}: its threads")
            threads = threads_kept(read, f"{self._path}: its threads")
            of_each = [
                {
                    name: _fitting(tensors[f"{place}.{name}"], value)
                    for name in ("value", *_MOMENTS)
                    if name == "value" or f"{place}.{_MOMENTS[0]}" in tensors
                }
                for place, value in enumerate(trained)
            ]
            if len(tensors) != sum(map(len, of_each)):
                raise ValueError("other vectors")
        except (KeyError, TypeError, ValueError) as error:
            problem = "a part of the checkpoint is missing, or is of another shape"
            raise BrokenFileError(f"{self._path}: {problem}; remove the file") from error
        for value, state in zip(trained, of_each, strict=True):
            with torch.no_grad():
                value.copy_(state.pop("value"))
            moments = {name: moment.to(value.device) for name, moment in state.items()}
            if moments:
                steps = torch.tensor(float(len(history)), dtype=torch.float32)
                optimizer.state[value] = {"step": steps, **moments}
        return history, threads

    def _kept(self) -> tuple[dict[str, str], dict[str, Tensor]] | None:
        """The file's metadata and tensors, if there is one; raises as `restore`."""
        if not self._path.exists():
            return None
        metadata, tensors = _read(self._path)
        if metadata.get(_RUN) != self._run:
            raise IA3Error(
                f"{self._path} is of another run: its data, model or settings differ; give another "
                "folder, or remove it"
            )
        return metadata, tensors


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A file's metadata and tensors; raises `BrokenFileError` where it is not whole."""
    with open(path, "rb") as file:
        header = read_header(file, os.fstat(file.fileno()).st_size, path)
        file.seek(0)
        content = file.read()
    digest = hashlib.sha256(memoryview(content)[header.start :]).hexdigest()
    if header.metadata.get(HASH_KEY) != digest:
        raise BrokenFileError(f"{path}: the values are not those that were kept; remove the file")
    try:
        return header.metadata, load(content)
    except SafetensorError as error:
        raise BrokenFileError(f"{path} is not a whole safetensors file: {error}") from error


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for group in optimizer.param_groups for value in group["params"]]


def _fitting(kept: Tensor, value: Tensor) -> Tensor:
    if kept.shape != value.shape or kept.dtype != value.dtype:
        raise ValueError("another shape")
    return kept
