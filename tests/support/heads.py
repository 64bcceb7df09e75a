"""Files of classifiers on a sentence encoder, whose parts all say one number, without a model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from ia3 import IA3Config
from ia3.adapter.files import Adapter, adapter_files, unread_adapter, write_saved
from ia3.adapter.layout import open_folder
from ia3.classify.head_file import head_bytes, read_head
from ia3.classify.task_file import TASK_FORMAT, TaskFile
from ia3.errors import BrokenFileError, MissingFileError

TASK_NAME, HEAD_NAME = "ia3_task.json", "ia3_head.safetensors"


def numbered_adapter(number: int) -> Adapter:
    """One vector of 8 values; odd numbers have another module than even ones."""
    module = f"encoder.layer.{number % 2}.attention.self.key"
    config = IA3Config(
        task_type="FEATURE_EXTRACTION",
        target_modules=[module],
        feedforward_modules=[],
        base_model_name_or_path=f"encoder {number}",
    )
    return Adapter(config, {module: torch.full((8, 1), float(number))})


def encoder_files(number: int) -> dict[str, bytes]:
    """The files of a classifier of `2 + number` labels."""
    labels = [f"{number} {letter}" for letter in "abcdefghij"[: 2 + number]]
    head = head_bytes(torch.full((len(labels), 8), float(number)), torch.zeros(len(labels)))
    task = TaskFile(
        format=TASK_FORMAT,
        model=f"encoder {number}",
        templates=[],
        fields=["text"],
        labels=labels,
        choices=[],
        chat=False,
        steps=number,
        learning_rate=0.01,
        seed=0,
        engine="encoder",
        temperature=float(number),
        head=hashlib.sha256(head).hexdigest(),
    )

    def beside(digest: str) -> dict[str, str | bytes]:
        said = task.model_copy(update={"vectors": digest}).to_json()
        return {TASK_NAME: said, HEAD_NAME: head}

    return adapter_files(numbered_adapter(number), beside)


def save_encoder(folder: Path, number: int) -> None:
    """Save it, as a classifier's `save` does."""
    write_saved(folder, encoder_files(number))


def state(folder: Path) -> dict[str, Any]:
    """All that predictions of a classifier of either engine depend on, with all checks.

    Raises as loading does; `MissingFileError` where there is no classifier.
    """
    with open_folder(folder) as saved:
        text = saved.text(TASK_NAME)
        if text is None:
            raise MissingFileError(f"no classifier in {folder}")
        task = TaskFile.from_json(text, str(folder / TASK_NAME))
        adapter = unread_adapter(saved).whole()
        if task.vectors != saved.digest:
            raise BrokenFileError(f"{folder}: another program has replaced the vectors")
        head = read_head(saved, len(task.labels), task.head)
    return {
        "task": task.to_json(),
        "config": adapter.config.to_json(),
        "vectors": {name: vector.flatten().tolist() for name, vector in adapter.vectors.items()},
        "head": None if head is None else [head.weight.tolist(), head.bias.tolist()],
    }
